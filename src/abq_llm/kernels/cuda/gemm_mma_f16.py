"""Product for few tokens of 16-bit floats on `mma.sync`, on GPUs from sm_80 on. Kernel: `src/gemm_mma_f16.cuh`.

The tile is chosen by a model of what an SM does, fitted to some 800 timings on an H100: among the tiles timed, its
choice took 3 % more than the fastest, in the mean. `abq tune` measures instead.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import jit, launch
from abq_llm.kernels.cuda.activations import TYPE_NAMES
from abq_llm.kernels.cuda.gpus import gpu
from abq_llm.kernels.cuda.problem import WORD, Problem, groups_in_block

MAX_TOKENS = 64  # of a block
MAX_WARPS = 16  # of a block
# Bytes of an SM that may be under way before x is here: see `decode.WINDOW_BYTES`
WINDOW_BYTES = 32 * 1024
RESERVED = 1024  # bytes of shared memory that a block takes besides its own


@dataclass(frozen=True)
class Tile:
    """A block does `tokens` x up to 16 * warps_rows * row_tiles rows."""

    tokens: int  # 1, 2, 4, or a multiple of 8
    warps_rows: int  # warps side by side,
    row_tiles: int  # with so many tiles of 16 rows each
    warps_k: int  # slices of the columns, with warps of their own
    warps_tokens: int  # parts of the tokens, likewise
    stages: int  # of the queue: `warps_k` k-blocks each

    @property
    def block_row_tiles(self) -> int:
        return self.warps_rows * self.row_tiles

    @property
    def warps(self) -> int:
        return self.warps_rows * self.warps_k * self.warps_tokens

    @property
    def warp_tokens(self) -> int:
        return self.tokens // self.warps_tokens

    def blocks(self, problem: Problem, sms: int) -> int:
        """That share the rows: as many as keep all SMs busy alike."""
        needed = -(-problem.row_tiles // self.block_row_tiles)
        return min(problem.row_tiles, -(-needed // sms) * sms)


def weight_bytes(tile: Tile, problem: Problem) -> int:
    """Of a stage, with scales and zero points."""
    slots = groups_in_block(problem.group_words) if problem.group_size else 0
    return tile.block_row_tiles * tile.warps_k * (512 * problem.planes + 80 * slots)


def shared_bytes(tile: Tile, problem: Problem) -> int:
    """Dynamic shared memory of a block, as in `MmaF16` (which refuses to compile when they differ)."""
    rows = 16 * tile.block_row_tiles
    stage = weight_bytes(tile, problem) + tile.tokens * (512 * tile.warps_k + 32)
    sums = 4 * tile.warps_k * tile.tokens * (rows + 4)
    return max(tile.stages * stage, sums) + 8 * rows


def registers(tile: Tile, problem: Problem) -> int:
    """Of a thread, about."""
    tiles = tile.row_tiles * -(-tile.warp_tokens // 8)
    words = 1 << (min(problem.planes, 8) - 1).bit_length()
    sets = 8 // words if 8 // words * tiles <= 8 else 1  # as `sets` in `MmaF16`
    sums = 4 * tiles * (sets + (problem.group_size > 0))
    planes = 4 * tile.row_tiles * (words + (problem.planes > 8))
    return sums + planes + 10 * tile.row_tiles + 2 * -(-tile.warp_tokens // 8) + 32


def threads(tile: Tile, copy_engine: bool = True) -> int:
    """Of a block, with the two warps that copy, where there is a copy engine."""
    return 32 * (tile.warps + 2 * copy_engine)


def registers_for(warps: int) -> int:
    """That each thread may have: an SM's four parts take a quarter of the warps each."""
    return min(255, 16384 // (32 * -(-warps // 4)) // 8 * 8)


def resident(tile: Tile, problem: Problem, shared_limit: int) -> int:
    """Blocks that an SM can hold, up to 4: the compiler is held to it."""
    warps, used = threads(tile) // 32, registers(tile, problem)
    by_registers = max(n for n in range(5) if n == 0 or registers_for(n * warps) >= used)
    by_shared = (shared_limit + RESERVED) // (shared_bytes(tile, problem) + RESERVED)
    return max(1, min(4, by_registers, by_shared))


def clocks(tile: Tile, problem: Problem, sms: int, per_sm: int) -> float:
    """Clocks of the busiest SM, about, when it can hold `per_sm` blocks. Most useful to compare tiles."""
    blocks = tile.blocks(problem, sms)
    waves = -(-blocks * -(-problem.m // tile.tokens) // sms)
    groups = groups_in_block(problem.group_words) if problem.group_size else 0
    token_tiles = -(-tile.warp_tokens // 8)
    # A round is a stage: what its warps calculate, or what comes meanwhile of weights and of x, or copies of rows of x
    rounds = -(-problem.k_blocks // tile.warps_k)
    codes = tile.row_tiles * (60 * problem.planes + 61 * groups)
    work = (codes + token_tiles * (113 * tile.row_tiles + 16)) * tile.warps / 4
    work *= 1 + 2.3 / (tile.warps * min(waves, per_sm))  # warps hide each other's latencies
    weights = weight_bytes(tile, problem)
    full = -(-problem.row_tiles // blocks) / tile.block_row_tiles
    memory = (full * weights + 360 * tile.warps_k * tile.tokens) / 22.7
    combine = 1.5 * tile.tokens * tile.block_row_tiles * (tile.warps_k + 3) / tile.warps
    # Where the next kernel's blocks find no place, their queues are not filled meanwhile
    fill = 1.24 * min(rounds, tile.stages) * weights / 22.7 / per_sm if waves % per_sm == 0 else 0
    one = rounds * (max(work, memory, 66 * tile.tokens) + 214) + combine
    return waves * one + 3000 * -(-waves // per_sm) + fill


def candidates(problem: Problem, sms: int, shared_limit: int) -> list[Tile]:
    """At most 16 tiles worth a measurement, the most promising first."""
    widest = min(MAX_TOKENS, 1 << (problem.m - 1).bit_length())
    tokens = {widest, max(8, widest // 2)} if widest > 8 else {widest}
    slices = sorted({-(-problem.k_blocks // rounds) for rounds in range(1, problem.k_blocks + 1)})
    slices = [count for count in slices if count <= MAX_WARPS]
    estimates: dict[Tile, float] = {}
    least = -(-problem.row_tiles // (sms * MAX_WARPS))
    blocks = least  # of an SM
    while not estimates or blocks < least + 3:
        share = -(-problem.row_tiles // (sms * blocks))  # row tiles of a block
        for count, row_tiles, warps_k, warps_tokens in itertools.product(sorted(tokens), (1, 2), slices, (1, 2)):
            tile = Tile(count, -(-share // row_tiles), row_tiles, warps_k, warps_tokens, 2)
            if (
                tile.warps <= MAX_WARPS
                and (row_tiles == 1 or count > 8)
                and (warps_tokens == 1 or count > 16)
                and registers(tile, problem) <= registers_for(threads(tile) // 32)
            ):
                for filled, per_sm in _filled(tile, problem, shared_limit):
                    estimates[filled] = clocks(filled, problem, sms, per_sm)
        blocks += 1
    return sorted(estimates, key=lambda tile: estimates[tile])[:16]


def _filled(tile: Tile, problem: Problem, shared_limit: int) -> list[tuple[Tile, int]]:
    """`tile` with as many stages as one, two or three blocks of an SM can have, and that number."""
    found: dict[int, Tile] = {}
    for stages in range(2, 9):
        filled = replace(tile, stages=stages)
        if shared_bytes(filled, problem) + RESERVED <= shared_limit:
            found[resident(filled, problem, shared_limit)] = filled
    return [(filled, per_sm) for per_sm, filled in found.items()]


@lru_cache(maxsize=4096)
def choose(problem: Problem, sms: int, shared_limit: int) -> Tile:
    """The tile for a shape that nobody has tuned."""
    return candidates(problem, sms, shared_limit)[0]


def constants(tile: Tile, problem: Problem, dtype: torch.dtype, shared_limit: int) -> dict[str, bool | int | str]:
    """`Config` of the kernel."""
    per_sm = resident(tile, problem, shared_limit)
    return {
        "T": TYPE_NAMES[dtype],
        "planes": problem.planes,
        "grouped": problem.group_size > 0,
        "group_words": problem.group_words or 1,
        "full_blocks": problem.k_blocks * 8 == columns(problem) // WORD,
        "tokens": tile.tokens,
        "warps_rows": tile.warps_rows,
        "row_tiles": tile.row_tiles,
        "warps_k": tile.warps_k,
        "warps_tokens": tile.warps_tokens,
        "stages": tile.stages,
        "programmatic": True,
        "window": max(1, WINDOW_BYTES // weight_bytes(tile, problem)),
        "resident": per_sm,
        "shared_bytes": shared_bytes(tile, problem),
    }


def columns(problem: Problem) -> int:
    """Of x as the kernel reads it: groups padded as in the layout, the last one to words."""
    last = problem.last_group if problem.group_size else problem.k
    return (problem.groups - 1) * problem.group_padded + -(-last // WORD) * WORD


def padded(x: Tensor, problem: Problem) -> Tensor:
    """x [M, K], contiguous -> [M, columns], at an address divisible by 16. Seldom a copy."""
    if problem.group_size != problem.group_padded:
        x = pad(x, (0, problem.groups * problem.group_size - problem.k)).view(len(x), problem.groups, -1)
        x = pad(x, (0, problem.group_padded - problem.group_size)).flatten(1)[:, : columns(problem)].contiguous()
    elif problem.k % WORD:
        x = pad(x, (0, -problem.k % WORD))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def run(tile: Tile, x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    """x [M, K] fp16 or bf16, contiguous, weight of `layout.prepare` -> [M, N] in the dtype of x. bias fp32 [N]."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise AbqError(f"gemm_mma_f16 is for 16-bit floats, not {x.dtype}")
    planes, scale, zero, *_ = weight
    x = padded(x, problem)
    y = x.new_empty(problem.m, problem.n)
    place = gpu(x.get_device())
    kernel = jit.load("gemm_mma_f16", "gemm_mma_f16", constants(tile, problem, x.dtype, place.shared_limit), x.device)
    launch.launch(
        kernel,
        (-(-problem.m // tile.tokens), tile.blocks(problem, place.sms), 1),
        (threads(tile, place.has_copy_engine), 1, 1),
        [planes, x, scale, zero, bias, y, problem.m, problem.n, x.shape[1], problem.k_blocks, problem.groups],
        shared_bytes=shared_bytes(tile, problem),
        programmatic=True,
    )
    return y
