"""Literal definitions in numpy and Python integers, which share no code with the package: what it is compared with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from abq_llm.linear import QuantLinear
from abq_llm.scheme import IntFormat, Scheme

F32 = np.float32


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """fp32 to the nearest bf16, ties to even: round the upper half of the bits."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) & 0xFFFF0000).astype(np.uint32).view(F32)


ROUNDINGS = {
    torch.float32: lambda x: x,
    torch.float16: lambda x: x.astype(np.float16).astype(F32),
    torch.bfloat16: _to_bfloat16,
}
FORMATS = [
    *(IntFormat(bits) for bits in range(1, 9)),
    *(IntFormat(bits, symmetric=True) for bits in range(1, 9)),
    *(IntFormat(bits, balanced=True) for bits in range(1, 9)),
]


def contract(
    x: np.ndarray, fmt: IntFormat, scale_dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The fp32 contract of quantizers.py for x fp32 [..., K] -> scale, zero point and codes."""
    assert x.dtype == F32
    qmax = 2**fmt.bits if fmt.balanced else 2**fmt.bits - 1
    lo, hi = np.minimum(x.min(-1, keepdims=True), F32(0)), np.maximum(x.max(-1, keepdims=True), F32(0))
    fixed = fmt.balanced or fmt.symmetric
    if fixed:
        scale = np.maximum(hi, -lo) / F32(max(qmax - 2 ** (fmt.bits - 1), 1))
    else:
        scale = (hi - lo) / F32(qmax)
    scale = np.maximum(ROUNDINGS[scale_dtype](scale), F32(2.0**-20))
    r = F32(1) / scale
    zero = np.full_like(scale, 2 ** (fmt.bits - 1)) if fixed else np.clip(np.rint(-lo * r), F32(0), F32(qmax))
    codes = np.clip(np.rint(x * r) + zero, F32(0), F32(qmax))
    assert scale.dtype == r.dtype == zero.dtype == codes.dtype == F32
    return scale, zero, codes


def pack(codes: list[list[int]], planes: int) -> list[list[list[int]]]:
    """Bit k % 32 of word k // 32 of plane i is bit i of code k; words are signed, bits past K are zero."""
    packed = [[[0] * -(-len(row) // 32) for row in codes] for _ in range(planes)]
    for n, row in enumerate(codes):
        for k, code in enumerate(row):
            for plane in range(planes):
                packed[plane][n][k // 32] |= (code >> plane & 1) << k % 32
    return [[[word - 2**32 if word >= 2**31 else word for word in row] for row in plane] for plane in packed]


class Case(NamedTuple):
    """A layer whose integers are known: `layer` packs `codes` [N, K] with `scale` and `zero` [N, groups]."""

    layer: QuantLinear
    scheme: Scheme
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def make_case(
    text: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    symmetric: tuple[bool, bool] = (False, False),
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float16,
    unit_scale: bool = False,
    seed: int = 0,
) -> Case:
    """Random codes (the extremes included), scales and zero points, packed by the definition."""
    rng = np.random.default_rng(seed)
    scheme = Scheme.parse(text, weight_symmetric=symmetric[0], activation_symmetric=symmetric[1])
    fmt = scheme.weight
    assert fmt is not None
    qmax = 2**fmt.bits if fmt.balanced else 2**fmt.bits - 1
    groups = -(-in_features // (scheme.group_size or in_features))
    codes = rng.integers(0, qmax + 1, (out_features, in_features))
    codes[0] = qmax
    codes[-1, ::2] = 0
    fixed = fmt.balanced or fmt.symmetric
    zero = (
        np.full((out_features, groups), 2 ** (fmt.bits - 1))
        if fixed
        else rng.integers(0, qmax + 1, (out_features, groups))
    )
    zero[0, 0] = zero[0, 0] if fixed else 0
    scale = torch.from_numpy(rng.uniform(0.01, 0.1, (out_features, groups))).to(scale_dtype)
    if unit_scale:
        scale = torch.ones_like(scale)
    layer = QuantLinear(in_features, out_features, scheme, bias=bias, dtype=dtype, scale_dtype=scale_dtype)
    layer.weight_packed = torch.tensor(pack(codes.tolist(), (qmax + 1).bit_length() - (qmax + 1 == 2**fmt.bits)))
    layer.weight_packed = layer.weight_packed.to(torch.int32)
    layer.weight_scale = scale
    if not fixed:
        layer.weight_zero_point = torch.from_numpy(zero).to(torch.uint8)
    if layer.bias is not None:
        layer.bias = torch.from_numpy(rng.normal(size=out_features)).to(dtype)
    return Case(layer, scheme, codes, scale.double().numpy(), zero)


def groups_of(scheme: Scheme, in_features: int) -> list[slice]:
    size = scheme.group_size or in_features
    return [slice(start, min(start + size, in_features)) for start in range(0, in_features, size)]


def linear(case: Case, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The formula of the integer contract for x [M, K], in float64 -> y [M, N], and the allowed distance from it.

    The distance counts fp32 roundings (of the integer, of three products, of one sum a group and of the bias) and the
    cast to the dtype of x, subnormals included. With groups, codes and zero points may be summed apart. At A16 the sum
    over K is fp32, and a backend may round the weight to the dtype of x (as the formula here does), or x to 16 bits.
    """
    scheme, k = case.scheme, x.shape[1]
    bias = case.layer.bias.double().numpy() if case.layer.bias is not None else np.zeros(len(case.codes))
    y, magnitude = np.zeros((len(x), len(case.codes))), np.abs(bias) * np.ones((len(x), 1))
    info, apart = torch.finfo(x.dtype), np.zeros_like(y)
    if scheme.activation is not None:
        s_x, z_x, q_x = (a.astype(np.float64) for a in contract(x.float().numpy(), scheme.activation))
    for g, columns in enumerate(groups_of(scheme, k)):
        w = (case.codes[:, columns] - case.zero[:, g, None]).astype(np.float64)
        if scheme.activation is None:
            w = torch.from_numpy(w * case.scale[:, g, None]).float().to(x.dtype).double().numpy()
            term = x[:, columns].double().numpy() @ w.T
            rounded = (
                info.eps / 2 * np.abs(x[:, columns].double().numpy())
                + 2.0**-16 * np.abs(x.double().numpy()).max(1)[:, None]
            )
            magnitude += np.abs(x[:, columns].double().numpy()) @ np.abs(w).T
            apart += rounded @ np.abs(w).T
        else:
            term = ((q_x[:, columns] - z_x) @ w.T) * case.scale[:, g] * s_x
            magnitude += np.abs(term)
            if scheme.groups(k) > 1:
                magnitude += 2 * z_x * np.abs(w.sum(1)) * case.scale[:, g] * s_x
        y += term
    y += bias
    roundings = len(groups_of(scheme, k)) + 5 if scheme.activation is not None else k + 1
    tolerance = (
        apart
        + magnitude * roundings * 2.0**-24
        + (np.abs(y) + magnitude * 2.0**-20) * info.eps / 2
        + info.tiny * info.eps
    )
    return y, tolerance
