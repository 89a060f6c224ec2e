"""Every op in plain torch, on any device: the definition that the other backends are tested against.

    y[m,n] = sum_g s_w[n,g] s_x[m] ( sum_{k in g} (q_w[n,k] - z_w[n,g]) (q_x[m,k] - z_x[m]) ) + bias[n]

The sum in parentheses is exact. At A16 the weight is dequantized to the dtype of x instead.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from abq_llm.packing import unpack_planes
from abq_llm.quantizers import QParams, choose_qparams, dequantize, from_groups, quantize, to_groups
from abq_llm.scheme import IntFormat, Scheme

TOKENS = {"cpu": 256}  # rows of x at a time: bounds the int32 products, and keeps them in a CPU's cache
TOKENS_ELSEWHERE = 8192


def available(device: torch.device) -> str | None:
    return None


def prepare(weight: list[Tensor], scheme: Scheme, in_features: int) -> list[Tensor]:
    return weight


def linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, scheme: Scheme) -> Tensor:
    """x [M, K], weight [packed, scale, (zero_point)] -> [M, N] in the dtype of x."""
    assert scheme.weight is not None
    if scheme.activation is None:
        dequantized = dequantize_weight(weight, scheme, x.shape[1]).to(x.dtype)
        return torch.nn.functional.linear(x, dequantized, None if bias is None else bias.to(x.dtype))
    codes, scale, zero_point = unpack(weight, scheme, x.shape[1])
    out_features, in_features = codes.shape
    size = scheme.group_size or in_features
    weight_dtype, x_dtype = _difference_dtype(scheme.weight), _difference_dtype(scheme.activation)
    centered = [
        (group_codes.short() - zero_point[:, group, None]).to(weight_dtype)
        for group, group_codes in enumerate(codes.split(size, 1))
    ]
    y = x.new_empty(x.shape[0], out_features)
    chunk = TOKENS.get(x.device.type, TOKENS_ELSEWHERE)
    for rows in range(0, x.shape[0], chunk):
        tokens = x[rows : rows + chunk]
        qparams = choose_qparams(tokens, scheme.activation)
        differences = (quantize(tokens, qparams, scheme.activation) - qparams.zero_point.short()).to(x_dtype)
        total = torch.zeros(tokens.shape[0], out_features, device=x.device)
        for group, (a, b) in enumerate(zip(differences.split(size, 1), centered, strict=True)):
            total += integer_product(a, b).float().mul_(scale[:, group])
        total *= qparams.scale
        y[rows : rows + chunk] = total if bias is None else total.add_(bias)
    return y


def dequantize_weight(weight: list[Tensor], scheme: Scheme, in_features: int) -> Tensor:
    """[packed, scale, (zero_point)] -> fp32 [N, K]."""
    codes, scale, zero_point = unpack(weight, scheme, in_features)
    qparams = QParams(scale[..., None], zero_point[..., None].float())
    return from_groups(dequantize(to_groups(codes, scheme.group_size), qparams), in_features)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] and b [N, K], int8, or int16 with |values| < 256 -> a b^T, exact, int32 [M, N] (int64 if K > 32768).

    Two exact ways: int8 products, or fp32 products over so few columns that every partial sum is an integer below 2^24.
    """
    if a.shape[1] > 2**15:
        parts = zip(a.split(2**15, 1), b.split(2**15, 1), strict=True)
        return torch.stack([integer_product(left, right).long() for left, right in parts]).sum(0)
    if a.device.type == "cpu" and _int8_products_are_exact():
        if a.dtype == torch.int16:
            return 2 * integer_product((a >> 1).to(torch.int8), b) + integer_product((a & 1).to(torch.int8), b)
        if b.dtype == torch.int16:
            return 2 * integer_product(a, (b >> 1).to(torch.int8)) + integer_product(a, (b & 1).to(torch.int8))
        pad = (0, a.shape[1] == 1)  # one column is the one shape that torch's CPU kernel gets wrong (2.13)
        return torch._int_mm(torch.nn.functional.pad(a, pad), torch.nn.functional.pad(b, pad).t())
    settings = torch.backends.cuda if a.device.type == "cuda" else torch.backends.mkldnn
    dtype = torch.float32 if settings.matmul.fp32_precision in ("none", "ieee") else torch.float64  # tf32, bf16
    columns = 2 ** (8 + (a.dtype == torch.int8) + (b.dtype == torch.int8))
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for left, right in zip(a.to(dtype).split(columns, 1), b.to(dtype).split(columns, 1), strict=True):
        total += (left @ right.t()).int()
    return total


@lru_cache
def _int8_products_are_exact() -> bool:
    """Whether this CPU's int8 product is exact at the extremes; those without VNNI may saturate in 16 bits."""
    worst = torch.full((32, 64), -128, dtype=torch.int8)
    return bool((torch._int_mm(worst, worst.t()) == 64 * 128 * 128).all())


def unpack(weight: list[Tensor], scheme: Scheme, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> codes [N, K] as unpacked, scale fp32 [N, groups], zero point int16 [N, groups]."""
    assert scheme.weight is not None
    packed, scale, *zero_point = weight
    fixed = torch.tensor(scheme.weight.fixed_zero_point or 0, dtype=torch.int16, device=scale.device)
    zero = zero_point[0].short() if zero_point else fixed.expand(scale.shape)
    return unpack_planes(packed, in_features), scale.float(), zero


def _difference_dtype(fmt: IntFormat) -> torch.dtype:
    """What holds code - zero point: int8 up to seven bits and on fixed zero points up to eight."""
    zero = fmt.fixed_zero_point
    return torch.int8 if fmt.qmax <= 127 or (zero is not None and fmt.qmax - zero <= 127) else torch.int16
