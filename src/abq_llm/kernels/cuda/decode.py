"""Product for few tokens on binary tensor cores (sm_80 to sm_90; newer ones emulate them). Kernel: `src/decode.cuh`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from abq_llm.kernels.cuda import activations, jit, launch
from abq_llm.kernels.cuda.activations import TYPE_NAMES, Quantized, columns_per_token
from abq_llm.kernels.cuda.gpus import gpu
from abq_llm.kernels.cuda.problem import BLOCK, Problem, groups_in_block

WHOLE_ROW = 2**20  # group_words where there are no groups
FUSED_TOKENS = 4  # up to which every block may quantize x anew
FUSED_BLOCKS = 96  # k-blocks of all tokens, up to which it is worth it
FUSED_TWICE_BLOCKS = 32  # the same, up to which two blocks of an SM may do it
STAGES = (1, 2, 3, 4, 6, 8, 12, 16)
STATIC_LIMIT = 32 * 1024  # bytes of shared memory for sums; with what a fused token needs, a kernel may have 48 KiB
# Bytes of an SM that may be under way before x is here: more delays the end of the kernel before, fewer waste bandwidth
WINDOW_BYTES = 32 * 1024
GROUPED_BYTES = 132 * 1024  # that leave room for blocks of the next kernel, which may then expect its weights
RESERVED = 1024  # bytes of shared memory that a block takes besides its own


@dataclass(frozen=True)
class Tile:
    """A block of `warps` warps does 8 * tiles columns; its warps share the k-blocks, the blocks share the rows."""

    tiles: int
    warps: int = 16
    stages: int = 4  # of the queue of weights, a k-block for every warp each
    blocks_per_sm: int = 1
    fused: bool = False  # x, a few tokens, is quantized in this kernel
    early: bool = False  # the next kernel's weights may come before this one's x

    def x_blocks(self, problem: Problem) -> int:
        """k-blocks of a warp, whose activations it keeps in registers."""
        return -(-problem.k_blocks // self.warps)

    def columns(self, problem: Problem) -> int:
        """Of the product, for one token: a single token may fill a tile by itself."""
        return 8 if self.fused and problem.m == 1 else columns_per_token(problem.bits)

    def tokens(self, problem: Problem) -> int:
        return self.tiles * 8 // self.columns(problem)

    def rounds(self, problem: Problem, sms: int) -> int:
        """Row tiles of a block, at most."""
        return -(-problem.row_tiles // (sms * self.blocks_per_sm))

    def pass_tiles(self, problem: Problem, sms: int) -> int:
        """Row tiles whose sums meet at a time, up to 8, with a thread for every output unless it is one tile."""
        outputs = 16 * self.tokens(problem)
        sums = 2 * 4 * self.warps * outputs  # bytes
        rounds = self.rounds(problem, sms)
        passes = -(-rounds // max(1, min(8, 32 * self.warps // outputs, STATIC_LIMIT // sums)))
        return -(-rounds // passes)


def block_bytes(problem: Problem) -> int:
    """Shared memory of a k-block of a row tile, with its scales and zero points."""
    if problem.group_size:
        return 512 * problem.planes + 80 * groups_in_block(problem.group_words)
    return 512 * problem.planes + (64 if problem.bits == 16 else 0)


def shared_bytes(tile: Tile, problem: Problem) -> int:
    """Dynamic shared memory of a block, as in `DecodeShape` (which refuses to compile when they differ)."""
    return tile.warps * tile.stages * block_bytes(problem)


def window(tile: Tile, problem: Problem) -> int:
    """Stages of a block that may be under way before x is here."""
    return max(1, WINDOW_BYTES // (tile.blocks_per_sm * tile.warps * block_bytes(problem)))


def registers(tile: Tile, problem: Problem) -> int:
    """Of a thread, about."""
    in_floats = problem.group_size > 0 or problem.bits == 16
    factors = 4 * max(1, 8 // (problem.group_words or 8)) if in_floats else 0
    by_plane = tile.tiles * problem.planes <= 16 and not in_floats
    sums = 4 * tile.tiles * (problem.planes if by_plane else 1)
    product = 4 * min(problem.planes, 4) + factors + 2 * tile.x_blocks(problem) * tile.tiles + sums
    tokens = tile.tokens(problem)
    prologue = (4 * tokens + 2 * tile.tiles) * tile.x_blocks(problem) if tile.fused else 0
    return max(product, prologue) + (20 if by_plane else 60)


def resident(tile: Tile, problem: Problem) -> int:
    """Blocks that an SM should hold: twice as many as work, so that the next kernel's are already there."""
    twice = 2 * tile.blocks_per_sm
    return twice if twice * _threads(tile) * registers(tile, problem) <= 65536 else tile.blocks_per_sm


