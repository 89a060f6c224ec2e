"""The tiles of the product of 16-bit floats for few tokens, and x as it reads it. None of it needs a GPU."""

import pytest
import torch

from abq_llm.kernels.cuda import gemm_mma_f16
from abq_llm.kernels.cuda.gemm_mma_f16 import Tile
from abq_llm.kernels.cuda.gpus import Gpu
from abq_llm.kernels.cuda.problem import Problem
from abq_llm.scheme import Scheme

GPUS = [Gpu(80, 108, 163 * 1024), Gpu(86, 82, 99 * 1024), Gpu(90, 132, 227 * 1024), Gpu(120, 170, 99 * 1024)]


def problem(scheme, m, n=4096, k=4096):
    return Problem.of(m, n, k, Scheme.parse(scheme))


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.capability}")
@pytest.mark.parametrize("scheme", ["W1A16", "W4A16g128", "W8*A16", "W8*A16g32", "W3A16g33"])
def test_every_product_has_tiles_and_they_fit(scheme, gpu):
    for n, k in ((1, 1), (100, 416), (4096, 4096), (11008, 4096), (4096, 28672), (128256, 8192)):
        for m in (1, 2, 3, 7, 8, 16, 17, 33, 64):
            shape = problem(scheme, m, n, k)
            tiles = gemm_mma_f16.candidates(shape, gpu.sms, gpu.shared_limit)
            assert 1 <= len(tiles) == len(set(tiles)) <= 24
            assert gemm_mma_f16.choose(shape, gpu.sms, gpu.shared_limit) in tiles
            for tile in tiles:
                assert tile.tokens in (1, 2, 4) or tile.tokens % 8 == 0
                assert 2 * tile.tokens >= m
                assert tile.stages >= 2 and tile.warps_k <= shape.k_blocks
                assert gemm_mma_f16.shared_bytes(tile, shape) <= gpu.shared_limit - 512  # barriers
                blocks = tile.blocks(shape, gpu.sms)
                shares = [(i + 1) * shape.row_tiles // blocks - i * shape.row_tiles // blocks for i in range(blocks)]
                assert sum(shares) == shape.row_tiles and 1 <= min(shares) <= max(shares) <= tile.block_row_tiles


def test_shared_memory_by_hand():
    tile = Tile(8, 3, 2, 4, 1, 2)  # 6 row tiles, 4 k-blocks a stage
    weights, x, rows = 6 * 4 * 4 * 512, 8 * (4 * 512 + 32), 96
    assert gemm_mma_f16.shared_bytes(tile, problem("W4A16", 8)) == 2 * (weights + x) + 8 * rows
    tables = 6 * 4 * 2 * (64 + 16)  # two groups meet a k-block
    assert gemm_mma_f16.shared_bytes(tile, problem("W4A16g128", 8)) == 2 * (weights + tables + x) + 8 * rows
    sums = 16 * 64 * (16 + 4) * 4
    assert gemm_mma_f16.shared_bytes(Tile(64, 1, 1, 16, 1, 2), problem("W1A16", 64)) >= sums


@pytest.mark.parametrize(
    ("warps", "registers"),
    [(4, 255), (8, 255), (9, 168), (10, 168), (12, 168), (16, 128), (18, 96), (20, 96), (32, 64)],
)
def test_registers_of_the_quarters_of_an_sm(warps, registers):
    assert gemm_mma_f16.registers_for(warps) == registers


@pytest.mark.parametrize(
    ("scheme", "k", "columns"),
    [
        ("W4A16", 416, 416),
        ("W4A16", 70, 96),
        ("W4A16g128", 4096, 4096),
        ("W4A16g40", 100, 160),
        ("W4A16g33", 33 * 2, 128),
    ],
)
def test_x_has_the_columns_of_the_layout(scheme, k, columns):
    shape = problem(scheme, 3, k=k)
    x = torch.arange(3.0 * k).view(3, k).half()
    wanted = torch.zeros(3, columns).half()
    size, padded = shape.group_size or k, shape.group_padded or columns
    for column in range(k):
        wanted[:, column // size * padded + column % size] = x[:, column]
    found = gemm_mma_f16.padded(x, shape)
    assert gemm_mma_f16.columns(shape) == columns
    assert torch.equal(found, wanted) and found.is_contiguous() and found.data_ptr() % 16 == 0


def test_x_that_lies_askew_is_copied():
    x = torch.arange(65.0).half()[1:].view(1, 64)
    found = gemm_mma_f16.padded(x, problem("W4A16", 1, k=64))
    assert torch.equal(found, x) and found.data_ptr() % 16 == 0
