"""Prefill on Hopper: y[M, N] = x[M, K] w[N, K]^T by warpgroup products, int8 (`run`) or binary (`run_b1`).

The choice of a tile is a pure function of integers: it compares estimates of what bounds each tile on an H100.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import jit, launch
from abq_llm.kernels.cuda.activations import TYPE_NAMES
from abq_llm.kernels.cuda.gpus import gpu

SHARED_LIMIT = 227 * 1024  # bytes a block may have on sm_90
SHARED_RESERVED = 1024  # of the multiprocessor's 228 KiB for each block on it
UNIT = 4  # steps of 32 columns whose products start together, unless a group ends before
TOKENS = (32, 48, 64, 96, 112, 128, 144, 160, 176, 192, 208, 240, 256)  # of wgmma's n, those worth a tile

# Cycles of an H100's multiprocessor, fitted to measured products: of int8 ones without groups (see `_cycles`) ...
RESULT_CYCLES = 11  # of a warpgroup's rows, for each token: results leave, and nothing is multiplied
BYTES_CYCLES = 30  # of 64 rows x 256 columns: making bytes of one plane
WAIT_CYCLES = 760  # of 256 columns, half of whose products are under way
# ... and of the others (see `cycles`)
START_CYCLES = 8800  # of a block: filling its stages and writing its results
EXPAND_CYCLES = 42  # of 64 rows x 256 columns: making bytes of one plane
GROUP_CYCLES, GROUP_TOKEN_CYCLES = 200, 1.85  # of 64 rows: adding the sums of a group, and for each token
LATENCY_CYCLES = 760  # of 256 columns, for a warpgroup by itself: waiting for planes, for x and for its products
OTHER_REGISTERS = 16  # of a consumer, beside accumulators, bytes and planes
LATENCY_CYCLES_B1 = 230  # fewer products to wait for


@dataclass(frozen=True)
class Tile:
    """What one block computes, `tokens` of x by `rows` of w, and how."""

    tokens: int
    consumers: int = 2  # warpgroups, each with `slabs` x 64 rows
    slabs: int = 1
    stages: int = 4  # of x in shared memory, `stage_steps` x 32 columns each
    stage_steps: int = 4
    weight_slots: int = 2  # of the weights' planes in shared memory, 256 columns each
    resident: int = 1  # blocks on a multiprocessor
    tail: int = 0  # tokens of the parts into which the tiles of a last round are cut; 0: they are not

    @property
    def rows(self) -> int:
        return self.consumers * self.slabs * 64

    @property
    def threads(self) -> int:
        return (self.consumers + 1) * 128

    def count(self, m: int, n: int) -> int:
        """Tiles of y."""
        return -(-n // self.rows) * -(-m // self.tokens)


def shared_bytes(tile: Tile, planes: int, x_planes: int | None = None) -> int:
    """The block's shared memory, laid out in `wgmma_tile.cuh`; x_planes is given for binary products."""
    head = -(-(384 + 24 * tile.tokens) // 128) * 128
    stage = tile.tokens * 32 * (tile.stage_steps if x_planes is None else x_planes)
    slot = tile.rows // 16 * planes * 512
    out = tile.consumers * 4 * 2 * 16 * 48
    return head + tile.stages * stage + tile.weight_slots * slot + out


def _filled(tile: Tile, planes: int, x_planes: int | None = None) -> Tile | None:
    """`tile` with as many stages as fit, up to 8, or None if fewer than two k-blocks of x do."""
    limit = min(SHARED_LIMIT, 228 * 1024 // tile.resident - SHARED_RESERVED)
    per_block = 8 // tile.stage_steps if x_planes is None else 1
    for stages in range(8, 2 * per_block - 1, -1):
        for slots in range(min(4 if x_planes is None else 7, max(2, stages // per_block)), 1, -1):
            filled = replace(tile, stages=stages, weight_slots=slots)
            if shared_bytes(filled, planes, x_planes) <= limit:
                return filled
    return None


def _fits_registers(tile: Tile, planes: int) -> bool:
    """Whether a consumer's accumulators, the bytes of two units and the planes fit the registers that `wgmma_tile.cuh`
    deals it. One product must also fit what a thread starts with.
    """
    start = 65536 // tile.threads // 8 * 8
    dealt = (start * tile.threads - 24 * 128) // (tile.consumers * 128) // 8 * 8
    words = 1 << (planes - 1).bit_length()
    needed = tile.tokens // 2 + 2 * 4 * UNIT + 4 * words + OTHER_REGISTERS
    return tile.tokens // 2 + 30 <= start and needed <= dealt


def takes_groups(planes: int, group_size: int) -> bool:
    """Whether groups are such that the sum of each is exact in the kernel, and not so short that it would be slow."""
    return planes < 8 and group_size > 32 and (2**planes - 1) * 255 * group_size < 2**23


def _grouped_tokens(planes: int, group_words: int) -> int:
    """At most: grouped sums need two sets of accumulators, and short groups more registers for what comes next."""
    return 128 if group_words < UNIT else 176 if planes <= 4 else 144


def token_counts(m: int) -> list[int]:
    """The `TOKENS` that divide m among fewer blocks than any smaller one does."""
    blocks = [-(-m // tokens) for tokens in TOKENS]
    return [tokens for i, tokens in enumerate(TOKENS) if i == 0 or blocks[i] < blocks[i - 1]]


def _with_tail(tile: Tile, m: int, n: int, sms: int) -> Tile:
    """Tiles left for a last round are cut into parts for all multiprocessors, if each has two parts or more."""
    count = tile.count(m, n)
    if count <= sms or not count % sms:
        return tile
    parts = sms // (count % sms)
    divisors = (tokens for tokens in range(32, tile.tokens, 16) if tile.tokens % tokens == 0)
    return replace(tile, tail=next((tokens for tokens in divisors if tile.tokens // tokens <= parts), 0))


def candidates(m: int, n: int, planes: int, sms: int, group_words: int = 0) -> list[Tile]:
    """Every int8 tile worth timing for m tokens and n rows; `group_words` 0 is per channel."""
    tiles = []
    for tokens in token_counts(m):
        if group_words and tokens > _grouped_tokens(planes, group_words):
            continue
        steps = 4 if tokens > 64 else 8
        tiles.append(Tile(tokens, stage_steps=steps))
        taller = Tile(tokens, 3, stage_steps=steps)  # more rows, so that x is read less often
        if not group_words and _fits_registers(taller, planes):
            tiles.append(taller)
    cut = [_with_tail(tile, m, n, sms) for tile in tiles]
    return [filled for tile in cut if (filled := _filled(tile, planes))]


def candidates_b1(m: int, planes: int, x_planes: int) -> list[Tile]:
    """Every binary tile worth timing: p + q - 1 sets of accumulators and two blocks' planes must fit in registers."""
    fitting = [t for t in token_counts(m) if (planes + x_planes - 1) * t // 2 + 8 * planes <= 208]
    return [filled for tokens in fitting if (filled := _filled(Tile(tokens), planes, x_planes))]


def cycles(
    tile: Tile,
    m: int,
    n: int,
    k_blocks: int,
    planes: int,
    sms: int,
    *,
    x_planes: int | None = None,
    group_words: int = 0,
    products: int = 8,
) -> float:
    """An estimate of the product's time on a multiprocessor's clock. `products` of a warpgroup do 256 columns.

    In a k-block, what a multiprocessor's warpgroups do, expanding weights, multiplying and adding groups, hardly
    overlaps; with little work, the round takes as long as one warpgroup's waits.
    """
    products = products if x_planes is None else planes * x_planes
    expand = EXPAND_CYCLES * planes if x_planes is None else 0

    def round_of(tokens: int) -> float:
        groups = 8 / group_words * (GROUP_CYCLES + GROUP_TOKEN_CYCLES * tokens) if group_words else 0
        work = products * tokens / 2 + expand + groups  # of a warpgroup, per k-block
        alone = work + (LATENCY_CYCLES if x_planes is None else LATENCY_CYCLES_B1)
        return START_CYCLES + k_blocks * max(tile.consumers * work, alone)

    full_rounds, rest = divmod(tile.count(m, n), sms)
    return full_rounds * round_of(tile.tokens) + (round_of(tile.tail or tile.tokens) if rest else 0)


def _cycles(tile: Tile, m: int, n: int, k_blocks: int, planes: int, sms: int) -> float:
    """The same for int8 products without groups.

    In a k-block, the tensor cores are busy all the time; or half of its products run, and in the time of the other half
    the planes of the next k-block are waited for and become bytes.
    """

    def round_of(tokens: int) -> float:
        products = tile.consumers * 8 * tokens / 2
        waits = products / 2 + tile.consumers * BYTES_CYCLES * planes + WAIT_CYCLES
        return tile.consumers * RESULT_CYCLES * tokens + k_blocks * max(products, waits)

    full_rounds, rest = divmod(tile.count(m, n), sms)
    return full_rounds * round_of(tile.tokens) + (round_of(tile.tail or tile.tokens) if rest else 0)


def choose(m: int, n: int, k_blocks: int, planes: int, sms: int, group_words: int = 0) -> Tile:
    """The int8 tile with the least estimate. x must have been padded to a multiple of its `tokens`."""

    def estimate(tile: Tile) -> float:
        if group_words:
            return cycles(tile, m, n, k_blocks, planes, sms, group_words=group_words)
        return _cycles(tile, m, n, k_blocks, planes, sms)

    return min(candidates(m, n, planes, sms, group_words), key=estimate)


def choose_b1(m: int, n: int, k_blocks: int, planes: int, x_planes: int, sms: int) -> Tile:
    tiles = candidates_b1(m, planes, x_planes)
    return min(tiles, key=lambda tile: cycles(tile, m, n, k_blocks, planes, sms, x_planes=x_planes))


def constants(
    tile: Tile,
    planes: int,
    dtype: torch.dtype,
    *,
    group_words: int = 0,
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
        "resident": tile.resident,
        "tail": tile.tail,
        "unit": UNIT,
        "grouped": group_words > 0,
        "group_words": group_words or UNIT,
        "programmatic": programmatic,
        "debug": debug,
        "T": TYPE_NAMES[dtype],
    }


def run(
    tile: Tile,
    y: Tensor,
    x: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor | None],
    weight: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    *,
    group_words: int = 0,
    programmatic: bool = False,
    debug: bool = False,
) -> None:
    """y [M, N] = x w^T + bias, in place.

    x        uint8 [16 KB, MT, 8, 16], 8 MT >= M rounded up to `tile.tokens`
    tokens   scale fp32, zero point int32, sum of codes int32 [8 MT]
    weight   int32 [NR, KB, planes, 32, 4]
    rows     scale fp32, zero point int32, centered sum int32 [NR 16];
             if grouped scale fp32, zero point uint8, centered sum int32 [groups, NR 16]
    """
    planes, k_blocks = weight.shape[2], weight.shape[1]
    config = constants(tile, planes, y.dtype, group_words=group_words, programmatic=programmatic, debug=debug)
    more = (len(rows[0]) if group_words else 0,)
    _launch("gemm_wgmma", config, tile, y, x, x.shape[1], tokens, weight, rows, bias, k_blocks, planes, None, more)


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
    needed = -(-m // tile.tokens) * tile.tokens
    if token_tiles * 8 < needed:
        raise AbqError(f"x is padded to {token_tiles * 8} tokens; tiles of {tile.tokens} need {needed}")
    grid = min(tile.count(m, n), tile.resident * gpu(y.get_device()).sms), 1, 1
    kernel = jit.load(stem, stem, config, y.device)
    args = [weight, x, *rows, *tokens, bias, y, m, n, k_blocks, token_tiles, *more]
    shared = shared_bytes(tile, planes, x_planes)
    launch.launch(kernel, grid, (tile.threads, 1, 1), args, shared, programmatic=bool(config["programmatic"]))
