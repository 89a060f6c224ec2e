"""`abq generate`: stream an answer."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abq_llm.cli.common import JsonFile, check_json, open_model, quiet_libraries, write_json
from abq_llm.errors import AbqError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENGINES = ("auto", "cpu", "transformers")


def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Packed directory, or any other model.")],
    prompt: str,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template of the model.")] = False,
    engine: Annotated[
        str, typer.Option(metavar="auto|cpu|transformers", help="What decodes; auto: the CPU engine if it can.")
    ] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Continue PROMPT greedily on stdout; tokens per second, and what made them, go to stderr."""
    check_json(json_file)
    if engine not in ENGINES:
        raise AbqError(f"--engine {engine}: is not one of {', '.join(ENGINES)}")
    from abq_llm.devices import pick_device

    quiet_libraries()
    model, tokenizer = open_model(str(directory), device=pick_device("auto"))
    done = stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat, engine=engine)
    print(done, file=sys.stderr)
    values = {"tokens": done.tokens, "seconds": done.seconds, "tokens_per_s": done.tokens_per_s, "engine": done.engine}
    write_json(json_file, values)


@dataclass(frozen=True)
class Streamed:
    """How many tokens were generated, and the seconds that reading the prompt and generating them took."""

    tokens: int
    seconds: float
    engine: str  # "cpu" or "transformers"

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.seconds:.2f} s, {self.tokens_per_s:.2f} tokens/s ({self.engine})"


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool,
    engine: str = "auto",
) -> Streamed:
    """Print the greedy continuation of `prompt` as it comes. The CPU engine uses `model` up.

    Raises:
        AbqError: the prompt is empty, there is no chat template for `chat`, or engine "cpu" cannot run the model.
    """
    import torch
    from transformers import TextStreamer

    from abq_llm.engine.cpu import CpuEngine, unsupported

    if chat and not tokenizer.chat_template:
        raise AbqError(f"{model.name_or_path}: its tokenizer has no chat template; leave out --chat")
    if chat:
        message = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise AbqError("the prompt is empty")
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    config = model.generation_config
    plain = config.repetition_penalty in (None, 1.0) and not config.no_repeat_ngram_size
    if engine == "cpu" or (engine == "auto" and plain and unsupported(model, length + max_new_tokens) is None):
        fast, prompt_tokens = CpuEngine(model, length + max_new_tokens, use_up=True), inputs["input_ids"][0]
        started = time.monotonic()
        streamer.put(prompt_tokens)
        found = fast.generate(
            prompt_tokens, max_new_tokens, stop=ends, write=lambda token: streamer.put(torch.tensor([token]))
        )
        streamer.end()
        return Streamed(len(found), time.monotonic() - started, "cpu")
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    write: Any = model.generate
    started = time.monotonic()
    output = write(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=ends[0],
        streamer=streamer,
        **greedy,
    )
    return Streamed(output.shape[1] - length, time.monotonic() - started, "transformers")
