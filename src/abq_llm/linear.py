"""`QuantLinear`: the packed buffers of one linear layer; its forward is the op `abq_llm::linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from abq_llm import kernels
from abq_llm.kernels import reference
from abq_llm.packing import pack_planes
from abq_llm.quantizers import QParams, from_groups, quantize, to_groups
from abq_llm.scheme import Scheme


class QuantLinear(nn.Module):
    """A linear layer [out_features, in_features] in the layout of docs/checkpoint-format.md.

    Buffers: weight_packed int32 [planes, N, ceil(K/32)], weight_scale [N, groups], weight_zero_point uint8 [N, groups]
    (absent on balanced and symmetric grids), bias [N] (absent without bias). Built empty, on any device, for a loader
    to fill.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme, self.backend = in_features, out_features, scheme, "auto"
        self._prepared: tuple[tuple[str, Tensor], list[Tensor]] | None = None
        self._prepared_bias: tuple[Tensor | None, Tensor | None] = None, None
        for name, (shape, buffer_dtype) in buffer_layout(in_features, out_features, scheme, scale_dtype).items():
            self.register_buffer(name, torch.zeros(shape, dtype=buffer_dtype, device=device))
        if "weight_zero_point" not in self._buffers:
            self.register_buffer("weight_zero_point", None)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, qparams: QParams, scheme: Scheme, scale_dtype: torch.dtype = torch.float16
    ) -> QuantLinear:
        """Pack linear.weight [N, K] on the grid of `qparams` [N, groups, 1]; its scales are exact in `scale_dtype`."""
        assert scheme.weight is not None and scheme.planes is not None
        n, k = linear.weight.shape
        bias, dtype = linear.bias is not None, linear.weight.dtype
        packed = cls(k, n, scheme, bias=bias, dtype=dtype, scale_dtype=scale_dtype, device="meta")
        codes = from_groups(quantize(to_groups(linear.weight.detach(), scheme.group_size), qparams, scheme.weight), k)
        packed.weight_packed = pack_planes(codes, scheme.planes)
        packed.weight_scale = qparams.scale[..., 0].to(scale_dtype).contiguous()
        if packed.weight_zero_point is not None:
            packed.weight_zero_point = qparams.zero_point[..., 0].to(torch.uint8).contiguous()
        if linear.bias is not None:
            packed.bias = linear.bias.detach().clone()
        return packed

    def packed_weight(self) -> list[Tensor]:
        """The canonical tensors: [weight_packed, weight_scale] and weight_zero_point where there is one."""
        tensors = [self.weight_packed, self.weight_scale]
        return tensors if self.weight_zero_point is None else [*tensors, self.weight_zero_point]

    def dequantize(self) -> Tensor:
        """fp32 [N, K]: the weight that the integers stand for."""
        return reference.dequantize_weight(self.packed_weight(), self.scheme, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        backend, weight = self._prepare()
        return torch.ops.abq_llm.linear(
            x,
            weight,
            self._bias(),
            self.out_features,
            str(self.scheme),
            self.scheme.weight_symmetric,
            self.scheme.activation_symmetric,
            backend,
        )

    def _prepare(self) -> tuple[str, list[Tensor]]:
        """The backend for this device and its layout of the weight, made once and again when the weight is replaced."""
        key = (self.backend, self.weight_packed)
        if self._prepared is None or self._prepared[0][0] != key[0] or self._prepared[0][1] is not key[1]:
            self._backend_name = kernels.choose_backend(self.backend, self.weight_packed.device)
            prepare = kernels.BACKENDS[self._backend_name].prepare
            self._prepared = (key, prepare(self.packed_weight(), self.scheme, self.in_features))
        return self._backend_name, self._prepared[1]

    def _bias(self) -> Tensor | None:
        """The bias in fp32, converted once and again when it is replaced."""
        if self._prepared_bias[0] is not self.bias:
            self._prepared_bias = self.bias, None if self.bias is None else self.bias.float()
        return self._prepared_bias[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """As `nn.Module`, but .half() and .to(dtype) leave the scales alone: they belong to the integers."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module`, which copies into the buffers in place: what was prepared from them is stale."""
        self._prepared, self._prepared_bias = None, (None, None)
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme}, bias={self.bias is not None}"


def buffer_layout(
    in_features: int, out_features: int, scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the tensors that hold a packed weight."""
    assert scheme.weight is not None and scheme.planes is not None
    groups = (out_features, scheme.groups(in_features))
    layout = {
        "weight_packed": ((scheme.planes, out_features, -(-in_features // 32)), torch.int32),
        "weight_scale": (groups, scale_dtype),
    }
    if scheme.weight.fixed_zero_point is None:
        layout["weight_zero_point"] = (groups, torch.uint8)
    return layout


def set_backend(model: nn.Module, backend: str) -> None:
    """Make every `QuantLinear` of `model` use `backend` ("auto" or a name in `kernels.BACKENDS`)."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            kernels.choose_backend(backend, module.weight_packed.device)
            module.backend = backend
