"""The weight in floating point, for 16-bit activations of many tokens: `src/dequantize.cuh`."""

from __future__ import annotations

from torch import Tensor

from abq_llm.kernels.cuda import jit, launch
from abq_llm.kernels.cuda.activations import TYPE_NAMES
from abq_llm.kernels.cuda.problem import Problem

WARPS = 4


def dequantize(weight: list[Tensor], problem: Problem, like: Tensor) -> Tensor:
    """[N, K] in the dtype of `like`."""
    planes, scale, zero, *_ = weight
    out = like.new_empty(problem.n, problem.k)
    constants: dict[str, bool | int | str] = {
        "T": TYPE_NAMES[like.dtype],
        "planes": problem.planes,
        "warps": WARPS,
        "grouped": problem.group_size > 0,
        "group_words": max(1, problem.group_words),
        "in_fours": problem.in_fours,
        **problem.columns(),
    }
    kernel = jit.load("dequantize", "dequantize", constants, like.device)
    grid = -(-problem.k_blocks // WARPS), planes.shape[0], 1
    sizes = problem.n, problem.k, problem.k_blocks, planes.shape[0]
    launch.launch(kernel, grid, (32 * WARPS, 1, 1), [planes, scale, zero, out, *sizes])
    return out
