"""Tiles of the warpgroup products. Pure functions: none of it needs a GPU."""

import itertools

import pytest

from abq_llm.kernels.cuda import gemm_wgmma

SMS = 132
MANY = (65, 300, 512, 2048, 5000)
SHAPES = ((100, 4), (4096, 16), (11008, 16), (13824, 20))  # n, k-blocks


@pytest.mark.parametrize("group_words", [0, 2, 4])
@pytest.mark.parametrize("planes", [1, 4, 7])
def test_candidates_satisfy_the_kernel(planes, group_words):
    for m, (n, _) in itertools.product(MANY, SHAPES):
        tiles = gemm_wgmma.candidates(m, n, planes, SMS, group_words)
        assert tiles and len(set(tiles)) == len(tiles)
        for tile in tiles:
            assert gemm_wgmma.shared_bytes(tile, planes) <= gemm_wgmma.SHARED_LIMIT
            assert tile.stages * tile.stage_steps >= 16 and tile.weight_slots >= 2  # two k-blocks
            assert tile.tail == 0 or (tile.tail % 16 == 0 and tile.tokens % tile.tail == 0)
            assert not group_words or tile.consumers == 2


def test_a_last_round_is_cut_where_blocks_would_be_idle():
    def tail(m, n, tokens=256):
        tiles = gemm_wgmma.candidates(m, n, 4, SMS)
        return next(tile.tail for tile in tiles if tile.tokens == tokens and tile.consumers == 2)

    assert tail(2048, 11008) == 64  # 688 tiles: five rounds, and 28 tiles as 112 parts
    assert tail(2048, 5120) == 128  # 320 tiles: two rounds, and 56 tiles as 112 parts
    assert tail(2048, 4096) == 0  # 256 tiles: one round, and 124 tiles
    assert tail(512, 4096) == 0  # less than a round


@pytest.mark.parametrize("planes", [2, 8])
def test_estimates_grow_with_the_product(planes):
    for tile in gemm_wgmma.candidates(2048, 11008, planes, SMS):
        cycles = [
            gemm_wgmma._cycles(tile, m, n, k, planes, SMS)
            for m, n, k in ((512, 4096, 16), (2048, 11008, 16), (2048, 11008, 43))
        ]
        assert cycles == sorted(cycles) and cycles[0] > 0
