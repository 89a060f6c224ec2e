"""`abq generate`: stream an answer."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abq_llm.cli.common import JsonFile, check_json, open_model, quiet_libraries, write_json
from abq_llm.errors import AbqError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Packed directory, or any other model.")],
    prompt: str,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template of the model.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Continue PROMPT greedily on stdout; tokens per second go to stderr."""
    check_json(json_file)
    from abq_llm.devices import pick_device

    quiet_libraries()
    model, tokenizer = open_model(str(directory), device=pick_device("auto"))
    tokens, seconds = stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat)
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.2f} tokens/s", file=sys.stderr)
    write_json(json_file, {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds})


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, max_new_tokens: int, chat: bool
) -> tuple[int, float]:
    """Print the greedy continuation of `prompt` as it comes.

    Returns:
        How many tokens were generated, and the seconds that reading the prompt and generating them took.
    """
    from transformers import TextStreamer

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
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    write: Any = model.generate
    started = time.monotonic()
    output = write(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=end[0] if isinstance(end, list) else end,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **greedy,
    )
    return output.shape[1] - length, time.monotonic() - started
