"""Others' kernels that may be there or not: CUTLASS's, and those of the packages humming-kernels and gemlite."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abq_llm.evaluation import cutlass
from abq_llm.evaluation.kernels_compared import SEED, Kernel, Loaded, gaussian
from abq_llm.scheme import Scheme


def find(names: Sequence[str], schemes: Sequence[Scheme], library: Path | None) -> tuple[list[Kernel], list[str]]:
    """The kernels of those `names` ("torch" is not one) that are there, and a line for each that is not.

    library: that benchmarks/cutlass/build.sh has made.
    """
    kernels: list[Kernel] = []
    missing: list[str] = []
    if "cutlass" in names and library:
        kernels += [cutlass.cutlass(library, bits) for bits in (8, 4)]
    elif "cutlass" in names:
        missing.append("cutlass: no --cutlass LIBRARY (benchmarks/cutlass/build.sh makes it), skipped")
    for name, (package, kernel) in PACKAGES.items():
        if name in names and importlib.util.find_spec(name):
            kernels += filter(None, map(kernel, schemes))
        elif name in names:
            missing.append(f"{name}: not installed (pip install {package}), skipped")
    return kernels, missing


def humming(scheme: Scheme) -> Kernel | None:
    """humming (https://github.com/vllm-project/humming) on the same bits, symmetric. None where it has no kernel.

    The use of its API is that of the README of humming-kernels 0.1.19.
    """
    activations = {None: "float16", 8: "int8", 4: "int4"}
    bits = scheme.activation and scheme.activation.bits
    if scheme.weight is None or scheme.weight.balanced or bits not in activations:
        return None
    weight_bits = scheme.weight.bits
    weight_config: dict[str, Any] = {"dtype": f"int{weight_bits}"}
    if scheme.group_size:
        weight_config["group_size"] = scheme.group_size

    def load(n: int, k: int, device: torch.device) -> Loaded:
        from humming.layer import HummingLayer

        config = {"dtype": activations[bits]}
        layer = HummingLayer(n, k, dict(weight_config), config, torch_dtype=torch.float16).to(device)
        half = 2 ** (weight_bits - 1)
        dense = (_codes(n, k, weight_bits, device).half() - half) / (half * k**0.5)  # that its quantizer finds again
        layer.load_from_unquantized(dense)
        layer.transform()
        represented = None if weight_bits == 1 else dense  # its int1 has other values
        return Loaded(layer, _bytes(*layer.parameters()), represented)

    return Kernel("humming", str(scheme), load, _call)


def gemlite(scheme: Scheme) -> Kernel | None:
    """gemlite (https://github.com/mobiusml/gemlite): W1, 2, 4, 8 A16 with zero points, and W8A8. Else None.

    The use of its API is that of `gemlite.helper` in 0.6. Its autotuning is left as it comes, "fast".
    """
    if scheme.weight is None or scheme.weight.balanced or scheme.weight.bits not in (1, 2, 4, 8):
        return None
    bits = scheme.weight.bits

    def load_a16(n: int, k: int, device: torch.device) -> Loaded:
        from gemlite.helper import A16Wn_HQQ_INT

        groups = k // (scheme.group_size or k)
        codes = _codes(n, k, bits, device)
        scale = torch.full((n, groups), 1 / (2**bits * k**0.5), dtype=torch.float16, device=device)
        zero = torch.full_like(scale, 2 ** (bits - 1))
        layer = A16Wn_HQQ_INT(str(device), torch.float16, W_nbits=bits).from_weights(codes, scale, zero)
        dense = (codes.half() - 2 ** (bits - 1)) * scale[0, 0]
        return Loaded(layer, _bytes(layer.W_q, layer.scales, layer.zeros), dense)

    def load_a8(n: int, k: int, device: torch.device) -> Loaded:
        from gemlite.helper import A8W8_INT8_dynamic

        dense = gaussian(n, k, device).half()
        layer = A8W8_INT8_dynamic(str(device), torch.float16).from_weights(dense)
        return Loaded(layer, _bytes(layer.W_q, layer.scales), dense)

    if scheme.activation is None:
        return Kernel("gemlite", str(scheme), load_a16, _call)
    if scheme.activation.bits == bits == 8 and not scheme.group_size:
        return Kernel("gemlite", str(scheme), load_a8, _call)
    return None


def _call(x: Tensor, layer: Any) -> Tensor:
    return layer(x)


def _codes(n: int, k: int, bits: int, device: torch.device) -> Tensor:
    random = torch.Generator(device).manual_seed(SEED)
    return torch.randint(0, 2**bits, (n, k), generator=random, device=device, dtype=torch.uint8)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


PACKAGES = {"humming": ("humming-kernels", humming), "gemlite": ("gemlite", gemlite)}  # by module
