"""`BlockTask`: everything a method may know about the block it quantizes, and the forward passes it may run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from abq_llm.architectures import Architecture
from abq_llm.attention import record_attention
from abq_llm.calibration.losses import relative_mse
from abq_llm.calibration.transforms import Parameters, block_parameters
from abq_llm.modules import LinearExperts
from abq_llm.quantizers import QParams, fake_quantize, fake_quantize_dynamic, from_groups, to_groups
from abq_llm.scheme import Scheme


@dataclass
class BlockTask:
    """One block to quantize. `block` is fp32 on `device`; the streams are fp32 [samples, tokens, hidden] and may
    live elsewhere.
    """

    block: nn.Module
    index: int
    count: int
    architecture: Architecture
    scheme: Scheme
    fp_stream: Tensor
    quantized_stream: Tensor
    call: dict[str, Any]  # the other arguments of the block's forward
    device: torch.device
    storage_dtype: torch.dtype  # of what is not quantized: norms, biases
    scale_dtype: torch.dtype
    seed: int
    batch_size: int
    autocast: torch.dtype | None
    report: Callable[[str, float | None], None]
    block_loss: float | None = field(default=None)

    @cached_property
    def fp_output(self) -> Tensor:
        """The fp block on the fp stream; must be asked for before the block is changed."""
        return self.forward_stream(self.fp_stream, quantized=False)

    def generator(self) -> torch.Generator:
        """A new one that the seed and the block decide."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.index)

    @property
    def attention(self) -> nn.Module:
        return self.block.get_submodule(self.architecture.attention)

    @property
    def head_dim(self) -> int:
        return int(self.attention.head_dim)  # type: ignore[arg-type]

    @property
    def experts(self) -> LinearExperts | None:
        """The experts of the block, if it has any. Which tokens they run on depends on values."""
        return next((module for module in self.block.modules() if isinstance(module, LinearExperts)), None)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears to quantize, by their names in the table."""
        return {name: self.block.get_submodule(name) for name in self.architecture.linears}  # type: ignore[misc]

    def forward(self, hidden: Tensor, parameters: Parameters | None = None, *, quantized: bool) -> Tensor:
        """hidden [B, T, H] -> [B, T, H], with other parameters if given; `quantized`: activations and KV as in the
        scheme.
        """
        with (
            quantized_inputs(self.linears, self.attention, self.scheme if quantized else None),
            torch.autocast(
                self.device.type,
                self.autocast or torch.bfloat16,
                enabled=self.autocast is not None,
                cache_enabled=False,
            ),
        ):
            out = functional_call(self.block, parameters or {}, (hidden,), self.call)
        return out[0] if isinstance(out, tuple) else out

    def batches(self, stream: Tensor) -> Iterator[slice]:
        """Slices of a stream for passes without gradients: as many samples at a time as make 16k tokens."""
        size = max(self.batch_size, 2**14 // stream.shape[1])
        return (slice(start, start + size) for start in range(0, len(stream), size))

    @torch.no_grad()
    def forward_stream(self, stream: Tensor, *, quantized: bool) -> Tensor:
        """The whole stream through the block, batch by batch -> a stream in the same place."""
        out = torch.empty_like(stream)
        for part in self.batches(stream):
            out[part] = self.forward(stream[part].to(self.device), quantized=quantized).float()
        return out

    @torch.no_grad()
    def queries_and_keys(self, stream: Tensor, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
        """[samples, heads, tokens, d] and [samples, kv_heads, tokens, d] as they meet in the fp block on `stream`."""
        pairs = []
        for part in self.batches(stream):
            with record_attention(self.attention) as records:
                self.forward(stream[part].to(self.device), quantized=False)
            pairs.append(tuple(x.to(stream.device, dtype) for x in (records[0].query, records[0].key)))
        queries, keys = zip(*pairs, strict=True)
        return torch.cat(queries), torch.cat(keys)


@contextmanager
def quantized_inputs(linears: dict[str, nn.Linear], attention: nn.Module, scheme: Scheme | None) -> Iterator[None]:
    """Within, every linear sees its input quantized per token, and attention its keys and values (None: as they
    are).
    """
    if scheme is None:
        yield
        return
    last: list[tuple[Tensor, Tensor]] = []  # q, k and v are given one tensor: quantize it once

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if not last or last[0][0] is not args[0]:
            last[:] = [(args[0], fake_quantize_dynamic(args[0], scheme.activation))]
        return (last[0][1],)

    handles = [linear.register_forward_pre_hook(hook) for linear in linears.values()]
    attention.kv_format = scheme.kv  # type: ignore[assignment]
    try:
        yield
    finally:
        del attention.kv_format
        for handle in handles:
            handle.remove()


@dataclass
class InputStatistics:
    """Per channel of each linear's input, fp32 [K]: the largest and the smallest x, the largest |x| (`peak`) and the
    mean of x^2 (`energy`).

    `output` is the stream that left the block meanwhile.
    """

    high: dict[str, Tensor]
    low: dict[str, Tensor]
    energy: dict[str, Tensor]
    output: Tensor

    @cached_property
    def peak(self) -> dict[str, Tensor]:
        return {name: torch.maximum(high, -self.low[name]) for name, high in self.high.items()}


@torch.no_grad()
def input_statistics(task: BlockTask, stream: Tensor) -> InputStatistics:
    """What the linears of the fp block see on `stream`; as "queries" and "keys", those that meet in attention."""
    high: dict[str, Tensor] = {}
    low: dict[str, Tensor] = {}
    energy: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    output = torch.empty_like(stream)

    def see(name: str, x: Tensor) -> None:
        x = x.float().reshape(-1, x.shape[-1])
        high[name] = torch.maximum(high[name], x.amax(0)) if name in high else x.amax(0)
        low[name] = torch.minimum(low[name], x.amin(0)) if name in low else x.amin(0)
        energy[name] = energy.get(name, 0) + x.square().sum(0)
        tokens[name] = tokens.get(name, 0) + len(x)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0])

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in task.linears.items()]
    try:
        for part in task.batches(stream):
            hidden = stream[part].to(task.device)
            with record_attention(task.attention) as records:
                output[part] = task.forward(hidden, quantized=False).float()
            for name, x in (("queries", records[0].query), ("keys", records[0].key)):
                see(name, x.transpose(1, 2).flatten(2))
    finally:
        for handle in handles:
            handle.remove()
    return InputStatistics(high, low, {name: total / tokens[name] for name, total in energy.items()}, output)


@torch.no_grad()
def output_error(task: BlockTask, grids: dict[str, QParams], target: Tensor) -> float:
    """Relative squared error to `target` of the block as it will run, on `grids` and on the quantized stream."""
    assert task.scheme.weight is not None
    parameters, total = block_parameters(task.block), 0.0
    for name, grid in grids.items():
        weight = parameters[f"{name}.weight"]
        fake = fake_quantize(to_groups(weight, task.scheme.group_size), grid, task.scheme.weight)
        parameters[f"{name}.weight"] = from_groups(fake, weight.shape[1])
    for part in task.batches(task.quantized_stream):
        output = task.forward(task.quantized_stream[part].to(task.device), parameters, quantized=True)
        total += float(relative_mse(output, target[part].to(task.device))) * len(output)
    return total / len(target)
