"""Equivalent transformations beyond a scale, of the same pairs and in the same way as in `calibration.transforms`.

    shift   x' = x - delta             b' = b + W delta      (Outlier Suppression+, 2023; learned in OmniQuant, 2024)
    mix     x' = (I + P)^-1 x          W' = W (I + P)        a matrix for each head (AffineQuant, 2024)

Both fold into their neighbours, so nothing of them is left at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abq_llm.architectures.table import NormPair, Pair, Part, QueryKeyPair, ValueOutputPair
from abq_llm.calibration.transforms import (
    Parameters,
    change_rows,
    consumers,
    is_norm,
    module_of,
    row_count,
    spread,
    with_rows,
)

DOMINANCE = 0.9  # the largest row sum of |P|: I + P is strictly diagonally dominant, so it has an inverse
DOUBLINGS = 7  # of the terms of its series; what is left out is below 0.9^256 = 2e-12


def can_shift(pair: Pair, parameters: Parameters) -> bool:
    """Whether there are biases to fold delta into, on both sides, and nothing but a sum of weight one in between.

    What a norm feeds besides linears (`kept`) is not touched: it would have to be told of delta, so there is none.
    """
    if not isinstance(pair, NormPair | ValueOutputPair) or (isinstance(pair, NormPair) and pair.kept):
        return False
    return all(f"{name}.bias" in parameters for name in (module_of(_producer(pair)), *consumers(pair)))


def initial_shift(
    pair: Pair, parameters: Parameters, high: dict[str, Tensor], low: dict[str, Tensor], head_dim: int
) -> Tensor:
    """delta = (max + min) / 2 of each channel of the pair, 0 where that is not finite.

    `high` and `low` are of each linear's input, [K]. Query heads that share a value head share delta.
    """
    name, channels = consumers(pair)[0], row_count(parameters, _producer(pair))
    top, bottom = high[name], low[name]
    if len(top) != channels:
        top = top.view(channels // head_dim, -1, head_dim).amax(1).flatten()
        bottom = bottom.view(channels // head_dim, -1, head_dim).amin(1).flatten()
    delta = (top + bottom) / 2
    return torch.where(delta.isfinite(), delta, 0)


def shift(pair: Pair, parameters: Parameters, delta: Tensor, head_dim: int) -> Parameters:
    """Take delta off the producer's output and give the consumers' biases what it was worth to them.

    Exact behind attention too: the weights of a token's values sum to one.
    """
    changed = dict(parameters)
    producer = f"{module_of(_producer(pair))}.bias"
    changed[producer] = with_rows(parameters[producer], _producer(pair), lambda bias: bias - delta)
    for name in consumers(pair):
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        changed[f"{name}.bias"] = bias + weight @ spread(delta, weight.shape[1], head_dim)
    return changed


def storable_shift(pair: Pair, parameters: Parameters, delta: Tensor, log_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The delta for which a norm's new bias (bias - delta) / s is exact in `dtype`; others come back as they are."""
    if not isinstance(pair, NormPair):
        return delta
    bias, scale = parameters[f"{pair.norm}.bias"], log_scale.exp()
    return bias - scale * ((bias - delta) / scale).to(dtype).float()


def mixed_heads(pair: Pair, parameters: Parameters, head_dim: int) -> int:
    """How many matrices [d, d] `mix` takes: one for each value or key head; 0 if a matrix would not be exact.

    RoPE lies between queries and keys, and commutes with no matrix but a scale and a turn of each rotated pair; where
    it turns a part of each head, there is no matrix either. Nor between norms.
    """
    if isinstance(pair, ValueOutputPair):
        return row_count(parameters, pair.value) // head_dim
    if isinstance(pair, QueryKeyPair) and not pair.rotary and not is_norm(parameters, pair.key):
        return row_count(parameters, pair.key) // head_dim
    return 0


def mix(pair: Pair, parameters: Parameters, P: Tensor) -> Parameters:
    """Multiply the values or keys of each head by (I + P)^-1, and what they meet by I + P. P is [heads, d, d]."""
    heads, d, _ = P.shape
    matrix = dominant(P)
    changed = dict(parameters)
    if isinstance(pair, ValueOutputPair):
        _mix_rows(changed, pair.value, inverse(matrix))
        columns = changed[f"{pair.output}.weight"].unflatten(1, (heads, -1, d))
        changed[f"{pair.output}.weight"] = torch.einsum("nhgi,hij->nhgj", columns, matrix).flatten(1)
    else:
        assert isinstance(pair, QueryKeyPair)
        _mix_rows(changed, pair.key, inverse(matrix))
        groups = row_count(changed, pair.query) // (heads * d)
        _mix_rows(changed, pair.query, matrix.mT.repeat_interleave(groups, 0))
    return changed


def dominant(P: Tensor) -> Tensor:
    """I + P, with rows of P whose |entries| sum to more than `DOMINANCE` scaled down to it."""
    rows = P.abs().sum(-1, keepdim=True)
    return torch.eye(P.shape[-1], device=P.device) + P * (DOMINANCE / rows.clamp_min(DOMINANCE))


def inverse(matrix: Tensor) -> Tensor:
    """(I - N)^-1 = I + N + N^2 + ... = (I + N)(I + N^2)(I + N^4) ..., of a `dominant` matrix I - N.

    As accurate as LU, and unlike it nothing but products, which a CUDA graph can capture.
    """
    eye = torch.eye(matrix.shape[-1], device=matrix.device)
    N = eye - matrix
    total = eye + N
    for _ in range(DOUBLINGS):
        N = N @ N
        total = total + total @ N
    return total


def _producer(pair: Pair) -> Part:
    assert isinstance(pair, NormPair | ValueOutputPair)
    return pair.norm if isinstance(pair, NormPair) else pair.value


def _mix_rows(parameters: Parameters, part: Part, matrices: Tensor) -> None:
    """matrices [heads, d, d] @ the rows [heads * d, ...] of a linear or of a part of it, head by head."""
    change_rows(parameters, part, lambda rows: (matrices @ rows.view(*matrices.shape[:2], -1)).view(rows.shape))
