"""Product for few tokens on binary tensor cores (sm_80 to sm_90; newer ones emulate them). Kernel: `src/decode.cuh`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from abq_llm.kernels.cuda import activations, jit, launch
from abq_llm.kernels.cuda.activations import TYPE_NAMES, Quantized, columns_per_token
from abq_llm.kernels.cuda.problem import Problem

WHOLE_ROW = 2**20  # group_words where there are no groups


@dataclass(frozen=True)
class Tile:
    """A block of `warps` warps does 8 * tiles columns; its warps share the k-blocks, the blocks share the rows."""

    tiles: int
    warps: int = 8
    depth: int = 1  # k-blocks of weights that a warp has under way
    blocks_per_sm: int = 2
    fused: bool = False  # x, one token, is quantized in this kernel

    def x_blocks(self, problem: Problem) -> int:
        """k-blocks of a warp, whose activations it keeps in registers."""
        return -(-problem.k_blocks // (self.warps * self.depth)) * self.depth


def registers(tile: Tile, problem: Problem) -> int:
    """Of a thread, about."""
    in_floats = problem.group_size > 0 or problem.bits == 16
    weights = 4 * tile.depth * problem.planes
    factors = 4 * tile.depth * max(1, 8 // (problem.group_words or 8)) if in_floats else 0
    sums = 4 * tile.tiles * problem.planes if tile.tiles * problem.planes <= 16 and not in_floats else 4 * tile.tiles
    x_blocks = tile.x_blocks(problem)
    prologue = 10 * x_blocks if tile.fused else 0
    addresses = 64 + 6 * tile.tiles if in_floats else 28
    return weights + factors + max(2 * x_blocks * tile.tiles + sums, prologue) + addresses


def candidates(problem: Problem) -> list[Tile]:
    """Tiles worth a measurement, as wide as the tokens want or as registers allow."""
    tiles = tiles_of(problem)
    least = 2 if problem.bits == 16 else 1
    while not (found := _candidates(problem, tiles)) and tiles > least:
        tiles //= 2
    return found


def _candidates(problem: Problem, tiles: int) -> list[Tile]:
    found = []
    for warps, depth, blocks, fused in itertools.product((4, 8, 16), (1, 2, 3, 4, 6), (1, 2, 4), (True, False)):
        tile = Tile(tiles, warps, depth, blocks, fused)
        if (
            (depth - 1) * warps < problem.k_blocks
            and (not fused or (problem.m == 1 and problem.bits <= 8))
            and (warps == 4 or warps <= 2 * problem.k_blocks)
            and 32 * warps * blocks <= 2048
            and registers(tile, problem) <= min(255, 65536 // (32 * warps * blocks))
            and 2 * warps * 64 * tiles * 8 // columns_per_token(problem.bits) <= 47 * 1024
        ):
            found.append(tile)
    return found


def tiles_of(problem: Problem) -> int:
    """Column tiles of a block: 1, 2, 4, 8 or 16."""
    needed = -(-problem.m * columns_per_token(problem.bits) // 8)
    return max(2 if problem.bits == 16 else 1, min(16, 1 << (needed - 1).bit_length()))


@lru_cache(maxsize=4096)
def choose(problem: Problem, sms: int) -> Tile | None:
    """The tile for a shape that nobody has tuned; None if the activations of a warp fit no register file."""
    tiles = candidates(problem)

    def preference(tile: Tile) -> tuple[float, ...]:
        under_way = tile.warps * tile.depth * problem.planes * 512 * tile.blocks_per_sm
        idle = tile.x_blocks(problem) * tile.warps / problem.k_blocks
        return tile.fused, min(under_way, 32 * 1024), tile.warps, -idle, tile.blocks_per_sm, tile.depth

    return max(tiles, key=preference) if tiles else None


def constants(tile: Tile, problem: Problem, dtype_name: str) -> dict[str, bool | int | str]:
    in_floats = problem.group_size > 0 or problem.bits == 16
    return {
        "tiles": tile.tiles,
        "warps": tile.warps,
        "depth": tile.depth,
        "x_blocks": tile.x_blocks(problem),
        "fused": tile.fused,
        "T": dtype_name,
        "Sum": "float" if in_floats else "int",
        "planes": problem.planes,
        "bits": problem.bits,
        "columns": 8 if tile.fused else columns_per_token(problem.bits),
        "symmetric": problem.symmetric,
        "grouped": problem.group_size > 0,
        "in_floats": in_floats,
        "group_words": problem.group_words or WHOLE_ROW,
        "programmatic": True,
        **problem.columns(),
    }


def run(tile: Tile, x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    """x [M, K], contiguous -> [M, N]."""
    planes, w_scale, w_zero, w_total, _ = weight
    columns = 8 if tile.fused else columns_per_token(problem.bits)
    tokens = tile.tiles * 8 // columns
    y = x.new_empty(problem.m, problem.n)
    if tile.fused:
        token = Quantized(x, *3 * (x,))  # type: ignore[arg-type]
        tables: tuple[Tensor | None, ...] = (None, None, None)
        x_tiles = 1
    else:
        token = activations.quantize(x, problem, activations.FRAGMENTS, tokens=max(tokens, 8))
        tables = token.scale, token.zero, token.sums
        x_tiles = token.codes.numel() // (64 * problem.k_blocks)
    kernel = jit.load("decode", "decode", constants(tile, problem, TYPE_NAMES[x.dtype]), x.device)
    row_tiles = planes.shape[0]
    rounds = -(-row_tiles // (_sms(x.get_device()) * tile.blocks_per_sm))
    blocks = -(-row_tiles // rounds)  # as many as share the rows evenly
    launch.launch(
        kernel,
        (blocks, -(-problem.m // tokens), 1),
        (32 * tile.warps, 1, 1),
        [
            *(planes, token.codes, w_scale, w_zero, w_total, *tables, bias, y),
            *(problem.m, problem.n, problem.k, problem.k_blocks, x_tiles, row_tiles, problem.groups),
        ],
        programmatic=True,
    )
    return y


@lru_cache
def _sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
