"""Equivalent transformations (SmoothQuant, 2023; learned as in OmniQuant, 2024): scales move between neighbours, the
function stays.

A block's parameters are a dict {name: tensor}; `apply` returns a changed dict and never writes in place, so it is
differentiable in the scales. Each pair has a vector s > 0, kept as log s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from abq_llm.architectures.table import LinearPair, NormPair, Pair, Part, QueryKeyPair, Rows, ValueOutputPair

Parameters = dict[str, Tensor]
LOG_LIMIT = 10.0  # s within e^-10 .. e^10


def initial_log_scale(
    pair: Pair, parameters: Parameters, peaks: dict[str, Tensor], head_dim: int, alpha: float
) -> Tensor:
    """log of s = act^alpha / w^(1 - alpha), shifted to mean 0: SmoothQuant's equation 4.

    `peaks` holds the largest |value| per channel of each linear's input, and as "queries" and "keys" those that meet.
    """
    if isinstance(pair, QueryKeyPair):
        scales = row_count(parameters, pair.key) // head_dim  # the number of key heads, or 1 behind norms
        heads = (peaks[name].view(scales, -1, head_dim).amax(1) for name in ("keys", "queries"))
        act, weight = (_over_turned(x, pair.rotary) for x in heads)
    else:
        names = consumers(pair)
        act = torch.stack([peaks[name] for name in names]).amax(0)
        weight = torch.stack([parameters[f"{name}.weight"].abs().amax(0) for name in names]).amax(0)
        if isinstance(pair, ValueOutputPair):
            act, weight = (_over_groups(x, row_count(parameters, pair.value), head_dim) for x in (act, weight))
    log_scale = alpha * act.clamp_min(1e-5).log() - (1 - alpha) * weight.clamp_min(1e-5).log()
    return (log_scale - log_scale.mean()).clamp(-LOG_LIMIT, LOG_LIMIT)


def consumers(pair: Pair) -> tuple[str, ...]:
    """The linears whose input the pair rescales (none for queries and keys)."""
    if isinstance(pair, NormPair):
        return pair.linears
    if isinstance(pair, LinearPair):
        return (pair.consumer,)
    return (pair.output,) if isinstance(pair, ValueOutputPair) else ()


def apply(pair: Pair, parameters: Parameters, log_scale: Tensor, head_dim: int) -> Parameters:
    """Move the scale exp(log_scale) from the producer's output to the consumers' input."""
    scale = log_scale.clamp(-LOG_LIMIT, LOG_LIMIT).exp()
    changed = dict(parameters)
    readers = consumers(pair)
    if isinstance(pair, NormPair):
        _scale_rows(changed, pair.norm, 1 / scale)
        if pair.offset:  # (offset + w) / s - offset = w / s + offset (1 / s - 1)
            changed[f"{pair.norm}.weight"] = changed[f"{pair.norm}.weight"] + pair.offset * (1 / scale - 1)
        readers += pair.kept
    elif isinstance(pair, LinearPair):
        _scale_rows(changed, pair.producer, 1 / scale)
    elif isinstance(pair, ValueOutputPair):
        _scale_rows(changed, pair.value, 1 / scale)
        scale = spread(scale, parameters[f"{pair.output}.weight"].shape[1], head_dim)
    else:
        full = _to_turned(scale, pair.rotary, head_dim)
        _scale_rows(changed, pair.key, 1 / full.flatten())
        _scale_rows(changed, pair.query, _to_query_heads(full, row_count(parameters, pair.query)))
    for name in readers:
        changed[f"{name}.weight"] = changed[f"{name}.weight"] * scale
    return changed


def spread(log_scale: Tensor, channels: int, head_dim: int) -> Tensor:
    """A pair's scale as one per channel of its consumers' input: value channels are shared by several query heads."""
    return log_scale if len(log_scale) == channels else _to_query_heads(log_scale.view(-1, head_dim), channels)


def storable_log_scale(pair: Pair, parameters: Parameters, log_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The log scale for which what is not quantized is exact in `dtype`, so that storing it changes nothing.

    Rounding a norm's weight / s to bf16 would be an error of up to 0.4 %; taking s from the rounded weight instead
    moves it into the linears, before they are quantized. Where no linear can take it, between the norms of queries and
    keys and where a norm also feeds what stays in floating point, s becomes a power of two. Other pairs feed quantized
    linears only and come back as they are. Biases are rounded.
    """
    kept = pair.kept if isinstance(pair, NormPair) else isinstance(pair, QueryKeyPair) and is_norm(parameters, pair.key)
    if kept and dtype != torch.float32:
        return (log_scale / math.log(2)).round() * math.log(2)
    if not isinstance(pair, NormPair):
        return log_scale
    weight = parameters[f"{pair.norm}.weight"] + pair.offset
    rounded = (weight / log_scale.exp() - pair.offset).to(dtype).float() + pair.offset
    return torch.where(rounded * weight > 0, (weight / rounded).log(), torch.where(weight == 0, log_scale, 0))


