"""Others' kernels: which there are for a scheme, and CUTLASS's library, here one that computes in torch."""

import ctypes
from pathlib import Path

import pytest
import torch

from abq_llm.errors import AbqError
from abq_llm.evaluation import cutlass, rivals
from abq_llm.evaluation.cutlass import Product
from abq_llm.scheme import Scheme

CPU = torch.device("cpu")
SCHEMES = ("W2A8", "W4A16g128", "W2A16", "W2*A8", "W3A16", "W4A6", "W4A4", "W8A8", "W8A8g64")


@pytest.mark.parametrize(
    ("kernel", "has"),
    [
        (rivals.humming, {"W2A8", "W4A16g128", "W2A16", "W3A16", "W4A4", "W8A8", "W8A8g64"}),
        (rivals.gemlite, {"W4A16g128", "W2A16", "W8A8"}),
    ],
    ids=["humming", "gemlite"],
)
def test_the_schemes_that_a_package_has(kernel, has):
    assert {scheme for scheme in SCHEMES if kernel(Scheme.parse(scheme))} == has


def test_what_is_missing_is_a_line(monkeypatch):
    schemes = [Scheme.parse("W2A16")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kernels, lines = rivals.find(("torch", "cutlass", "humming", "gemlite"), schemes, None)
    assert kernels == [] and [line.split(":")[0] for line in lines] == ["cutlass", "humming", "gemlite"]
    assert all(line.endswith(", skipped") for line in lines)
    assert rivals.find(("torch",), schemes, None) == ([], [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    kernels, lines = rivals.find(("humming", "gemlite"), schemes, None)
    assert [(kernel.name, kernel.scheme) for kernel in kernels] == [("humming", "W2A16"), ("gemlite", "W2A16")]
    assert lines == []


def test_four_bits_are_packed_as_cutlass_reads_them():
    codes = torch.tensor([[-7, 7, 0, -1], [1, 2, 3, -4]], dtype=torch.int8)
    assert cutlass.pack(codes, 4).tolist() == [[0x79, 0xF0], [0x21, 0xC3]]
    assert cutlass.pack(codes, 8) is codes


def test_a_file_that_is_no_library(tmp_path):
    for path in (Path("/nowhere/lib.so"), tmp_path):
        with pytest.raises(AbqError, match=r"--cutlass .*: is not what benchmarks/cutlass/build.sh makes"):
            cutlass.open_library(path)


class Library:
    """What the shared library does, on a CPU; of its tiles 0 and 3 are of four bits, and 3 has no kernel for k = 64."""

    def tiles(self):
        return 4

    def tile_bits(self, tile):
        return (4, 8, 8, 4)[tile]

    def tile_name(self, tile):
        return b"mma 1x2x3"

    def workspace_bytes(self, tile, m, n, k, splits):
        return -1 if tile == 3 and k == 64 else 16 * splits

    def run(self, tile, m, n, k, splits, alpha, x, w, y, workspace, stream):
        if self.refuse:
            return 7
        left, right = (self.codes(pointer, rows, k, self.tile_bits(tile)) for pointer, rows in ((x, m), (w, n)))
        result = (alpha * (left @ right.t())).half().contiguous()
        ctypes.memmove(y, result.data_ptr(), result.nbytes)
        return 0

    refuse = False

    @staticmethod
    def codes(pointer, rows, k, bits):
        values = torch.frombuffer(bytearray(ctypes.string_at(pointer, rows * k * bits // 8)), dtype=torch.int8)
        if bits == 4:
            values = torch.stack([values << 4 >> 4, values >> 4], -1)
        return values.reshape(rows, k).float()


@pytest.fixture
def library(monkeypatch):
    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(Product, "_fastest", lambda self, x, w: self._tiles(len(x), len(w), x.shape[1], x.device)[-1])
    return Library()


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.3)])
def test_the_product_is_that_of_the_layer_it_says(library, bits, tolerance):
    product = Product(library, bits)
    weight, size, dense = product.load(16, 64, CPU)
    assert size == 16 * 64 * bits // 8
    for m in (1, 3, 80):
        x = torch.randn(m, 64, generator=torch.Generator().manual_seed(m)).half()
        exact = torch.nn.functional.linear(x, dense)
        assert (product(x, weight) - exact).abs().max() < tolerance * exact.abs().max()


def test_tiles_are_of_the_bits_and_can_compute_the_problem(library):
    def tiles(bits, *problem):
        return [(tile.number, tile.splits) for tile in Product(library, bits)._tiles(*problem, CPU)]

    assert tiles(4, 64, 8, 64) == [(0, 1), (0, 2), (0, 4), (0, 8)]
    assert tiles(4, 65, 8, 96) == [(0, 1), (3, 1)]
    assert all((tile.workspace == 0).all() for tile in Product(library, 8)._tiles(1, 8, 64, CPU))


def test_a_tile_that_refuses(library):
    library.refuse = True
    product = Product(library, 8)
    with pytest.raises(AbqError, match="CUTLASS tile mma 1x2x3, split in 8: status 7"):
        product(torch.ones(1, 64).half(), product.load(8, 64, CPU).weight)
