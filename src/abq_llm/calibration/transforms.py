"""Equivalent transformations (SmoothQuant, 2023; learned as in OmniQuant, 2024): scales move between neighbours, the
function stays.

A block's parameters are a dict {name: tensor}; `apply` returns a changed dict and never writes in place, so it is
differentiable in the scales. Each pair has a vector s > 0, kept as log s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from abq_llm.architectures.table import LinearPair, NormPair, Pair, QueryKeyPair, ValueOutputPair

Parameters = dict[str, Tensor]
LOG_LIMIT = 10.0  # s within e^-10 .. e^10


def initial_log_scale(
    pair: Pair, parameters: Parameters, peaks: dict[str, Tensor], head_dim: int, alpha: float
) -> Tensor:
    """log of s = act^alpha / w^(1 - alpha), shifted to mean 0: SmoothQuant's equation 4.

    `peaks` holds the largest |value| per channel of each linear's input, and of the queries and keys as they meet,
    under the names of the pair's modules plus ".output".
    """
    if isinstance(pair, QueryKeyPair):
        key, query = peaks[f"{pair.key}.output"], peaks[f"{pair.query}.output"]
        scales = len(parameters[f"{pair.key}.weight"]) // head_dim  # the number of key heads, or 1 behind norms
        act, weight = (x.view(scales, -1, head_dim // (1 + pair.rotary)).amax(1) for x in (key, query))
    else:
        names = consumers(pair)
        act = peaks[names[0]]
        weight = torch.stack([parameters[f"{name}.weight"].abs().amax(0) for name in names]).amax(0)
        if isinstance(pair, ValueOutputPair):
            act, weight = (
                _over_groups(x, parameters[f"{pair.value}.weight"].shape[0], head_dim) for x in (act, weight)
            )
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
    if isinstance(pair, NormPair):
        _scale_rows(changed, pair.norm, 1 / scale)
        incoming = scale
    elif isinstance(pair, LinearPair):
        _scale_rows(changed, pair.producer, 1 / scale)
        incoming = scale
    elif isinstance(pair, ValueOutputPair):
        _scale_rows(changed, pair.value, 1 / scale)
        incoming = spread(scale, parameters[f"{pair.output}.weight"].shape[1], head_dim)
    else:
        full = scale.repeat(1, 1 + pair.rotary)  # RoPE turns (i, i + d/2) together, so both have one scale
        _scale_rows(changed, pair.key, 1 / full.flatten())
        _scale_rows(changed, pair.query, _to_query_heads(full, parameters[f"{pair.query}.weight"].shape[0]))
        return changed
    for name in consumers(pair):
        changed[f"{name}.weight"] = changed[f"{name}.weight"] * incoming
    return changed


def spread(log_scale: Tensor, channels: int, head_dim: int) -> Tensor:
    """A pair's scale as one per channel of its consumers' input: value channels are shared by several query heads."""
    return log_scale if len(log_scale) == channels else _to_query_heads(log_scale.view(-1, head_dim), channels)


def storable_log_scale(pair: Pair, parameters: Parameters, log_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The log scale for which the norms' new weights are exact in `dtype`, so that storing them changes nothing.

    Rounding weight / s to bf16 would be an error of up to 0.4 %; taking s from the rounded weight instead moves it
    into the linears, before they are quantized. Between the norms of queries and keys, where no linear can take it,
    s becomes a power of two. Other pairs feed quantized linears only and come back as they are. Biases are rounded.
    """
    if isinstance(pair, QueryKeyPair) and parameters[f"{pair.key}.weight"].dim() == 1 and dtype != torch.float32:
        return (log_scale / math.log(2)).round() * math.log(2)
    if not isinstance(pair, NormPair):
        return log_scale
    weight = parameters[f"{pair.norm}.weight"]
    rounded = (weight / log_scale.exp()).to(dtype).float()
    return torch.where(rounded * weight > 0, (weight / rounded).log(), torch.where(weight == 0, log_scale, 0))


def _scale_rows(parameters: Parameters, name: str, factor: Tensor) -> None:
    weight = parameters[f"{name}.weight"]
    parameters[f"{name}.weight"] = weight * (factor[:, None] if weight.dim() == 2 else factor)
    if f"{name}.bias" in parameters:
        parameters[f"{name}.bias"] = parameters[f"{name}.bias"] * factor


def _to_query_heads(per_kv_head: Tensor, size: int) -> Tensor:
    """[kv_heads, d] -> [heads * d]: each kv head serves heads / kv_heads neighbouring query heads."""
    return per_kv_head.repeat_interleave(size // per_kv_head.numel(), 0).flatten()


def _over_groups(per_query_channel: Tensor, size: int, head_dim: int) -> Tensor:
    """[heads * d] -> [kv_heads * d]: the largest over the query heads that share a kv head."""
    return per_query_channel.view(size // head_dim, -1, head_dim).amax(1).flatten()


def block_parameters(block: nn.Module) -> Parameters:
    """The parameters of a block by name, detached."""
    return {name: parameter.detach() for name, parameter in block.named_parameters()}
