"""Prefill with 16-bit activations on Hopper: weights expanded to floats in registers, for warpgroup products.

`src/gemm_wgmma_f16.cuh`, and `src/x_tiles.cuh` for x.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import gemm_wgmma, jit, launch
from abq_llm.kernels.cuda.activations import TYPE_NAMES, aligned
from abq_llm.kernels.cuda.gemm_wgmma import SHARED_LIMIT, Tile, cycles, token_counts
from abq_llm.kernels.cuda.gpus import gpu
from abq_llm.kernels.cuda.problem import Problem

UNIT = 2  # steps of 32 columns whose products start together, unless a group ends before


def shared_bytes(tile: Tile, planes: int) -> int:
    """The block's shared memory, laid out in `wgmma_tile.cuh`."""
    head = -(-(384 + 24 * tile.tokens) // 128) * 128
    stage = tile.tokens * 64 * tile.stage_steps
    slot = tile.rows // 16 * planes * 512
    out = tile.consumers * 4 * 2 * 16 * 48
    return head + tile.stages * stage + tile.weight_slots * slot + out


def takes(problem: Problem) -> bool:
    """Whether centered codes are exact in bf16, too."""
    return problem.planes < 8


def candidates(problem: Problem) -> list[Tile]:
    """Every tile worth timing."""
    tiles = []
    for tokens in token_counts(problem.m):
        steps = 2 if tokens > 64 else 4
        tiles += [Tile(tokens, consumers, stage_steps=steps) for consumers in (2, 3) if consumers * tokens <= 576]
    return [filled for tile in tiles if (filled := _filled(tile, problem.planes))]


def choose(problem: Problem, sms: int) -> Tile:
    """The tile with the least estimate."""

    def estimate(tile: Tile) -> float:
        return cycles(tile, problem.m, problem.n, problem.k_blocks, problem.planes, sms, products=16)

    return min(candidates(problem), key=estimate)


def _filled(tile: Tile, planes: int) -> Tile | None:
    """`tile` with as many stages as fit, up to 8, or None if fewer than a k-block of x does."""
    per_block = 8 // tile.stage_steps
    for stages in range(8, per_block - 1, -1):
        for slots in range(min(4, max(2, stages // per_block + 1)), 1, -1):
            found = replace(tile, stages=stages, weight_slots=slots)
            if shared_bytes(found, planes) <= SHARED_LIMIT:
                return found
    return None


def constants(tile: Tile, problem: Problem, dtype: torch.dtype) -> dict[str, bool | int | str]:
    shared = gemm_wgmma.constants(tile, problem.planes, dtype, group_words=problem.group_words, programmatic=True)
    return {**shared, "unit": UNIT, "group_words": problem.group_words or UNIT}


def x_tiles(x: Tensor, problem: Problem, tokens: int) -> Tensor:
    """x [M, K], contiguous -> [32 KB chunks, MT, 8 tokens, 8 columns], 8 MT a multiple of `tokens`."""
    tiles = -(-problem.m // tokens) * tokens // 8
    out = x.new_empty(problem.k_blocks * 32, tiles, 8, 8)
    config: dict[str, bool | int | str] = {
        "T": TYPE_NAMES[x.dtype],
        "aligned": aligned(x, problem),
        **problem.columns(),
    }
    kernel = jit.load("x_tiles", "x_tiles", config, x.device)
    grid = -(-problem.k_blocks * 16 // 32), -(-problem.m // 8), 1
    args: list[launch.Argument] = [x, out, problem.m, problem.k, problem.k_blocks, tiles]
    launch.launch(kernel, grid, (256, 1, 1), args, programmatic=True)
    return out


def run(tile: Tile, x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    """x [M, K] fp16 or bf16, contiguous, weight of `layout.prepare` -> [M, N] in the dtype of x. bias fp32 [N]."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise AbqError(f"gemm_wgmma_f16 is for 16-bit floats, not {x.dtype}")
    planes, scale, zero, _, group_total, _ = weight
    tiles = x_tiles(x, problem, tile.tokens)
    y = x.new_empty(problem.m, problem.n)
    kernel = jit.load("gemm_wgmma_f16", "gemm_wgmma_f16", constants(tile, problem, x.dtype), x.device)
    grid = min(tile.count(problem.m, problem.n), gpu(x.get_device()).sms), 1, 1
    args: list[launch.Argument] = [planes, tiles, scale, zero, group_total, bias, y]
    sizes = problem.m, problem.n, problem.k_blocks, tiles.shape[1], problem.groups
    launch.launch(kernel, grid, (tile.threads, 1, 1), [*args, *sizes], shared_bytes(tile, problem.planes), True)
    return y
