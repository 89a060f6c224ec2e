"""Product for few tokens on binary tensor cores (sm_80 to sm_90; newer ones emulate them). Kernel: `src/decode.cuh`."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

from torch import Tensor

from abq_llm.kernels.cuda import activations, jit, launch
from abq_llm.kernels.cuda.activations import TYPE_NAMES, Quantized, columns_per_token
from abq_llm.kernels.cuda.problem import Problem

WHOLE_ROW = 2**20  # group_words where there are no groups


@dataclass(frozen=True)
class Tile:
    """A block of `warps` warps computes 16 * row_tiles rows for 8 * tiles columns; its warps share the columns k."""

    tiles: int
    warps: int = 8
    row_tiles: int = 1
    depth: int = 2  # k-blocks of weights that a warp has under way
    fused: bool = False  # x, one token, is quantized in this kernel


def registers(tile: Tile, problem: Problem) -> int:
    """Of a thread, about."""
    weights = 8 * tile.depth * tile.row_tiles * problem.planes
    products = tile.row_tiles * tile.tiles
    sums = 4 * products * (problem.planes if products * problem.planes <= 16 else 1)
    return weights + sums + 40


def candidates(problem: Problem) -> list[Tile]:
    """Tiles worth a measurement."""
    needed = -(-problem.m * columns_per_token(problem.bits) // 8)
    least = 2 if problem.bits == 16 else 1
    tiles = max(least, min(16, 1 << (needed - 1).bit_length()))
    found = [
        tile
        for warps, row_tiles, depth, fused in itertools.product((2, 4, 8, 16), (1, 2, 4), (1, 2, 4), (False, True))
        if registers(tile := Tile(tiles, warps, row_tiles, depth, fused), problem) <= min(255, 65536 // (32 * warps))
        and depth * warps <= max(2, problem.k_blocks)
        and (not fused or (problem.m == 1 and problem.bits <= 8))
        and 16 * row_tiles * warps * tiles * 8 // columns_per_token(problem.bits) * 4 <= 40 * 1024
    ]
    return found or [Tile(tiles, 2, 1, 1)]


def choose(problem: Problem) -> Tile:
    """The tile for a shape that nobody has tuned."""
    tiles = candidates(problem)
    warps = min(8, max(tile.warps for tile in tiles))
    row_tiles = 1 if tiles[0].tiles == 1 else 2  # more tokens: share the reads of their planes among more rows
    wanted = [tile for tile in tiles if tile.warps <= warps and tile.row_tiles <= row_tiles]
    return max(wanted, key=lambda tile: (tile.fused, tile.warps, tile.row_tiles, tile.depth <= 2, tile.depth))


def constants(tile: Tile, problem: Problem, dtype_name: str) -> dict[str, bool | int | str]:
    in_floats = problem.group_size > 0 or problem.bits == 16
    return {
        **asdict(tile),
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
    launch.launch(
        kernel,
        (-(-row_tiles // tile.row_tiles), -(-problem.m // tokens), 1),
        (32 * tile.warps, 1, 1),
        [
            *(planes, token.codes, w_scale, w_zero, w_total, *tables, bias, y),
            *(problem.m, problem.n, problem.k, problem.k_blocks, x_tiles, row_tiles, problem.groups),
        ],
        programmatic=True,
    )
    return y
