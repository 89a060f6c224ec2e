"""The kernels that `kernel_speed` times, each a loader of a random weight and a function of x: ours, and torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abq_llm import kernels
from abq_llm.errors import AbqError
from abq_llm.linear import buffer_layout
from abq_llm.packing import pack_planes
from abq_llm.scheme import Scheme

SEED = 0
INT8_TOKENS = 32  # padded to a multiple: torch._int_mm refuses fewer than 17


class Loaded(NamedTuple):
    """A weight as its kernel wants it (tensors or a module: something that deepcopy copies), and its size.

    dense: what the weight stands for, [n, k], if `linear` is to give about x dense^T.
    """

    weight: Any
    weight_bytes: int
    dense: Tensor | None = None


@dataclass(frozen=True)
class Kernel:
    """`load` (n, k, device) once, then `linear` (x fp16 [m, k], weight) -> fp16 [m, n] (torch-int8: int32).

    Whatever `linear` searches or compiles for a new m, it does at its first call, outside any graph.
    """

    name: str
    scheme: str
    load: Callable[[int, int, torch.device], Loaded]
    linear: Callable[[Tensor, Any], Tensor]
    capturable: bool = True  # by a CUDA graph
    backend: str | None = None  # ours only
    quantized: Scheme | None = None  # ours only


def ours(backend: str, scheme: Scheme) -> Kernel:
    """A backend of this package, with everything a layer does: quantize, pack, multiply, scale."""
    if scheme.weight is None:
        raise AbqError(f"{scheme}: its weights stay floating point, there is no kernel to time")

    def load(n: int, k: int, device: torch.device) -> Loaded:
        prepared = kernels.BACKENDS[backend].prepare(random_weight(scheme, n, k, device), scheme, k)
        return Loaded(prepared, round(scheme.bits_per_weight(n, k) * n * k / 8))

    def linear(x: Tensor, weight: list[Tensor]) -> Tensor:
        return kernels.BACKENDS[backend].linear(x, weight, None, scheme)

    name, capturable = f"abq-{backend}", backend != "reference"  # it makes tensors from numbers of the host
    return Kernel(name, str(scheme), load, linear, capturable, backend, scheme)


@lru_cache(maxsize=1)
def random_weight(scheme: Scheme, n: int, k: int, device: torch.device) -> list[Tensor]:
    """[weight_packed, weight_scale, (weight_zero_point)] as on disk, the same at every call."""
    assert scheme.weight is not None and scheme.planes is not None
    random = torch.Generator(device).manual_seed(SEED)
    qmax = scheme.weight.qmax
    codes = torch.randint(0, qmax + 1, (n, k), generator=random, device=device, dtype=torch.int16)
    layout = buffer_layout(k, n, scheme, torch.float16)
    groups = layout["weight_scale"][0]
    tensors = [
        pack_planes(codes, scheme.planes),
        (torch.rand(groups, generator=random, device=device) / qmax + 0.5 / qmax).half(),
    ]
    if "weight_zero_point" in layout:
        zero_points = torch.randint(0, qmax + 1, groups, generator=random, device=device)
        tensors.append(zero_points.to(torch.uint8))
    assert [(tensor.shape, tensor.dtype) for tensor in tensors] == list(layout.values())
    return tensors


def torch_fp16() -> Kernel:
    """torch.nn.functional.linear: cuBLAS on a GPU."""

    def load(n: int, k: int, device: torch.device) -> Loaded:
        weight = gaussian(n, k, device).half()
        return Loaded(weight, weight.nbytes)

    return Kernel("torch-fp16", "W16A16", load, torch.nn.functional.linear)


def torch_on_cpu(dtype: torch.dtype) -> Kernel:
    """torch.nn.functional.linear in fp32 or bf16, in which torch's CPU kernels are faster than in fp16."""
    name, scheme = {torch.float32: ("torch-fp32", "W32A32"), torch.bfloat16: ("torch-bf16", "W16A16")}[dtype]

    def load(n: int, k: int, device: torch.device) -> Loaded:
        weight = gaussian(n, k, device).to(dtype)
        return Loaded(weight, weight.nbytes)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.to(dtype), weight).to(x.dtype)

    return Kernel(name, scheme, load, linear)


def torch_int8() -> Kernel:
    """torch._int_mm: the int8 product alone, of codes made beforehand, without scales."""

    def load(n: int, k: int, device: torch.device) -> Loaded:
        random = torch.Generator(device).manual_seed(SEED)
        weight = torch.randint(-127, 128, (n, k), generator=random, device=device, dtype=torch.int8)
        return Loaded(weight.t(), weight.nbytes)

    @lru_cache(maxsize=1)  # made at the first call: neither timed nor captured
    def codes(x: Tensor) -> Tensor:
        scaled = (x / x.abs().amax() * 127).round().to(torch.int8)
        return torch.nn.functional.pad(scaled, (0, 0, 0, -x.shape[0] % INT8_TOKENS))

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch._int_mm(codes(x), weight)[: x.shape[0]]

    return Kernel("torch-int8", "W8A8", load, linear)


def gaussian(n: int, k: int, device: torch.device) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator(device).manual_seed(SEED), device=device) / k**0.5
