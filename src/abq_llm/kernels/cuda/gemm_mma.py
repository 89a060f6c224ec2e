"""Integer product on `mma.sync`: y[M, N] = x[M, K] W[N, K]^T for any GPU from sm_80 on. The kernel: `src/gemm_mma.cuh`.

The tile is chosen by a model of what an SM does per block of 256 columns: integers in, tile out. Its constants were
fitted to 31 products on an H100, and choose within 5 % of the fastest tile measured; `abq tune` measures instead.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from abq_llm.kernels.cuda import jit, launch
from abq_llm.kernels.cuda.activations import TYPE_NAMES
from abq_llm.kernels.cuda.gpus import gpu
from abq_llm.kernels.cuda.problem import groups_in_block

IN_ORDER_TOKENS = 64  # above it, tiles for groups are in order
UNDIVIDED = 1.3  # tiles of 32 tokens whose columns are not divided are slower than others of the same estimate
SMALLEST_SHARED_LIMIT = 99 * 1024  # bytes of a block on sm_86, 89, 120; 163 KiB on sm_80, 227 KiB on sm_90 and 100


@dataclass(frozen=True)
class Tile:
    """A thread block computes `tokens` x `rows` outputs."""

    tokens: int  # 8, 16, 32, 64 or 128
    warps_rows: int  # warps side by side, which share the tokens in shared memory
    row_tiles: int  # 16-row tiles per warp
    warps_k: int  # slices of the columns within the block
    stages: int  # blocks of 256 columns in the queue of a slice

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.warps_rows

    @property
    def in_order(self) -> bool:
        """Whether groups are added in the reference's order, to the same bits."""
        return self.warps_k == 1

    @property
    def threads(self) -> int:
        return 32 * self.warps_rows * self.warps_k


def shared_bytes(tile: Tile, planes: int, group_words: int = 0, zero_point: bool = False) -> int:
    """Dynamic shared memory of a block, as in `GemmMma` of the kernel (which refuses to compile when they differ).

    group_words: columns of a group / 32, 0 for a scale per channel.
    """
    slots = groups_in_block(group_words) if group_words else 0
    zeros = slots if zero_point else 0
    totals, x_zeros = (slots, 1) if group_words and tile.in_order else (0, 0)
    stage = 256 * tile.tokens + 32 * planes * tile.rows
    stage += (4 * slots + 4 * totals + zeros) * tile.rows + 4 * (zeros + x_zeros) * tile.tokens
    sums = 4 * tile.warps_k * tile.tokens * (tile.rows + 4)
    return max(tile.warps_k * tile.stages * stage, sums) + 16 * tile.rows + 12 * tile.tokens


def _planes_in_registers(planes: int) -> int:
    return 1 << (planes - 1).bit_length()


def registers(tile: Tile, planes: int, grouped: bool = False) -> int:
    """Registers of a thread, about: sums, planes, and what every kernel needs."""
    sums = tile.row_tiles * tile.tokens // 2 * (2 if grouped else 1)
    return sums + 4 * tile.row_tiles * _planes_in_registers(planes) + 60


