"""The integer-only operators of I-LLM (Hu et al., 2024, arXiv:2405.17849): int64 tensors in, int64 tensors out.

A number is a code, already less its zero point, times the dyadic scale of its row:

    x = codes m / 2^k        m and k integers

Sums and products stay as wide as they come out. `quantize` brings them back to a few bits, on a range that it takes
from themselves: `matmul` and it are DI-MatMul (equations 2 to 8). Where this differs from the paper is in
docs/methods/i_llm.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from abq_llm.scheme import IntFormat

SCALE_BITS = 8  # of the m that `quantize` chooses, as in the paper
WIDE_SCALE_BITS = 16  # of an m that is the product of others
MAX_SHIFT = 32  # the k that `quantize` chooses: steps are at least 2^(SCALE_BITS - 1 - MAX_SHIFT)
GUARD_BITS = 8  # below the last bit of the coarsest of several scales that become one
FRACTION = 15  # bits behind the point of exponentials and sigmoids
CLIP = 15  # c: scores further than that below the largest of their row count as that far (section 3.4)


class Dyadic(NamedTuple):
    """codes m / 2^k: int64 codes [..., K]; m > 0 and k int64 [..., 1]."""

    codes: Tensor
    m: Tensor
    k: Tensor


class Fixed(NamedTuple):
    """Constants codes / 2^k: int64 codes of any shape and at most 24 bits, k int64 []."""

    codes: Tensor
    k: Tensor


def shift(x: Tensor, k: Tensor) -> Tensor:
    """x / 2^k for k of either sign, to nearest, ties up."""
    right, left = k.clamp(0, 62), (-k).clamp(0, 62)
    return ((x << left) + ((1 << right) >> 1)) >> right


def divide(x: Tensor, y: Tensor | int) -> Tensor:
    """x / y for y > 0, to nearest, ties up."""
    return (x + y // 2) // y


def log2_floor(x: Tensor) -> Tensor:
    """The place of the highest bit of x >= 1."""
    place = torch.zeros_like(x)
    for bits in (32, 16, 8, 4, 2, 1):
        place = place + bits * ((x >> (place + bits)) > 0)
    return place


def sqrt_floor(x: Tensor) -> Tensor:
    """floor(sqrt(x)) of 0 <= x < 2^62, bit by bit from the highest (I-SQRT in algorithm 4)."""
    root = torch.zeros_like(x)
    for bit in range(30, -1, -1):
        longer = root + (1 << bit)
        root = torch.where(longer * longer <= x, longer, root)
    return root


def shorten(m: Tensor, k: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The scale m / 2^k, m >= 1, rounded up to an m of `bits` bits or 2^bits."""
    excess = log2_floor(m) - (bits - 1)
    return -((-m << (-excess).clamp_min(0)) >> excess.clamp_min(0)), k - excess


def quantize(x: Dyadic, fmt: IntFormat) -> Dyadic:
    """x, with an m of at most 16 bits, to codes of `fmt` on the range of each row, which always holds zero.

    As in `quantizers.py`, the codes follow from the rounded scale; it is rounded up, so that nothing is clipped.
    """
    hi, lo = x.codes.amax(-1, keepdim=True).clamp_min(0), x.codes.amin(-1, keepdim=True).clamp_max(0)
    fixed = fmt.fixed_zero_point
    extent = (hi - lo if fixed is None else torch.maximum(hi, -lo)).clamp_min(1)
    steps = fmt.qmax if fixed is None else max(fmt.qmax - fixed, 1)
    extent_m, extent_k = shorten(extent, x.k, 32)
    m, k = shorten(divide(extent_m * x.m, steps), extent_k, SCALE_BITS)
    m, k = torch.where(k > MAX_SHIFT, 1 << (SCALE_BITS - 1), m), k.clamp_max(MAX_SHIFT)
    drop = (log2_floor(extent) - 40).clamp_min(0)  # so that the product with x.m fits
    codes = divide(shift(shift(x.codes, drop) * x.m, x.k - drop - k), m)
    zero = (-codes.amin(-1, keepdim=True)).clamp(0, fmt.qmax) if fixed is None else fixed
    return Dyadic((codes + zero).clamp(0, fmt.qmax) - zero, m, k)


def matmul(x: Dyadic, weight: Tensor, scale: Fixed, group_size: int | None, bias: Fixed | None) -> Dyadic:
    """x [..., K] and weight [N, K] of at most 8 bits, scale [N, groups], bias [N] -> [..., N]."""
    size = group_size or weight.shape[1]
    total = torch.zeros((), dtype=torch.int64)
    for group, (a, b) in enumerate(zip(x.codes.split(size, -1), weight.split(size, 1), strict=True)):
        total = total + (a @ b.T) * scale.codes[:, group]
    y = Dyadic(total, x.m, x.k + scale.k)
    return y if bias is None else add_constant(y, bias)


