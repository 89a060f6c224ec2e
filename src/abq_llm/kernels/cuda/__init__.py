"""The GPU backend: bit-planes on tensor cores, compiled on demand.

x -> `activations.quantize` -> codes -> `decode` | `gemm_mma` | `gemm_wgmma` -> y, or x as it is -> `gemm_mma_f16` |
`gemm_wgmma_f16` -> y; `tune` knows which is the fastest
where `abq tune` has measured it, `plan` says which elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from abq_llm.kernels.cuda import (
    activations,
    decode,
    dequantize,
    gemm_mma,
    gemm_mma_f16,
    gemm_wgmma,
    gemm_wgmma_f16,
    plan,
    tune,
)
from abq_llm.kernels.cuda.gpus import gpu
from abq_llm.kernels.cuda.layout import prepare as prepare
from abq_llm.kernels.cuda.plan import Plan
from abq_llm.kernels.cuda.problem import Problem
from abq_llm.scheme import Scheme


@torch.compiler.assume_constant_result  # what it asks cannot be traced
def available(device: torch.device) -> str | None:
    """None if this backend can run on `device`, else the reason why not."""
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    return _missing(device.index)


@lru_cache
def _missing(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"compute capability {major}.{minor}; the kernels need 8.0 or newer"
    if missing := [name for name in ("cuda.core", "cuda.bindings") if not _has(name)]:
        return f"{' and '.join(missing)} missing: pip install 'abq-llm[cuda]'"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no driver: {error}"
    return None


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, scheme: Scheme) -> Tensor:
    """x [M, K], weight of `prepare` -> [M, N] in the dtype of x (fp16, bf16 or fp32)."""
    problem = Problem.of(x.shape[0], weight[-1].shape[0], x.shape[1], scheme)
    if not problem.m:
        return x.new_empty(0, problem.n)
    return run(_plan(problem, x.get_device()), problem, x, weight, bias)


@lru_cache(maxsize=4096)
def _plan(problem: Problem, index: int) -> Plan:
    """The plan that `abq tune` found on this kind of GPU, or else the heuristic's."""
    place = gpu(index)
    return tune.lookup(problem, torch.cuda.get_device_name(index), place) or plan.choose(problem, place)


def run(chosen: Plan, problem: Problem, x: Tensor, weight: list[Tensor], bias: Tensor | None) -> Tensor:
    """`linear` by a given plan."""
    x = x.contiguous()
    tile = chosen.tile
    floats = chosen.path in ("mma_f16", "wgmma_f16")
    if tile is None or (floats and x.dtype == torch.float32):
        dense = dequantize.dequantize(weight, problem, x)
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    bias = None if bias is None else bias.float()
    if isinstance(tile, decode.Tile):
        return decode.run(tile, x, weight, bias, problem)
    if isinstance(tile, gemm_mma_f16.Tile):
        return gemm_mma_f16.run(tile, x, weight, bias, problem)
    if floats:
        assert isinstance(tile, gemm_wgmma.Tile)
        return gemm_wgmma_f16.run(tile, x, weight, bias, problem)
    planes, scale, zero, total, group_total, _ = weight
    binary, grouped = chosen.path == "wgmma_b1", problem.group_size > 0
    layout = activations.PLANE_BYTES if binary else activations.BYTES
    tokens = max(8, tile.tokens)
    token = activations.quantize(x, problem, layout, tokens=tokens, group_sums=grouped and chosen.path == "mma")
    y = x.new_empty(problem.m, problem.n)
    if isinstance(tile, gemm_mma.Tile):
        codes = token.codes.view(torch.uint8).view(problem.k_blocks * 16, -1, 8, 16)
        sums = group_total if grouped and tile.in_order else total
        gemm_mma.run(
            planes, codes, scale, zero, sums, token.scale, token.zero, token.sums, bias, y,
            group_words=problem.group_words, tile=tile, programmatic=True,
        )  # fmt: skip
    elif binary:
        codes = token.codes.view(torch.uint8).view(problem.k_blocks, problem.bits, 2, -1, 8, 16)
        gemm_wgmma.run_b1(tile, y, codes, token[1:], planes, (scale, zero, total), bias, programmatic=True)
    else:
        codes = token.codes.view(torch.uint8).view(problem.k_blocks * 16, -1, 8, 16)
        gemm_wgmma.run(
            tile, y, codes, token[1:], planes, (scale, zero, group_total if grouped else total), bias,
            group_words=problem.group_words, programmatic=True,
        )  # fmt: skip
    return y
