"""The CPU backend: packed codes times codes of activations, by the best instructions that the CPU has.

The C++ is in `src/`; `native` loads it. `src/scalar.cpp` says in plain loops what is computed, `src/layout.h` draws the
weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abq_llm.kernels.cpu import native
from abq_llm.scheme import Scheme


def available(device: torch.device) -> str | None:
    """None if this backend can run on `device`, else the reason why not."""
    return native.missing() if device.type == "cpu" else "it is written for CPUs"


def prepare(weight: list[Tensor], scheme: Scheme, in_features: int) -> list[Tensor]:
    """[weight_packed, weight_scale, (weight_zero_point)] -> [uint8 [bytes] as in src/layout.h, rows].

    rows is [N, 0]: it holds nothing but N.
    """
    assert scheme.weight is not None
    packed, scale, *zero_point = weight
    group, fmt = min(scheme.group_size or in_features, in_features), scheme.weight
    narrow = scale.dtype == torch.float16 and fmt.qmax * group < 2**15
    zero = zero_point[0] if zero_point else None
    scale = scale if narrow else scale.float()
    prepared = _prepare(packed, scale, zero, in_features, group, fmt.qmax, narrow, fmt.fixed_zero_point or 0)
    return [prepared, scale.new_empty(scale.shape[0], 0)]


@torch.library.custom_op("abq_llm::prepare_cpu", mutates_args=())
def _prepare(
    packed: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group: int, qmax: int, narrow: bool, fixed: int
) -> Tensor:
    """An op, so that a compiler looks at its result only."""
    packed, scale, zero = packed.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()
    shape = (packed.shape[1], columns, group, packed.shape[0], qmax, narrow)
    prepared = torch.empty(native.module().weight_bytes(*shape), dtype=torch.uint8)
    pointers = (packed.data_ptr(), scale.data_ptr(), 0 if zero is None else zero.data_ptr())
    native.module().prepare(*shape, *pointers, fixed, prepared.data_ptr(), torch.get_num_threads())
    return prepared


@_prepare.register_fake
def _(packed, scale, zero, columns, group, qmax, narrow, fixed):  # type: ignore[no-untyped-def]
    return packed.new_empty(
        native.module().weight_bytes(packed.shape[1], columns, group, packed.shape[0], qmax, narrow), dtype=torch.uint8
    )


def linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, scheme: Scheme) -> Tensor:
    """x [M, K], weight of `prepare` -> [M, N] in the dtype of x. Computes in fp32, on torch's number of threads."""
    prepared, rows = weight
    tokens, y = x.float().contiguous(), torch.empty(len(x), len(rows))
    bias = None if bias is None else bias.float().contiguous()
    if y.numel():
        native.module().linear(
            native.level(),
            tokens.data_ptr(),
            len(x),
            prepared.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            scheme.activation.bits if scheme.activation else 16,
            scheme.activation_symmetric,
            y.data_ptr(),
            torch.get_num_threads(),
        )
    return y.to(x.dtype)
