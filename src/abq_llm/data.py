"""Calibration and evaluation token sets: from WikiText-2, C4, a file, or the model's own text; seeded and hashed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abq_llm.errors import AbqError

Split = Literal["calibration", "evaluation"]

JSON_LINES = (".jsonl", ".json", ".ndjson")
C4_FILES = {
    "calibration": "en/c4-train.00000-of-01024.json.gz",
    "evaluation": "en/c4-validation.00000-of-00008.json.gz",
}
C4_EVALUATION_DOCUMENTS = 1100  # GPTQ's "c4-new"; papers report on its first 256 windows of 2048
C4_LEGACY_WINDOWS = 256
C4_LEGACY_TRIES = 100_000  # for a document that is long enough
SELF_WINDOWS = 16
SELF_BATCH_TOKENS = 16384  # bounds the KV cache: 8 GiB for LLaMA-7B in 16 bits
SELF_BATCH_ROWS = 32


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Token ids with the name of where they came from.

    Attributes:
        name: "wikitext2", "c4", "self", or the name of the file (without its folder).
        tokens: int64 [samples, seqlen].
    """

    name: str
    tokens: torch.Tensor

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the shape and the ids, both as little-endian int64: equal if and only if the tokens are."""
        shape = torch.tensor(self.tokens.shape, dtype=torch.int64)
        digest = hashlib.sha256()
        for part in (shape, self.tokens.to("cpu", torch.int64)):
            digest.update(part.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def calibration_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    model: PreTrainedModel | None = None,
) -> TokenSet:
    """Draw `samples` sequences of `seqlen` tokens to calibrate on; the same arguments give the same tokens.

    - "wikitext2": random segments of the train split, rows joined by a blank line.
    - "c4": one random segment from each of `samples` random documents longer than `seqlen` (first English train
      shard), as in GPTQ.
    - "self": text that `model` writes itself, sampled at temperature 1 from BOS, or from a random ordinary token if
      the tokenizer has no BOS (LLM-QAT, arXiv 2305.17888); needs no data at all.
    - a path: random segments of the file. Text files are read as the field reads WikiText: rows are lines, a blank
      row is "", the others keep their newline, and rows are joined by a blank line. In .jsonl, .json and .ndjson files
      each line is an object with a "text" string, and the documents are joined by a blank line.

    A joined text is tokenized once as a whole with the tokenizer's defaults: special tokens appear only where the
    tokenizer itself puts them around a single text (typically one BOS at the very start), never per segment.

    Raises:
        AbqError: the source is missing, unreadable or too short, or `samples` or `seqlen` is out of range.
    """
    _check_lengths(seqlen, samples=samples, model=model)
    generator = _generator(seed, "calibration")
    if str(source) == "self":
        return TokenSet("self", _sample_text(_needed(model), tokenizer, samples, seqlen, generator))
    if str(source) == "c4":
        return TokenSet("c4", _document_segments(_c4("calibration"), tokenizer, samples, seqlen, generator))
    name, ids = _joined_ids(source, tokenizer, "calibration", at_least=seqlen)
    starts = torch.randint(0, len(ids) - seqlen + 1, (samples,), generator=generator)
    return TokenSet(name, torch.stack([ids[start : start + seqlen] for start in starts.tolist()]))


def evaluation_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seqlen: int = 2048,
    limit: int | None = None,
    seed: int = 0,
    model: PreTrainedModel | None = None,
) -> TokenSet:
    """Cut a text into consecutive windows of `seqlen` tokens, the first `limit` of them; a last short one is dropped.

    Sources are those of `calibration_tokens`, on held-out parts: the test split of WikiText-2; the first 1100
    documents of C4's validation split joined by spaces (GPTQ's "c4-new"); and, for "self", `limit` texts (16 if None)
    from a random stream that no calibration seed has. `seed` matters for "self" only. One more source, "c4-legacy",
    is what the scripts of GPTQ and OmniQuant call "c4": 256 random segments of random documents of the same validation
    split. Tokenization is as in `calibration_tokens`.

    Raises:
        AbqError: as `calibration_tokens`.
    """
    _check_lengths(seqlen, limit=limit, model=model)
    if str(source) == "self":
        generator = _generator(seed, "evaluation")
        windows = SELF_WINDOWS if limit is None else limit
        return TokenSet("self", _sample_text(_needed(model), tokenizer, windows, seqlen, generator))
    if str(source) == "c4-legacy":
        windows = min(C4_LEGACY_WINDOWS, limit or C4_LEGACY_WINDOWS)
        return TokenSet("c4-legacy", _legacy_segments(_c4("evaluation"), tokenizer, windows, seqlen))
    name, ids = _joined_ids(source, tokenizer, "evaluation", at_least=seqlen)
    windows = len(ids) // seqlen
    return TokenSet(name, ids[: windows * seqlen].view(windows, seqlen)[:limit].clone())


def _generator(seed: int, split: Split) -> torch.Generator:
    """A generator whose stream depends on the split too, so that held-out "self" text is never calibration text."""
    digest = hashlib.sha256(f"{split} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _check_lengths(seqlen: int, *, model: PreTrainedModel | None, **counts: int | None) -> None:
    for name, value in (*counts.items(), ("seqlen", seqlen)):
        if value is not None and value <= 0:
            raise AbqError(f"{name} is {value}, it must be at least 1")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) if model is not None else None
    if longest is not None and seqlen > longest:
        raise AbqError(f"seqlen is {seqlen}, the model takes at most {longest} tokens")


def _needed(model: PreTrainedModel | None) -> PreTrainedModel:
    if model is None:
        raise AbqError("source 'self' is text sampled from the model: pass the model")
    return model


def _joined_ids(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, split: Split, at_least: int
) -> tuple[str, torch.Tensor]:
    """Name and token ids (int64 [length]) of the whole joined text of a source."""
    if str(source) == "wikitext2":
        name = "wikitext2"
        text = "\n\n".join(_wikitext2("train" if split == "calibration" else "test"))
    elif str(source) == "c4":
        name, text = "c4", " ".join(_c4(split)[:C4_EVALUATION_DOCUMENTS])
    else:
        name, text = Path(source).name, _file_text(source)
    ids = _ids(text, tokenizer)
    if len(ids) < at_least:
        raise AbqError(f"{source}: {len(ids)} tokens, need at least {at_least}")
    return name, ids


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    # verbose=False: no warning that a text is longer than the model takes, it is cut into windows afterwards
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _document_segments(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seqlen: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """One random segment from each of the first `samples` documents, in random order, longer than `seqlen`."""
    segments: list[torch.Tensor] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        ids = _ids(documents[index], tokenizer)
        if len(ids) > seqlen:
            start = int(torch.randint(0, len(ids) - seqlen, (), generator=generator))
            segments.append(ids[start : start + seqlen])
        if len(segments) == samples:
            return torch.stack(segments)
    raise AbqError(f"c4: {len(segments)} documents are longer than {seqlen} tokens, need {samples}")


def _legacy_segments(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, windows: int, seqlen: int
) -> torch.Tensor:
    """Random segments of random documents longer than `seqlen`: int64 [windows, seqlen].

    Published figures hang on the very draws of Python's generator, seeded with 0: document after document until one
    is long enough, then where in it the segment starts.
    """
    generator = random.Random(0)
    segments: list[torch.Tensor] = []
    for _ in range(C4_LEGACY_TRIES):
        ids = _ids(documents[generator.randint(0, len(documents) - 1)], tokenizer)
        if len(ids) > seqlen:
            start = generator.randint(0, len(ids) - seqlen - 1)
            segments.append(ids[start : start + seqlen])
        if len(segments) == windows:
            return torch.stack(segments)
    raise AbqError(f"c4-legacy: of {C4_LEGACY_TRIES} random documents, {len(segments)} are longer than {seqlen} tokens")


def _wikitext2(split: str) -> list[str]:
    return list(_hub_dataset("wikitext2", "Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)["text"])


def _c4(split: Split) -> Sequence[str]:
    files = {"part": C4_FILES[split]}
    texts: Sequence[str] = _hub_dataset("c4", "allenai/c4", data_files=files, split="part")["text"]
    return texts


def _hub_dataset(source: str, repository: str, **options: Any) -> Any:
    hint = "pass a text file instead, or 'self' to use the model's own text"
    try:
        import datasets
    except ImportError as error:
        raise AbqError(f"{source!r} needs the package 'datasets', which is not installed: {hint}") from error
    try:
        return datasets.load_dataset(repository, **options)
    except (OSError, ValueError, RuntimeError) as error:  # offline, not cached, or changed on the hub
        reason = " ".join(str(error).split())
        raise AbqError(f"{source!r} cannot be downloaded ({reason}): {hint}") from error


def _file_text(source: str | Path) -> str:
    path = Path(source).expanduser()
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file, and it is not one of 'wikitext2', 'c4', 'self'"
        raise AbqError(f"{source}: {what}")
    try:
        with path.open(encoding="utf-8") as lines:  # iterating a file splits at newlines only, unlike splitlines()
            if path.suffix.lower() in JSON_LINES:
                rows = [_text_of(line, f"{source}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
            else:
                rows = [line if line.strip() else "" for line in lines]
    except UnicodeDecodeError as error:
        raise AbqError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise AbqError(f"{source}: {error.strerror}") from error
    if not any(rows):
        raise AbqError(f"{source}: no text in it")
    return "\n\n".join(rows)


def _text_of(line: str, where: str) -> str:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise AbqError(f"{where}: not a line of JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise AbqError(f'{where}: not an object with a "text" string')
    return document["text"]


@torch.no_grad()  # not inference_mode: calibration feeds these tokens through autograd
def _sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seqlen: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Ancestral sampling with a KV cache: int64 [samples, seqlen] on the CPU, the first column is the start token.

    EOS, other special tokens and ids that the tokenizer does not know are never drawn, so that no text ends early.
    On a CPU with AVX-512 the model runs in bfloat16 (2x faster than float32, 3x than float16), elsewhere in its own
    dtype. The result is reproducible on the same kind of device and software, not across them.
    """
    weights = {}
    if model.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        weights = {name: weight.to(torch.bfloat16) for name, weight in model.named_parameters()}
    ordinary = _ordinary_tokens(model, tokenizer)
    if tokenizer.bos_token_id is None:
        start = ordinary.nonzero()[:, 0]
        first = start[torch.randint(len(start), (samples, 1), generator=generator)]
    else:
        first = torch.full((samples, 1), tokenizer.bos_token_id)
    forbidden = ~ordinary.to(model.device)

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    texts = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling tokens", total=samples * (seqlen - 1))
        for tokens in first.split(max(1, min(SELF_BATCH_ROWS, SELF_BATCH_TOKENS // seqlen))):
            text, cache = [tokens], None
            while len(text) < seqlen:
                inputs = {"input_ids": tokens.to(model.device), "past_key_values": cache, "use_cache": True}
                output = functional_call(model, weights, (), inputs)
                cache = output.past_key_values
                tokens = _draw(output.logits[:, -1].masked_fill(forbidden, -torch.inf), generator).cpu()
                text.append(tokens)
                progress.advance(task, len(tokens))
            texts.append(torch.cat(text, dim=1))
    return torch.cat(texts)


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Inverse-CDF sampling: logits [rows, vocabulary] -> int64 [rows, 1]. Far cheaper than torch.multinomial."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    # A float32 u is at most 1 - 2^-24, so u * total stays below total; right=True never lands on a zero probability.
    u = torch.rand(len(logits), 1, generator=generator).to(logits.device, torch.float64)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)


def _ordinary_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """bool [vocabulary of the model]: known to the tokenizer and neither special nor an end of text."""
    embedding: Any = model.get_input_embeddings()
    ordinary = torch.arange(len(embedding.weight)) < len(tokenizer)
    end = model.generation_config.eos_token_id
    special = {*tokenizer.all_special_ids, *(end if isinstance(end, list) else [end])}
    special |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ordinary[[token_id for token_id in special if token_id is not None and token_id < len(ordinary)]] = False
    return ordinary
