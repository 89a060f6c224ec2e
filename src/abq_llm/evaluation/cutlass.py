"""CUTLASS's int8 and int4 products as rivals, from the shared library that `benchmarks/cutlass/build.sh` makes.

Products alone, as that of `torch._int_mm`: the codes of x are made beforehand, and one scale is applied to the sums. On
Hopper, int4 runs on the int8 tensor cores: the compiler emulates it. It is what the paper compares its kernels with.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from abq_llm.errors import AbqError
from abq_llm.evaluation.kernels_compared import SEED, Kernel, Loaded

SPLITS, SPLIT_TOKENS = (1, 2, 4, 8), 64  # of k: all are tried up to so many tokens, one beyond
TRIALS = 3
FLUSH_BYTES = 2**27  # written before each trial: more than an L2 holds


class Tile(NamedTuple):
    """One of the library's kernels for one problem."""

    number: int
    splits: int
    workspace: Tensor


@lru_cache
def open_library(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path.resolve()))
        library.cutlass_version.restype = library.tile_name.restype = ctypes.c_char_p
        library.workspace_bytes.restype = ctypes.c_longlong
        library.run.argtypes = [*[ctypes.c_int] * 5, ctypes.c_float, *[ctypes.c_void_p] * 5]
    except (OSError, AttributeError) as error:
        raise AbqError(f"--cutlass {path}: is not what benchmarks/cutlass/build.sh makes ({error})") from error
    return library


def version(path: Path) -> str:
    """The version of CUTLASS: "4.2.0"."""
    return str(open_library(path).cutlass_version().decode())


def cutlass(path: Path, bits: int) -> Kernel:
    """W8A8 or W4A4. y is fp16."""
    product = Product(open_library(path), bits)
    return Kernel("cutlass", f"W{bits}A{bits}", product.load, product)


class Product:
    """(x fp16 [m, k], weight) -> fp16 [m, n]. The codes of x and the tile are made when x is first seen."""

    def __init__(self, library: ctypes.CDLL, bits: int) -> None:
        self._library, self._bits, self._qmax = library, bits, 2 ** (bits - 1) - 1
        self._x: Tensor | None = None

    def load(self, n: int, k: int, device: torch.device) -> Loaded:
        random = torch.Generator(device).manual_seed(SEED)
        codes = torch.randint(-self._qmax, self._qmax + 1, (n, k), generator=random, device=device, dtype=torch.int8)
        weight = pack(codes, self._bits)
        return Loaded(weight, weight.nbytes, codes.half() * self._weight_scale(k))

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if x is not self._x:
            scale = x.abs().amax().item() / self._qmax
            self._codes = pack((x / scale).round().to(torch.int8), self._bits)
            self._alpha = scale * self._weight_scale(x.shape[1])
            self._tile = self._fastest(x, weight)
            self._x = x
        return self._run(self._tile, x, weight)

    def _weight_scale(self, k: int) -> float:
        return 1 / (self._qmax * math.sqrt(k))

    def _run(self, tile: Tile, x: Tensor, weight: Tensor) -> Tensor:
        (m, k), n = x.shape, weight.shape[0]
        y = x.new_empty(m, n)
        pointers = [tensor.data_ptr() for tensor in (self._codes, weight, y, tile.workspace)]
        stream = torch.cuda.current_stream(x.device).cuda_stream
        status = self._library.run(tile.number, m, n, k, tile.splits, self._alpha, *pointers, stream)
        if status:
            name = self._library.tile_name(tile.number).decode()
            raise AbqError(f"CUTLASS tile {name}, split in {tile.splits}: status {status}")
        return y

    def _fastest(self, x: Tensor, weight: Tensor) -> Tile:
        """Of all tiles that can compute the problem, on a weight that is not in the cache."""
        candidates = self._tiles(x.shape[0], weight.shape[0], x.shape[1], x.device)
        if not candidates:
            raise AbqError("no tile of the library can compute it")
        flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=x.device)

        def milliseconds(tile: Tile) -> float:
            self._run(tile, x, weight)
            times = []
            for _ in range(TRIALS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flushed.zero_()  # and while the GPU does that, the host gets ahead of it
                begin.record()
                self._run(tile, x, weight)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            return min(times)

        return min(candidates, key=milliseconds)

    def _tiles(self, m: int, n: int, k: int, device: torch.device) -> list[Tile]:
        found = []
        for index in range(self._library.tiles()):
            if self._library.tile_bits(index) != self._bits:
                continue
            for splits in SPLITS if m <= SPLIT_TOKENS else SPLITS[:1]:
                size = self._library.workspace_bytes(index, m, n, k, splits)
                if size >= 0:
                    found.append(Tile(index, splits, torch.zeros(size + 1, dtype=torch.uint8, device=device)))
        return found


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 [rows, k] -> int8 [rows, k] of 8 bits; of 4 bits uint8 [rows, k / 2], the even column in the low half."""
    if bits == 8:
        return codes
    return (codes[:, ::2] & 15 | codes[:, 1::2] << 4).view(torch.uint8)
