"""Loading of unquantized models: a hub id, a local Hugging Face directory, or a .gguf file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from abq_llm.errors import AbqError


def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype | Literal["auto"] = "auto", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, with its tokenizer.

    Args:
        name_or_path: a local directory with a config.json, a .gguf file (its weights are dequantized), or a hub id.
        dtype: dtype of the weights; "auto" is the checkpoint's own, and float16 for a .gguf file.
        device: where the weights go.

    Raises:
        AbqError: nothing is there, it is not a causal language model, it cannot be read, or it lacks weights.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"dtype": dtype}
    source, gguf = name, path.suffix.lower() == ".gguf"
    if gguf:
        if not path.is_file():
            raise AbqError(f"{name}: no such file")
        source = str(path.parent)
        options["gguf_file"] = path.name
        options["quantization_config"] = GgufConfig(dequantize=True)
        options["dtype"] = torch.float16 if dtype == "auto" else dtype
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise AbqError(f"{name}: not a model directory, it has no config.json")
        source = str(path)
    elif path.exists():
        raise AbqError(f"{name}: not a model; expected a directory, a .gguf file or a hub id")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise AbqError(f"{name}: no such file or directory")

    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **({"gguf_file": path.name} if gguf else {}))
    except Exception as error:  # every reader below raises its own types: OSError, SafetensorError, KeyError ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AbqError(f"{name}: cannot be loaded as a model: {reason}") from error
    model, info = loaded
    if info["missing_keys"]:  # Transformers only warns, and fills them with random numbers
        missing = sorted(info["missing_keys"])
        raise AbqError(f"{name}: {len(missing)} weights are missing from the checkpoint, the first is {missing[0]!r}")
    if gguf:
        _forget_gguf(model, tokenizer, path)
    return model.to(device).eval(), tokenizer


def _forget_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Make a dequantized GGUF model a plain one, so that saving it writes an ordinary checkpoint."""
    for stale in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, stale):
            delattr(model.config, stale)
    model.name_or_path = model.config._name_or_path = str(path)
    # Transformers 5.17 gives the tokenizer of a .gguf file BOS as its EOS, and no padding; the config is right.
    for role in ("bos", "eos", "unk", "pad"):
        token_id = getattr(model.config, f"{role}_token_id", None)
        if isinstance(token_id, int) and token_id != getattr(tokenizer, f"{role}_token_id"):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and warnings of Transformers and of the hub client from the terminal; errors still raise."""
    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # 5.17 draws a GGUF bar that its own switch does not reach
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