def add_constant(x: Dyadic, constant: Fixed) -> Dyadic:
    """x [..., N] + constant [N]."""
    k = torch.minimum(x.k, constant.k + 30)  # a scale so fine that the constant would not fit loses its last bits
    return Dyadic(shift(x.codes, x.k - k) + divide(shift(constant.codes, constant.k - k), x.m), x.m, k)


def add(x: Dyadic, y: Dyadic) -> Dyadic:
    """x + y, both of at most 16 bits."""
    k = torch.minimum(x.k, y.k) + GUARD_BITS
    codes = shift(x.codes * x.m, x.k - k) + shift(y.codes * y.m, y.k - k)
    return Dyadic(codes, torch.ones_like(k), k)


def on_one_scale(x: Dyadic, dim: int) -> tuple[Tensor, Tensor]:
    """x, of at most 16 bits, as codes / 2^k with one k for all rows along `dim`."""
    k = x.k.amin(dim, keepdim=True) + GUARD_BITS
    return shift(x.codes * x.m, x.k - k), k


def exp(x: Dyadic) -> Tensor:
    """DI-Exp (algorithm 1): e^x of codes <= 0 as int64 with `FRACTION` bits behind the point.

    e^x = 2^-q 2^-f with q + f = -x log2 e, where log2 e is 1 + 1/2 - 1/16 and 2^-f is 1 - f / 2.
    """
    y = -x.codes * x.m
    y = shift(y + (y >> 1) - (y >> 4), x.k - FRACTION)
    q, f = y >> FRACTION, y & ((1 << FRACTION) - 1)
    return ((1 << FRACTION) - (f >> 1)) >> q.clamp_max(62)


def clipped_softmax(scores: Dyadic, mask: Tensor, fmt: IntFormat) -> Dyadic:
    """DI-ClippedSoftmax (algorithm 2, equation 10): scores [..., T, S] and which of them take part, bool [..., T, S]
    -> probabilities. Clipped scores and probabilities are codes of `fmt`.
    """
    m, k = shorten(scores.m, scores.k, WIDE_SCALE_BITS)
    largest = scores.codes.masked_fill(~mask, -(1 << 62)).amax(-1, keepdim=True)
    limit = shift(divide(torch.full_like(m, CLIP << 40), m), (40 - k).clamp_min(-32))  # at most 2^61
    below = torch.maximum(scores.codes - largest, -limit).masked_fill(~mask, 0)
    e = exp(quantize(Dyadic(below, m, k), fmt)).masked_fill(~mask, 0)
    total = e.sum(-1, keepdim=True).clamp_min(1)  # 0 in a row of padding, in which nothing takes part
    m, k = shorten(divide(torch.full_like(total, 1 << 60), total), torch.full_like(total, 60), WIDE_SCALE_BITS)
    return quantize(Dyadic(e, m, k), fmt)


def sigmoid(x: Dyadic) -> Tensor:
    """1 / (1 + e^-x) as int64 with `FRACTION` bits behind the point, by DI-Exp of -|x|."""
    e, one = exp(x._replace(codes=-x.codes.abs())), 1 << FRACTION
    return divide(torch.where(x.codes < 0, e, one) << FRACTION, e + one)


def swiglu(gate: Dyadic, up: Dyadic, smooth: Fixed) -> Dyadic:
    """DI-SwiGLU (algorithm 3): g sigma(g / s) u of g = `gate` and u = `up`; smooth [K] holds 1 / s."""
    inner = Dyadic(gate.codes * smooth.codes, gate.m, gate.k + smooth.k)
    return Dyadic(gate.codes * up.codes * sigmoid(inner), gate.m * up.m, gate.k + up.k + FRACTION)


def rms_norm(x: Dyadic, weight: Fixed, eps: Fixed) -> Dyadic:
    """DI-RMSNorm (algorithm 4) of x [..., H] of at most 20 bits: x w sqrt(H) / sqrt(sum x^2 + H eps).

    `weight` [H] holds w sqrt(H), `eps` [] holds sqrt(H eps).
    """
    eps_codes = shift(eps.codes * divide(1 << x.k.clamp_min(0), x.m), eps.k)  # on the scale of x
    squares = (x.codes.square().sum(-1, keepdim=True) + eps_codes.square()).clamp_min(1)
    up = (60 - log2_floor(squares)) & ~1
    root = sqrt_floor(squares << up)  # of 31 bits
    m, k = shorten(divide(torch.full_like(root, 1 << 61), root), 61 + weight.k - up // 2, WIDE_SCALE_BITS)
    return Dyadic(x.codes * weight.codes, m, k)


def layer_norm(x: Dyadic, weight: Fixed, bias: Fixed, eps: Fixed) -> Dyadic:
    """DI-LayerNorm of x [..., H] of at most 16 bits; see `rms_norm`."""
    codes = x.codes << 4  # the mean has bits behind the point
    centered = codes - divide(codes.sum(-1, keepdim=True), codes.shape[-1])
    return add_constant(rms_norm(Dyadic(centered, x.m, x.k + 4), weight, eps), bias)