def candidates(problem: Problem, sms: int, shared_limit: int) -> list[Tile]:
    """Tiles worth a measurement, as wide as the tokens want or as registers allow."""
    tiles = tiles_of(problem)
    least = 2 if problem.bits == 16 else 1
    while not (found := _candidates(problem, tiles, sms, shared_limit)) and tiles > least:
        tiles //= 2
    return found


def _candidates(problem: Problem, tiles: int, sms: int, shared_limit: int) -> list[Tile]:
    found = []
    choices = (False,) if problem.bits == 16 or problem.m > FUSED_TOKENS else (True, False)
    sizes = (4, 8, 16), STAGES, (1, 2), choices, (False, True)
    for warps, stages, blocks, fused, early in itertools.product(*sizes):
        tile = Tile(tiles, warps, stages, blocks, fused, early)
        if (
            (warps == 4 or warps < 2 * problem.k_blocks)
            and stages < 2 * tile.rounds(problem, sms) * tile.x_blocks(problem)
            and registers(tile, problem) <= min(255, 65536 // (_threads(tile) * blocks))
            and _sums_bytes(tile, problem) <= STATIC_LIMIT
            and blocks * _shared(tile, problem) <= shared_limit
        ):
            found.append(tile)
    alone = [
        tile for tile in found if tile.fused and problem.m == 1
    ]  # always faster, where a warp can hold its part of x
    return alone or found


def _threads(tile: Tile) -> int:
    """Of a block, with the warp that copies, which GPUs without a copy engine do without."""
    return 32 * (tile.warps + 1)


def _shared(tile: Tile, problem: Problem) -> int:
    """All that a block takes of an SM, at most."""
    return shared_bytes(tile, problem) + min(STATIC_LIMIT, 8 * _sums_bytes(tile, problem)) + RESERVED


def _sums_bytes(tile: Tile, problem: Problem) -> int:
    """Static shared memory for the sums of a row tile by all warps, twice."""
    return 2 * 4 * tile.warps * 16 * tile.tokens(problem)


def tiles_of(problem: Problem) -> int:
    """Column tiles of a block: 1, 2, 4, 8 or 16."""
    needed = -(-problem.m * columns_per_token(problem.bits) // 8)
    return max(2 if problem.bits == 16 else 1, min(16, 1 << (needed - 1).bit_length()))


@lru_cache(maxsize=4096)
def choose(problem: Problem, sms: int, shared_limit: int) -> Tile | None:
    """The tile for a shape that nobody has tuned; None if the activations of a warp fit no register file."""
    tiles = candidates(problem, sms, shared_limit)
    share = -(-problem.row_tiles // sms) * problem.k_blocks * block_bytes(problem)  # bytes of an SM
    # Two blocks begin and end at different times, but each quantizes x; one may leave room for the next kernel's
    fuses = problem.m * problem.k_blocks <= FUSED_BLOCKS
    little = problem.m * problem.k_blocks <= FUSED_TWICE_BLOCKS
    small = little and problem.row_tiles <= 2 * sms
    one = (2 * share <= shared_limit and not (small and problem.m == 1)) or (fuses and not little)
    warps = 16 if fuses and problem.m <= 2 and not small else 8

    def preference(tile: Tile) -> tuple[float, ...]:
        steps = tile.rounds(problem, sms) * tile.x_blocks(problem)
        queued = min(tile.stages, steps) / steps  # of the weight, at a time
        idle = tile.x_blocks(problem) * tile.warps / problem.k_blocks
        return (
            tile.fused == fuses,
            queued,
            (tile.blocks_per_sm == 1) == one,
            tile.warps > 4,
            -idle,
            tile.warps == warps,
            tile.warps,
            -abs(tile.stages - steps - 1),
            tile.stages if small else -tile.stages,
            not tile.early,
        )

    def preference_grouped(tile: Tile) -> tuple[float, ...]:
        taken = tile.blocks_per_sm * _shared(tile, problem)
        return (
            tile.fused == fuses,
            tile.blocks_per_sm == 2,
            tile.warps == 8,
            tile.stages > 1,
            taken <= GROUPED_BYTES,
            tile.stages if taken <= GROUPED_BYTES else -tile.stages,
            not tile.early,
        )

    return max(tiles, key=preference_grouped if problem.group_size else preference) if tiles else None


def constants(tile: Tile, problem: Problem, dtype_name: str, aligned: bool, sms: int) -> dict[str, bool | int | str]:
    in_floats = problem.group_size > 0 or problem.bits == 16
    return {
        "tiles": tile.tiles,
        "warps": tile.warps,
        "stages": tile.stages,
        "pass": tile.pass_tiles(problem, sms),
        "refill": tile.rounds(problem, sms) * tile.x_blocks(problem) > tile.stages,
        "full_rounds": problem.k_blocks // tile.warps,
        "full_blocks": problem.k % BLOCK == 0 and problem.group_size == problem.group_padded,
        "early": tile.early,
        "x_blocks": tile.x_blocks(problem),
        "shared_bytes": shared_bytes(tile, problem),
        "window": window(tile, problem),
        "resident": resident(tile, problem),
        "fused": tile.fused,
        "aligned": aligned and tile.fused,
        "T": dtype_name,
        "Sum": "float" if in_floats else "int",
        "planes": problem.planes,
        "bits": problem.bits,
        "columns": tile.columns(problem),
        "symmetric": problem.symmetric,
        "grouped": problem.group_size > 0,
        "in_floats": in_floats,
        "group_words": problem.group_words or WHOLE_ROW,
        "programmatic": True,
        **problem.columns(),
    }


def run(tile: Tile, x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    """x [M, K], contiguous -> [M, N]."""
    planes, w_scale, w_zero, w_total, *_ = weight
    tokens = tile.tokens(problem)
    y = x.new_empty(problem.m, problem.n)
    if tile.fused:
        token = Quantized(x, *3 * (x,))  # type: ignore[arg-type]
        tables: tuple[Tensor | None, ...] = (None, None, None)
        x_tiles = 1
    else:
        token = activations.quantize(x, problem, activations.FRAGMENTS, tokens=max(tokens, 8))
        tables = token.scale, token.zero, token.sums
        x_tiles = token.codes.numel() // (64 * problem.k_blocks)
    place = gpu(x.get_device())
    config = constants(tile, problem, TYPE_NAMES[x.dtype], activations.aligned(x, problem), place.sms)
    kernel = jit.load("decode", "decode", config, x.device)
    row_tiles = problem.row_tiles
    blocks = -(-row_tiles // tile.rounds(problem, place.sms))  # as many as share the rows evenly
    launch.launch(
        kernel,
        (blocks, -(-problem.m // tokens), 1),
        (_threads(tile) if place.has_copy_engine else 32 * tile.warps, 1, 1),
        [
            *(planes, token.codes, w_scale, w_zero, w_total, *tables, bias, y),
            *(problem.m, problem.n, problem.k, problem.k_blocks, x_tiles, row_tiles, problem.groups),
        ],
        shared_bytes=shared_bytes(tile, problem),
        programmatic=True,
    )
    return y
