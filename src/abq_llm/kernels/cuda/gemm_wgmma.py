"""Prefill on Hopper: y[M, N] = x[M, K] w[N, K]^T by warpgroup products, int8 (`run`) or binary (`run_b1`).

The choice of a tile is a pure function of integers: it compares estimates of what bounds each tile on an H100.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import jit, launch

SHARED_LIMIT = 227 * 1024  # bytes a block may have on sm_90
SHARED_RESERVED = 1024  # of the multiprocessor's 228 KiB for each block on it
TOKENS = (8, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256)  # wgmma's n, for integers
GROUPED_TOKENS = 128  # at most: grouped sums need two sets of accumulators
OUTPUTS = {torch.float16: "half_t", torch.bfloat16: "bf16_t", torch.float32: "float"}

# Of an H100 at its boost clock of 1.755 GHz, in bytes per cycle
L2_BYTES = 24.0  # of each multiprocessor
HBM_BYTES = 1700.0  # of all
START_CYCLES = 4000  # of a block: filling its stages and writing its results, while its tensor cores idle


@dataclass(frozen=True)
class Tile:
    """What one block computes, `tokens` of x by `rows` of w, and how."""

    tokens: int
    consumers: int = 2  # warpgroups, each with `slabs` x 64 rows
    slabs: int = 1
    stages: int = 4  # of x in shared memory, `stage_steps` x 32 columns each
    stage_steps: int = 4
    weight_slots: int = 2  # of the weights' planes in shared memory, 256 columns each
    cluster: int = 1  # blocks that share their loads of x
    resident: int = 1  # blocks on a multiprocessor

    @property
    def rows(self) -> int:
        return self.consumers * self.slabs * 64

    @property
    def threads(self) -> int:
        return (self.consumers + 1) * 128

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        rows = self.rows * self.cluster
        return -(-n // rows) * self.cluster, -(-m // self.tokens), 1


def shared_bytes(tile: Tile, planes: int, out_size: int, x_planes: int | None = None) -> int:
    """The block's shared memory, laid out in `wgmma_tile.cuh`; x_planes is given for binary products."""
    head = -(-(256 + 12 * tile.tokens) // 128) * 128
    stage = tile.tokens * 32 * (tile.stage_steps if x_planes is None else x_planes)
    slot = tile.rows // 16 * planes * 512
    out = tile.consumers * tile.tokens * (64 * out_size + 16)
    return head + max(tile.stages * stage + tile.weight_slots * slot, out)


def _filled(tile: Tile, planes: int, out_size: int, x_planes: int | None = None) -> Tile | None:
    """`tile` with as many stages as fit, up to 8, or None if fewer than two k-blocks of x do."""
    limit = min(SHARED_LIMIT, 228 * 1024 // tile.resident - SHARED_RESERVED)
    per_block = 8 // tile.stage_steps if x_planes is None else 1
    for stages in range(8, 2 * per_block - 1, -1):
        for slots in range(min(4 if x_planes is None else 7, max(2, stages // per_block)), 1, -1):
            filled = replace(tile, stages=stages, weight_slots=slots)
            if shared_bytes(filled, planes, out_size, x_planes) <= limit:
                return filled
    return None


def candidates(m: int, planes: int, grouped: bool = False, out_size: int = 2) -> list[Tile]:
    """Every int8 tile worth timing for m tokens."""
    tiles = []
    most = GROUPED_TOKENS if grouped else 256
    least = min(t for t in TOKENS if t >= min(m, 96))  # no smaller tile than the tokens fill, within reason
    for tokens in TOKENS:
        if not least <= tokens <= min(most, max(least, -(-m // 16) * 16)):
            continue
        steps = 4 if tokens > 64 else 8
        for cluster in (1, 2) if m > 64 else (1,):
            tiles.append(Tile(tokens, 2, 1, stage_steps=steps, cluster=cluster))
            if tokens <= 128 and not grouped:
                tiles.append(Tile(tokens, 2, 2, stage_steps=steps, cluster=cluster))
                tiles.append(Tile(tokens, 1, 2, stage_steps=steps, cluster=cluster, resident=2))
        if tokens <= 64:
            tiles.append(Tile(tokens, 1, 1, stage_steps=8))
        if tokens <= 192:
            tiles.append(Tile(tokens, 1, 1, stage_steps=steps, cluster=4 if m > 64 else 1, resident=2))
    return [filled for tile in tiles if (filled := _filled(tile, planes, out_size))]


def candidates_b1(m: int, planes: int, x_planes: int, out_size: int = 2) -> list[Tile]:
    """Every binary tile worth timing: p + q - 1 sets of accumulators and two blocks' planes must fit in registers."""
    registers = {1: 208, 2: 200}  # by `resident`
    tiles = []
    for tokens in TOKENS:
        needed = (planes + x_planes - 1) * tokens // 2 + 8 * planes
        if not 32 <= tokens <= max(32, -(-m // 16) * 16):
            continue
        if needed <= registers[1]:
            tiles += [Tile(tokens, cluster=cluster) for cluster in ((1, 2) if m > 64 else (1,))]
        if needed <= registers[2] and tokens <= 192:
            cluster = 1 if m <= 64 else 4 if x_planes % 2 == 0 else 2  # a stage has 2 x_planes pieces to share
            tiles.append(Tile(tokens, 1, cluster=cluster, resident=2))
    return [filled for tile in tiles if (filled := _filled(tile, planes, out_size, x_planes))]


def cycles(tile: Tile, m: int, n: int, k_blocks: int, planes: int, sms: int, x_planes: int | None = None) -> float:
    """An estimate of the product's time on a multiprocessor's clock."""
    warpgroups = tile.consumers * tile.slabs
    steps = 8 if x_planes is None else planes * x_planes
    tensor = warpgroups * steps * max(tile.tokens / 2, 16)
    expand = 0 if x_planes is not None else warpgroups * 8 * 2 * (6 + 2.7 * planes)  # two cycles an instruction
    x_bytes = tile.tokens * (256 if x_planes is None else 32 * x_planes) / tile.cluster
    l2 = (x_bytes + tile.rows * planes * 32) / L2_BYTES
    columns, rows, _ = tile.grid(m, n)
    waves = -(-columns * rows // (sms * tile.resident))
    start = waves * START_CYCLES if tile.resident == 1 else START_CYCLES  # a second block works meanwhile
    busy = waves * tile.resident * k_blocks * max(tensor, expand, l2) + start
    return max(busy, n * k_blocks * 32 * planes / HBM_BYTES + START_CYCLES)


def choose(m: int, n: int, k_blocks: int, planes: int, sms: int, grouped: bool = False, out_size: int = 2) -> Tile:
    """The int8 tile with the least estimate. x must have been padded to a multiple of its `tokens`."""
    return min(candidates(m, planes, grouped, out_size), key=lambda tile: cycles(tile, m, n, k_blocks, planes, sms))


def choose_b1(m: int, n: int, k_blocks: int, planes: int, x_planes: int, sms: int, out_size: int = 2) -> Tile:
    tiles = candidates_b1(m, planes, x_planes, out_size)
    return min(tiles, key=lambda tile: cycles(tile, m, n, k_blocks, planes, sms, x_planes))


def constants(
    tile: Tile,
    planes: int,
    dtype: torch.dtype,
    *,
    group_words: int = 0,
    has_zero_point: bool = True,
    programmatic: bool = False,
    debug: bool = False,
) -> dict[str, bool | int | str]:
    """The kernel's Config; `group_words` 0 is per channel. `debug` traps where a kernel would otherwise hang."""
    return {
        "planes": planes,
        "tokens": tile.tokens,
        "consumers": tile.consumers,
        "slabs": tile.slabs,
        "stages": tile.stages,
        "stage_steps": tile.stage_steps,
        "weight_slots": tile.weight_slots,
        "cluster": tile.cluster,
        "resident": tile.resident,
        "grouped": group_words > 0,
        "group_words": max(group_words, 1),
        "has_zero_point": has_zero_point,
        "programmatic": programmatic,
        "debug": debug,
        "T": OUTPUTS[dtype],
    }


def run(
    tile: Tile,
    y: Tensor,
    x: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor | None],
    weight: Tensor,
    rows: tuple[Tensor, Tensor | None, Tensor],
    bias: Tensor | None = None,
    *,
    group_words: int = 0,
    programmatic: bool = False,
    debug: bool = False,
) -> None:
    """y [M, N] = x w^T + bias, in place.

    x        uint8 [16 KB, MT, 8, 16], 8 MT >= M rounded up to `tile.tokens`
    tokens   scale fp32, zero point int32, sum of codes int32 [8 MT]; the sum [groups, 8 MT] if grouped
    weight   int32 [NR, KB, planes, 32, 4]
    rows     scale fp32, zero point int32, centered sum int32 [NR 16];
             if grouped scale fp32, zero point uint8 or None [groups, NR 16], offset fp32 [NR 16]
    """
    planes, k_blocks = weight.shape[2], weight.shape[1]
    has_zero_point = rows[1] is not None
    config = constants(
        tile,
        planes,
        y.dtype,
        group_words=group_words,
        has_zero_point=has_zero_point,
        programmatic=programmatic,
        debug=debug,
    )
    groups = rows[0].shape[0] if group_words else 0
    _launch("gemm_wgmma", config, tile, y, x, x.shape[1], tokens, weight, rows, bias, k_blocks, planes, None, (groups,))


def run_b1(
    tile: Tile,
    y: Tensor,
    x: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor | None],
    weight: Tensor,
    rows: tuple[Tensor, Tensor | None, Tensor],
    bias: Tensor | None = None,
    *,
    programmatic: bool = False,
    debug: bool = False,
) -> None:
    """As `run`, per channel only, with x uint8 [KB, q planes, 2, MT, 8, 16]."""
    planes, k_blocks, x_planes = weight.shape[2], weight.shape[1], x.shape[1]
    config = constants(tile, planes, y.dtype, programmatic=programmatic, debug=debug)
    config["x_planes"] = x_planes
    _launch("gemm_wgmma_b1", config, tile, y, x, x.shape[3], tokens, weight, rows, bias, k_blocks, planes, x_planes, ())


def _launch(
    stem: str,
    config: dict[str, bool | int | str],
    tile: Tile,
    y: Tensor,
    x: Tensor,
    token_tiles: int,
    tokens: tuple[Tensor, Tensor, Tensor | None],
    weight: Tensor,
    rows: tuple[Tensor, Tensor | None, Tensor],
    bias: Tensor | None,
    k_blocks: int,
    planes: int,
    x_planes: int | None,
    more: tuple[int, ...],
) -> None:
    m, n = y.shape
    grid = tile.grid(m, n)
    if token_tiles * 8 < grid[1] * tile.tokens:
        raise AbqError(f"x is padded to {token_tiles * 8} tokens; tiles of {tile.tokens} need {grid[1] * tile.tokens}")
    kernel = jit.load(stem, stem, config, y.device)
    args = [weight, x, *rows, *tokens, bias, y, m, n, k_blocks, token_tiles, *more]
    shared = shared_bytes(tile, planes, y.element_size(), x_planes)
    launch.launch(kernel, grid, (tile.threads, 1, 1), args, shared, programmatic=bool(config["programmatic"]))
