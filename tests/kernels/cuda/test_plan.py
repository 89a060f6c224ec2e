"""What a product is in integers, and the tiles of `gemm_mma` for it. Pure functions: none of it needs a GPU."""

import itertools

import pytest

from abq_llm.kernels.cuda import gemm_mma
from abq_llm.kernels.cuda.gemm_mma import Tile
from abq_llm.kernels.cuda.problem import BLOCK, Problem, groups_in_block
from abq_llm.scheme import Scheme

TOKENS = (1, 8, 9, 33, 100, 4096)
SHAPES = ((8, 32), (100, 576), (11008, 4096))  # (n, k)
GROUP_WORDS = (0, 1, 3, 4, 8, 512)
LIMITS = (99 * 1024, 227 * 1024)
H100 = (132, 227 * 1024)  # SMs, shared bytes that a block may have


def candidates(
    m: int, n: int, k: int, planes: int, words: int = 0, zero_point: bool = False, gpu: tuple[int, int] = H100
) -> list[Tile]:
    sms, limit = gpu
    return gemm_mma.candidates(m, n, -(-k // BLOCK), planes, sms, words, zero_point, limit)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("planes", [1, 2, 3, 5, 8])
def test_every_product_has_tiles_and_they_fit(planes, limit):
    for m, (n, k), words in itertools.product(TOKENS, SHAPES, GROUP_WORDS):
        for zero_point in {False, words > 0}:
            tiles = candidates(m, n, k, planes, words, zero_point, (132, limit))
            assert 1 <= len(tiles) <= 12
            assert len(set(tiles)) == len(tiles)
            for tile in tiles:
                registers = gemm_mma.registers(tile, planes, words > 0)
                shared = gemm_mma.shared_bytes(tile, planes, words, zero_point)
                assert registers <= 255
                assert registers * tile.threads <= 65536
                assert shared <= limit
                # the static assertions of the kernel
                assert tile.stages >= 2
                assert tile.warps_k <= 15
                assert 64 <= tile.threads <= 1024
                assert 32 * tile.warps_rows <= 16 * tile.tokens
                assert tile.threads % (tile.rows // 8) == 0
                # no slice of the columns is empty, no token tile would be without tokens
                assert tile.warps_k <= -(-k // BLOCK)
                assert tile.tokens < 2 * max(m, 8)


def test_what_the_compiler_is_held_to_can_be_had():
    """Blocks that the kernel is compiled to have on an SM, against an H100's registers, threads and shared memory."""
    for m, planes, words in itertools.product(TOKENS, (2, 3, 8), GROUP_WORDS):
        for tile in candidates(m, 11008, 4096, planes, words, words > 0):
            shared = gemm_mma.shared_bytes(tile, planes, words, words > 0)
            resident = gemm_mma.blocks_per_sm(tile, planes, words > 0, shared, H100[1])
            assert resident >= 1
            assert resident * tile.threads <= 2048
            assert resident * (shared + 1024) <= 228 * 1024
            assert resident * tile.threads * gemm_mma.registers(tile, planes, words > 0) <= 65536


def test_shared_memory_by_hand():
    queue = 4 * 3 * (8 * 256 + 32 * 16 * 2)  # slices x stages x (8 tokens, 32 bytes a row and plane)
    row_data, token_data = 16 * 16, 12 * 8
    assert gemm_mma.shared_bytes(Tile(8, 1, 1, 4, 3), planes=2) == queue + row_data + token_data
    # a group of 128 columns: two of them meet a block; a scale and a zero point for every row, a sum for every token
    grouped = 4 * 3 * 2 * (16 * 5 + 8 * 4)
    assert gemm_mma.shared_bytes(Tile(8, 1, 1, 4, 3), 2, 4, True) == queue + grouped + row_data + token_data
    # in order: a sum for every row, and the zero point of every token
    queue, grouped = queue // 4, grouped // 4 + 3 * (2 * 16 * 4 + 8 * 4)
    assert gemm_mma.shared_bytes(Tile(8, 1, 1, 1, 3), 2, 4, True) == queue + grouped + row_data + token_data


def test_shared_memory_also_holds_the_slices_sums():
    tile = Tile(128, 8, 2, 2, 2)
    sums = 4 * 2 * 128 * (256 + 4)
    assert gemm_mma.shared_bytes(tile, planes=1) == sums + 16 * 256 + 12 * 128


@pytest.mark.parametrize(
    ("words", "slots"), [(1, 8), (2, 4), (3, 4), (4, 2), (6, 2), (7, 2), (8, 1), (12, 2), (512, 1)]
)
def test_groups_that_meet_a_block(words, slots):
    tile = Tile(8, 2, 1, 1, 2)
    plain = gemm_mma.shared_bytes(tile, planes=2)
    assert gemm_mma.shared_bytes(tile, 2, words) - plain == 2 * (slots * 8 * 32 + 4 * 8)
    assert gemm_mma.shared_bytes(tile, 2, words, True) - plain == 2 * (slots * (9 * 32 + 4 * 8) + 4 * 8)


def test_groups_that_meet_a_block_by_counting():
    for words in (*range(1, 70), 513, 1000):
        assert groups_in_block(words) == max(len({(8 * kb + i) // words for i in range(8)}) for kb in range(words))


def test_shared_memory_grows_with_the_queue():
    by_stages = [gemm_mma.shared_bytes(Tile(16, 2, 1, 4, stages), 4) for stages in (2, 3, 4)]
    by_planes = [gemm_mma.shared_bytes(Tile(16, 2, 1, 4, 3), planes) for planes in range(1, 9)]
    assert by_stages == sorted(set(by_stages))
    assert by_planes == sorted(set(by_planes))


def test_the_choice_is_the_first_candidate_every_time():
    for m, (n, k), planes in itertools.product(TOKENS, SHAPES, (2, 3, 8)):
        arguments = (m, n, -(-k // BLOCK), planes, 132, 4, True, H100[1])
        chosen = gemm_mma.choose(*arguments)
        gemm_mma.choose.cache_clear()
        assert gemm_mma.choose(*arguments) == chosen == gemm_mma.candidates(*arguments)[0]


@pytest.mark.parametrize(
    ("m", "n", "k", "planes", "words", "fastest"),
    [
        (1, 4096, 4096, 2, 0, Tile(8, 1, 1, 8, 4)),
        (8, 11008, 4096, 2, 0, Tile(8, 1, 1, 4, 3)),
        (8, 11008, 4096, 4, 0, Tile(8, 1, 1, 2, 4)),
        (8, 11008, 4096, 8, 0, Tile(8, 1, 1, 2, 4)),
        (8, 11008, 4096, 2, 4, Tile(8, 2, 1, 4, 3)),
        (16, 11008, 4096, 2, 0, Tile(16, 2, 1, 4, 3)),
        (16, 11008, 4096, 4, 0, Tile(16, 1, 2, 2, 4)),
        (32, 11008, 4096, 2, 0, Tile(32, 2, 1, 2, 3)),
        (64, 11008, 4096, 4, 0, Tile(32, 2, 2, 2, 2)),
        (512, 11008, 4096, 2, 0, Tile(64, 4, 2, 1, 3)),
        (2048, 11008, 4096, 8, 0, Tile(128, 8, 2, 1, 2)),
        (2048, 11008, 4096, 4, 4, Tile(64, 4, 2, 1, 2)),
    ],
)
def test_tiles_measured_to_be_the_fastest_on_an_h100_are_tried(m, n, k, planes, words, fastest):
    assert fastest in candidates(m, n, k, planes, words, words > 0)


def test_clocks_follow_the_work():
    tile, shape = Tile(64, 4, 2, 1, 3), (11008, 16, 2, 132)
    assert gemm_mma.clocks(tile, 2048, *shape, resident=3) > gemm_mma.clocks(tile, 512, *shape, resident=3)
    assert gemm_mma.clocks(tile, 512, *shape, resident=1) > gemm_mma.clocks(tile, 512, *shape, resident=3)
    needed = 6  # 8 x 86 blocks on 132 SMs
    assert gemm_mma.clocks(tile, 512, *shape, resident=needed) == gemm_mma.clocks(tile, 512, *shape, resident=100)


@pytest.mark.parametrize(
    ("k", "size", "padded", "words", "groups", "last", "blocks"),
    [
        (4096, 128, 128, 4, 32, 128, 16),
        (4096, 96, 96, 3, 43, 64, 16),  # a short last group
        (4096, 40, 64, 2, 103, 16, 26),  # a group is padded to a multiple of 32: 102 * 64 + 16 columns
        (1000, 40, 64, 2, 25, 40, 7),  # 24 * 64 + 40
        (130, 128, 128, 4, 2, 2, 1),
    ],
)
def test_groups_in_columns_of_the_layout(k, size, padded, words, groups, last, blocks):
    problem = Problem.of(3, 64, k, Scheme.parse(f"W4A8g{size}"))
    assert problem.group_size == size
    assert (problem.group_padded, problem.group_words, problem.groups) == (padded, words, groups)
    assert (problem.last_group, problem.k_blocks) == (last, blocks)
    assert problem.columns() == {"group_size": size, "group_padded": padded}


@pytest.mark.parametrize("k", [32, 100, 256, 257, 11008])
@pytest.mark.parametrize("scheme", ["W2A8", "W3A8g16384"])
def test_one_group_is_a_scale_per_channel(scheme, k):
    problem = Problem.of(1, 64, k, Scheme.parse(scheme))
    assert (problem.group_size, problem.group_words, problem.groups, problem.last_group) == (0, 0, 1, k)
    assert problem.k_blocks == -(-k // 256)
    assert problem.columns() == {"group_size": 32, "group_padded": 32}


def test_a_group_of_all_columns_is_no_group():
    assert Problem.of(1, 64, 128, Scheme.parse("W4A8g128")).group_size == 0
    assert Problem.of(1, 64, 129, Scheme.parse("W4A8g128")).group_size == 128


@pytest.mark.parametrize(
    ("scheme", "planes", "bits", "symmetric"),
    [
        ("W2A8", 2, 8, False),
        ("W2*A4", 3, 4, False),
        ("W8A8", 8, 8, True),
        ("W8*A8", 9, 8, False),
        ("W4A16g64", 4, 16, True),
    ],
)
def test_codes(scheme, planes, bits, symmetric):
    problem = Problem.of(5, 64, 512, Scheme.parse(scheme, activation_symmetric=symmetric))
    assert (problem.m, problem.n, problem.k) == (5, 64, 512)
    assert (problem.planes, problem.bits, problem.symmetric) == (planes, bits, symmetric and bits < 16)


def test_sums_that_would_not_fit_are_split():
    """255 * 255 * k stays below 2^31 up to k = 33025; beyond, equal scales in groups of 2^14 columns."""
    w8a8 = Scheme.parse("W8A8")
    assert Problem.of(1, 64, 33025, w8a8).group_size == 0
    split = Problem.of(1, 64, 33026, w8a8)
    assert (split.group_size, split.group_words, split.groups, split.last_group) == (2**14, 512, 3, 258)
    assert split.k_blocks == 130
    assert 255 * 255 * split.group_size < 2**31


def test_sums_that_fit_are_not_split():
    assert Problem.of(1, 64, 33026, Scheme.parse("W4A8")).group_size == 0
    assert Problem.of(1, 64, 33026, Scheme.parse("W8A16")).group_size == 0  # activations with scales of their own
    assert Problem.of(1, 64, 33026, Scheme.parse("W8A8g128")).group_size == 128