def row_count(parameters: Parameters, part: Part) -> int:
    """The number of outputs of a module, or of some rows of it."""
    if isinstance(part, Rows):
        return len(parameters[f"{part.linear}.weight"]) // part.period * (part.stop - part.start)
    return len(parameters[f"{part}.weight"])


def is_norm(parameters: Parameters, part: Part) -> bool:
    """Whether a part is a norm: the weight of a norm is a vector."""
    return isinstance(part, str) and parameters[f"{part}.weight"].dim() == 1


def module_of(part: Part) -> str:
    """The module that a part is, or some rows of which it is."""
    return part.linear if isinstance(part, Rows) else part


def with_rows(tensor: Tensor, part: Part, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight or bias of the module of a part, its rows [outputs of the part, ...] changed; not in place."""
    if not isinstance(part, Rows):
        return change(tensor)
    turns = tensor.unflatten(0, (-1, part.period))
    before, rows, behind = turns.split([part.start, part.stop - part.start, part.period - part.stop], 1)
    return torch.cat([before, change(rows.flatten(0, 1)).view(rows.shape), behind], 1).flatten(0, 1)


def change_rows(parameters: Parameters, part: Part, change: Callable[[Tensor], Tensor]) -> None:
    """Put the weight and the bias, if there is one, `with_rows` into the dict."""
    for name in (f"{module_of(part)}.weight", f"{module_of(part)}.bias"):
        if name in parameters:
            parameters[name] = with_rows(parameters[name], part, change)


def _scale_rows(parameters: Parameters, part: Part, factor: Tensor) -> None:
    """Multiply the rows of a linear or of a part of it, or the weight of a norm, and the bias."""
    change_rows(parameters, part, lambda rows: rows * (factor[:, None] if rows.dim() == 2 else factor))


def _over_turned(per_channel: Tensor, rotary: float) -> Tensor:
    """[n, d] -> [n, scales]: the larger of two channels that RoPE turns together."""
    half = int(per_channel.shape[1] * rotary) // 2
    first, second, others = per_channel.split([half, half, per_channel.shape[1] - 2 * half], 1)
    return torch.cat([torch.maximum(first, second), others], 1)


def _to_turned(scale: Tensor, rotary: float, head_dim: int) -> Tensor:
    """[n, scales] -> [n, d]: channels that RoPE turns together have one scale."""
    half = int(head_dim * rotary) // 2
    turned, others = scale.split([half, head_dim - 2 * half], 1)
    return torch.cat([turned, turned, others], 1)


def _to_query_heads(per_kv_head: Tensor, size: int) -> Tensor:
    """[kv_heads, d] -> [heads * d]: each kv head serves heads / kv_heads neighbouring query heads."""
    return per_kv_head.repeat_interleave(size // per_kv_head.numel(), 0).flatten()


def _over_groups(per_query_channel: Tensor, size: int, head_dim: int) -> Tensor:
    """[heads * d] -> [kv_heads * d]: the largest over the query heads that share a kv head."""
    return per_query_channel.view(size // head_dim, -1, head_dim).amax(1).flatten()


def block_parameters(block: nn.Module) -> Parameters:
    """The parameters of a block by name, detached."""
    return {name: parameter.detach() for name, parameter in block.named_parameters()}