def blocks_per_sm(tile: Tile, planes: int, grouped: bool, shared: int, shared_limit: int) -> int:
    """Blocks that an SM can hold: the compiler is held to it. An SM has 1 KiB more shared memory than a block may."""
    by_registers = 65536 // (registers(tile, planes, grouped) * tile.threads)
    return max(1, min(by_registers, 1536 // tile.threads, (shared_limit + 1024) // (shared + 1024)))


def clocks(tile: Tile, m: int, n: int, k_blocks: int, planes: int, sms: int, resident: int) -> float:
    """Clocks of the busiest SM, about, when it can hold `resident` blocks. Most useful to compare tiles."""
    blocks = math.ceil(-(-m // tile.tokens) * -(-n // tile.rows) / sms)
    row_tiles, warps = tile.rows // 16, min(blocks, resident) * tile.threads // 32
    # Per 256 columns: bytes of a row tile, matrices of tokens for every warp; warps hide each other's latencies
    work = (32 * row_tiles + 1.4 * tile.tokens * tile.warps_rows) * (1 + 13 / warps)
    memory = 512 * planes * row_tiles / 16
    combine = 13 * tile.tokens * row_tiles * (tile.warps_k + 3)
    undivided = UNDIVIDED if tile.tokens == 32 and tile.warps_k == 1 else 1
    return undivided * blocks * (k_blocks * max(work, memory) + combine)


def candidates(
    m: int,
    n: int,
    k_blocks: int,
    planes: int,
    sms: int = 132,
    group_words: int = 0,
    zero_point: bool = False,
    shared_limit: int = SMALLEST_SHARED_LIMIT,
) -> list[Tile]:
    """At most 12 tiles worth a measurement, the most promising first; of every block shape the best three.

    Among equals smaller blocks come first, then deeper queues.
    """
    grouped = group_words > 0
    widest = max(8, 1 << (m - 1).bit_length())
    ranked = []
    sizes = (8, 16, 32, 64, 128), (1, 2, 4, 8), (1, 2), (1, 2, 4, 8), (4, 3, 2)
    for tile in itertools.starmap(Tile, itertools.product(*sizes)):
        used, shared = registers(tile, planes, grouped), shared_bytes(tile, planes, group_words, zero_point)
        if (
            min(64, widest // 2) <= tile.tokens <= widest
            and 32 * tile.warps_rows <= 16 * tile.tokens  # the kernel's copies
            and 16 * tile.warps_rows >= tile.tokens  # fewer read the tokens too often
            and (tile.stages > 2 or tile.tokens > 16)  # a block under way does not cover the memory's latency
            and 64 <= tile.threads <= 512
            and tile.warps_k <= (1 if grouped and m > IN_ORDER_TOKENS else k_blocks)
            and used <= 255
            and used * tile.threads <= 65536
            and shared <= shared_limit
        ):
            resident = blocks_per_sm(tile, planes, grouped, shared, shared_limit)
            ranked.append((clocks(tile, m, n, k_blocks, planes, sms, resident), tile))
    ranked.sort(key=lambda pair: (pair[0], pair[1].threads, -pair[1].stages))
    chosen: list[Tile] = []
    shapes: Counter[tuple[int, int]] = Counter()
    for _, tile in ranked:
        shapes[tile.tokens, tile.rows] += 1
        if shapes[tile.tokens, tile.rows] <= 3:
            chosen.append(tile)
    return chosen[:12]


@functools.lru_cache(maxsize=4096)
def choose(
    m: int,
    n: int,
    k_blocks: int,
    planes: int,
    sms: int,
    group_words: int = 0,
    zero_point: bool = False,
    shared_limit: int = SMALLEST_SHARED_LIMIT,
) -> Tile:
    """The tile for a shape that nobody has tuned."""
    return candidates(m, n, k_blocks, planes, sms, group_words, zero_point, shared_limit)[0]


def constants(
    tile: Tile,
    planes: int,
    dtype: torch.dtype,
    group_words: int = 0,
    zero_point: bool = False,
    programmatic: bool = False,
    shared_limit: int = SMALLEST_SHARED_LIMIT,
) -> dict[str, bool | int | str]:
    """`Config` of the kernel."""
    grouped = group_words > 0
    shared = shared_bytes(tile, planes, group_words, zero_point and grouped)
    return {
        **asdict(tile),
        "planes": planes,
        "grouped": grouped,
        "group_words": max(1, group_words),
        "has_zero_point": zero_point and grouped,
        "programmatic": programmatic,
        "shared_bytes": shared,
        "blocks_per_sm": blocks_per_sm(tile, planes, grouped, shared, shared_limit),
        "T": TYPE_NAMES[dtype],
    }


@functools.lru_cache(maxsize=4096)
def _kernel(
    tile: Tile, planes: int, dtype: torch.dtype, group_words: int, zero_point: bool, programmatic: bool, index: int
) -> tuple[jit.Kernel, int]:
    """(kernel, its shared bytes)."""
    config = constants(tile, planes, dtype, group_words, zero_point, programmatic, gpu(index).shared_limit)
    return jit.load("gemm_mma", "gemm_mma", config, torch.device("cuda", index)), int(config["shared_bytes"])


def run(
    weight: Tensor,
    x: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_sum: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    x_sum: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    group_words: int = 0,
    tile: Tile | None = None,
    programmatic: bool = False,
) -> Tensor:
    """Write x W^T to `out` [M, N] (fp16, bf16 or fp32) and return it.

    R = ceil(N / 16), KB = ceil(K / 256), T >= ceil(M / 8) token tiles, G groups. All tensors are contiguous, all but
    `out` and `bias` at addresses divisible by 16.

    weight: WEIGHTS, int32 [R, KB, planes, 32, 4].   x: ACT_U8, uint8 [16 KB, T, 8, 16].
    x_scale: fp32 [8 T].   x_zero: int32 [8 T].   bias: fp32 [N].
    per channel: w_scale fp32 [16 R], w_zero int32 [16 R], w_sum int32 [16 R] (centered_sum), x_sum int32 [8 T].
    grouped: w_scale fp32 [G, 16 R], w_zero uint8 [G, 16 R] or None, x_sum int32 [G, 8 T] (group_sum), or
        None if w_zero is, w_sum int32 [G, 16 R] (group_total) if the tile is in order, else fp32 [16 R] (offset).
    """
    (m, n), k_blocks, planes, token_tiles = out.shape, weight.shape[1], weight.shape[2], x.shape[1]
    zero_point = group_words > 0 and w_zero is not None
    index = out.get_device()
    if tile is None:
        place = gpu(index)
        tile = choose(m, n, k_blocks, planes, place.sms, group_words, zero_point, place.shared_limit)
    grid = -(-m // tile.tokens), -(-n // tile.rows), 1
    kernel, shared = _kernel(tile, planes, out.dtype, group_words, zero_point, programmatic, index)
    launch.launch(
        kernel,
        grid=grid,
        block=(tile.threads, 1, 1),
        args=[
            *(weight, x, w_scale, w_zero, w_sum, x_scale, x_zero, x_sum, bias, out),
            *(m, n, k_blocks, token_tiles, w_scale.shape[0] if group_words else 1),
        ],
        shared_bytes=shared,
        programmatic=programmatic,
    )
    return out
