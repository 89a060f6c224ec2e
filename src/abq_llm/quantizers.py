"""The only rounding code. Uniform affine quantizers over the last dimension:  x ~ (q - z) * s.

Every backend must reproduce `quantize` bit for bit, so the order of the fp32 operations is part of the contract:

    lo, hi = min(x, 0), max(x, 0)           the range always holds zero, so that 0 <= z <= qmax
    s = (hi - lo) / qmax                    then rounded to the dtype it is stored in, and at least `MIN_SCALE`
    r = 1 / s                               one IEEE division a row or token
    z = clamp(rint(-lo * r), 0, qmax)       ties to even
    q = clamp(rint(x * r) + z, 0, qmax)

Symmetric and balanced grids have a fixed z = 2^(bits-1) and s = max(hi, -lo) / (qmax - z).

Rounding is straight-through (Bengio et al., 2013) under autograd: `fake_quantize` is differentiable in x, s and z.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from abq_llm.scheme import IntFormat

MIN_SCALE = 2.0**-20  # keeps 1 / s finite on all-zero rows; still a (subnormal) fp16 number


class QParams(NamedTuple):
    """scale and zero_point, both fp32 [..., 1] against the values they quantize (zero_point holds integers)."""

    scale: Tensor
    zero_point: Tensor


def choose_qparams(
    x: Tensor,
    fmt: IntFormat,
    *,
    clip_hi: Tensor | float = 1.0,
    clip_lo: Tensor | float = 1.0,
    scale_dtype: torch.dtype = torch.float32,
) -> QParams:
    """Min-max parameters over the last dimension of x [..., K], each end times its clip factor ([..., 1] or number).

    The scale is rounded to `scale_dtype` before the zero point is chosen, so that what is stored is what was used.
    """
    x = x.float()
    hi = x.amax(-1, keepdim=True).clamp_min(0) * clip_hi
    lo = x.amin(-1, keepdim=True).clamp_max(0) * clip_lo
    fixed = fmt.fixed_zero_point
    if fixed is not None:
        scale = storable_scale(_divide(torch.maximum(hi, -lo), max(fmt.qmax - fixed, 1)), scale_dtype)
        return QParams(scale, torch.full_like(scale, fixed))
    scale = storable_scale(_divide(hi - lo, fmt.qmax), scale_dtype)
    return QParams(scale, _round(-lo * (1 / scale)).clamp(0, fmt.qmax))


def storable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 scale -> the nearest fp32 value that `dtype` holds, at least `MIN_SCALE` (straight-through)."""
    scale = scale.clamp_min(MIN_SCALE)
    return scale if dtype == torch.float32 else scale + (scale.to(dtype).float() - scale).detach()


def quantize(x: Tensor, qparams: QParams, fmt: IntFormat) -> Tensor:
    """x [..., K] -> codes, int16 [..., K] in 0..qmax."""
    return _codes(x, qparams, fmt).to(torch.int16)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """codes [..., K] -> fp32 [..., K]."""
    return (codes - qparams.zero_point) * qparams.scale


def fake_quantize(x: Tensor, qparams: QParams, fmt: IntFormat) -> Tensor:
    """quantize then dequantize, fp32, differentiable in x, scale and zero point (straight through the rounding)."""
    y: Tensor = _FakeQuantize.apply(x.float(), qparams.scale, qparams.zero_point, fmt)  # type: ignore[no-untyped-call]
    return y


def fake_quantize_dynamic(x: Tensor, fmt: IntFormat | None) -> Tensor:
    """Per-token quantization of x [..., K] with its own range, in the dtype of x. None leaves x alone."""
    if fmt is None:
        return x
    if fmt.qmax == fmt.fixed_zero_point:  # one bit, symmetric: {-1, 0}, the one grid that clamps part of its own range
        return fake_quantize(x, choose_qparams(x, fmt), fmt).to(x.dtype)
    y: Tensor = _FakeQuantizeDynamic.apply(x, fmt)  # type: ignore[no-untyped-call]
    return y


def to_groups(weight: Tensor, group_size: int | None) -> Tensor:
    """[N, K] -> [N, groups, size]. A short last group is filled with zeros, which no min-max range notices."""
    n, k = weight.shape
    size = min(group_size or k, k)
    return (torch.nn.functional.pad(weight, (0, -k % size)) if k % size else weight).reshape(n, -1, size)


def from_groups(grouped: Tensor, in_features: int) -> Tensor:
    """[N, groups, size] -> [N, K], without the filling."""
    return grouped.flatten(1)[:, :in_features]


def _codes(x: Tensor, qparams: QParams, fmt: IntFormat) -> Tensor:
    return ((x.float() * (1 / qparams.scale)).round_().add_(qparams.zero_point)).clamp_(0, fmt.qmax)


def _divide(x: Tensor, divisor: int) -> Tensor:
    """x / divisor, one IEEE division on every device: by a Python number, CUDA multiplies by its reciprocal instead."""
    return x / torch.full_like(x, divisor)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


class _FakeQuantize(torch.autograd.Function):
    """One node instead of eight: fewer passes over the tensor, and half the memory kept for the backward pass.

    With t = x / s and y = (q - z) s:  dy/dx = 1, dy/ds = (q - z) - t, dy/dz = 0  where q was not clamped,
                                       dy/dx = 0, dy/ds = q - z,       dy/dz = -s where it was.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, fmt: IntFormat) -> Tensor:
        unclamped = (x * (1 / scale)).round_().add_(zero_point)
        codes = unclamped.clamp(0, fmt.qmax)
        y = (codes - zero_point) * scale
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(x, y, scale, unclamped == codes)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, y, scale, inside = ctx.saved_tensors
        grad_x = grad * inside
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * y).sub_(grad_x * x).sum(-1, keepdim=True) / scale
        if ctx.needs_input_grad[2]:
            grad_zero_point = (grad_x - grad).sum(-1, keepdim=True) * scale
        return grad_x, grad_scale, grad_zero_point, None


class _FakeQuantizeDynamic(torch.autograd.Function):
    """`fake_quantize` on the range of x itself, where nothing is clamped: dy/dx = 1, dy/ds = (q - z) - x / s.

    The gradient of s goes to the largest and the smallest value of the token, from which s was made.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: IntFormat) -> Tensor:
        qparams = choose_qparams(x, fmt)
        y = dequantize(_codes(x, qparams, fmt), qparams).to(x.dtype)
        ctx.save_for_backward(x, y, qparams.scale)
        ctx.fmt = fmt
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y, scale = ctx.saved_tensors
        fmt, fixed = ctx.fmt, ctx.fmt.fixed_zero_point
        grad_scale = (grad * (y - x)).sum(-1, keepdim=True) / scale
        (hi, at_hi), (lo, at_lo) = x.max(-1, keepdim=True), x.min(-1, keepdim=True)
        if fixed is None:
            to_hi, to_lo = grad_scale / fmt.qmax * (hi > 0), grad_scale / -fmt.qmax * (lo < 0)
        else:
            share = grad_scale / max(fmt.qmax - fixed, 1)
            to_hi, to_lo = share * (hi >= -lo) * (hi > 0), -share * (hi < -lo)
        return grad.scatter_add(-1, at_hi, to_hi.to(grad.dtype)).scatter_add_(-1, at_lo, to_lo.to(grad.dtype)), None
