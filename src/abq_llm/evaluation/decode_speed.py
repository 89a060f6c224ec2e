"""How fast a model writes: milliseconds a token, one sequence, by the CPU engine or by Transformers.

The floor is the time that reading once what a token needs takes at the device's bandwidth: the packed linears, the head
in 16 bits, and the cache at the mean length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abq_llm.engine.cpu import CpuEngine, unsupported
from abq_llm.head import head_bits
from abq_llm.linear import QuantLinear

ENGINES = ("cpu", "transformers")
SEED = 0


@dataclass(frozen=True)
class Row:
    """One model by one engine."""

    model: str
    scheme: str  # or the dtype of a model that is not packed
    head_bits: int
    engine: str
    tokens_per_s: float  # 1000 / ms_per_token
    ms_per_token: float  # the median
    ms_range: tuple[float, float]  # the fastest and the slowest token
    prefill_tokens_per_s: float
    prompt_tokens: int
    tokens: int
    peak_memory_bytes: int | None  # of the process while it ran, or of the GPU; None where it cannot be known
    floor_ms: float
    fraction_of_floor: float  # floor_ms / ms_per_token


def cannot(model: PreTrainedModel, engine: str, length: int) -> str | None:
    """Why `engine` cannot run `model` on `length` tokens, or None."""
    return unsupported(model, length) if engine == "cpu" else None


def measure(
    model: PreTrainedModel,
    engine: str,
    *,
    name: str,
    prompt: int,
    tokens: int,
    bandwidth: float,
    progress: Callable[[], None] = lambda: None,
) -> Row:
    """Read `prompt` random tokens, then write `tokens` greedily, each one timed; bandwidth in bytes a second."""
    device = model.device
    _reset_peak(device)
    random = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.config.vocab_size, (prompt,), generator=random).to(device)
    step = CpuEngine(model, prompt + tokens) if engine == "cpu" else _Transformers(model)
    step(ids[:1])  # prepares the weights
    step.truncate(0)
    token, prefill = _timed(step, ids)
    times = []
    for _ in range(tokens):
        token, seconds = _timed(step, token)
        times.append(1e3 * seconds)
        progress()
    ms = statistics.median(times)
    floor = 1e3 * bytes_per_token(model, prompt + tokens // 2) / bandwidth
    head: nn.Module = model.get_output_embeddings()  # type: ignore[assignment]
    packed = [module for module in model.modules() if isinstance(module, QuantLinear) and module is not head]
    return Row(
        model=name,
        scheme=str(packed[0].scheme) if packed else str(model.dtype).removeprefix("torch."),
        head_bits=head_bits(model),
        engine=engine,
        tokens_per_s=1e3 / ms,
        ms_per_token=ms,
        ms_range=(min(times), max(times)),
        prefill_tokens_per_s=prompt / prefill,
        prompt_tokens=prompt,
        tokens=tokens,
        peak_memory_bytes=_peak(device),
        floor_ms=floor,
        fraction_of_floor=floor / ms,
    )


def bytes_per_token(model: PreTrainedModel, context: int) -> float:
    """What writing one token behind `context` others has to read."""
    config: Any = model.config
    size = 0.0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            size += sum(tensor.nbytes for tensor in module.packed_weight())
        elif isinstance(module, nn.Linear):
            size += 2 * module.weight.numel()
    formats = [getattr(module, "kv_format", None) for module in model.modules() if hasattr(module, "layer_idx")]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    bits = formats[0].bits if formats and formats[0] else 16
    return size + config.num_hidden_layers * context * 2 * heads * width * bits / 8


class _Transformers:
    """A Transformers model with its cache, called as the engine is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        output = self._model(tokens[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[0, -1]
        return logits

    def truncate(self, length: int) -> None:
        assert length == 0
        self._cache = None


def _timed(step: Callable[[Tensor], Tensor], tokens: Tensor) -> tuple[Tensor, float]:
    """The most likely next token [1], and the seconds until it was known."""
    started = time.perf_counter()
    token = step(tokens).argmax(-1, keepdim=True)
    token.tolist()  # waits for a GPU
    return token, time.perf_counter() - started


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
