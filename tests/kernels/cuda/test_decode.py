"""The tiles of the product for few tokens, and which path a product takes: functions of integers."""

import pytest

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import decode, gemm_mma, gemm_mma_f16, gemm_wgmma, gemm_wgmma_f16, plan
from abq_llm.kernels.cuda.activations import columns_per_token
from abq_llm.kernels.cuda.gpus import Gpu
from abq_llm.kernels.cuda.problem import Problem
from abq_llm.scheme import Scheme

GPUS = {
    80: Gpu(80, 108, 163 * 1024),
    86: Gpu(86, 82, 99 * 1024),
    89: Gpu(89, 128, 99 * 1024),
    90: Gpu(90, 132, 227 * 1024),
    100: Gpu(100, 148, 227 * 1024),
    120: Gpu(120, 170, 99 * 1024),
}
SMS, LIMIT = GPUS[90].sms, GPUS[90].shared_limit
SCHEMES = ["W1A1", "W2A2", "W2*A8", "W3A5", "W8A8", "W8*A8", "W4A8g128", "W2A8g33", "W8*A4g32", "W1A16", "W4A16g32"]
COLUMNS = [1, 256, 1000, 4096, 11008, 28672, 100_000]
TOKENS = [1, 2, 7, 8, 16, 33, 64, 2048]


def problem(m, scheme, n=4096, k=4096):
    return Problem.of(m, n, k, Scheme.parse(scheme))


def problems():
    return [problem(m, scheme, k=k) for scheme in SCHEMES for k in COLUMNS for m in TOKENS]


def name(value):
    return f"{value.m}x{value.k}-W{value.planes}A{value.bits}g{value.group_size}"


# --- decode


def check_decode(tile, shape):
    """What the kernel takes for granted of its Config."""
    config = decode.constants(tile, shape, "half_t", True, SMS)
    columns, tiles, x_blocks = config["columns"], config["tiles"], config["x_blocks"]
    tokens, threads = 8 * tiles // columns, 32 * tile.warps
    assert columns >= min(shape.bits, 16) and columns in (2, 4, 8, 16)
    assert tiles in (1, 2, 4, 8, 16) and 8 * tiles % columns == 0  # whole tokens
    assert columns != 16 or tiles % 2 == 0  # a token of 16 bits takes two tiles

    # every warp's share of the columns; a pass has a thread for every output, or is of one tile
    assert x_blocks * tile.warps >= shape.k_blocks > (x_blocks - 1) * tile.warps
    assert config["pass"] == 1 or config["pass"] * tokens * 16 <= threads
    assert config["refill"] or tile.rounds(shape, SMS) * x_blocks <= tile.stages
    assert config["full_rounds"] * tile.warps <= shape.k_blocks < (config["full_rounds"] + 1) * tile.warps
    assert config["full_blocks"] == (shape.k == 256 * shape.k_blocks and shape.group_size == shape.group_padded)

    # what an SM and a block may have
    launched = threads + 32  # one more warp copies
    assert launched <= 1024 and launched * tile.blocks_per_sm <= 2048
    assert decode.registers(tile, shape) <= 255
    assert decode.registers(tile, shape) * launched * config["resident"] <= 65536
    partial = 2 * config["pass"] * tile.warps * tokens * 16 * 4
    ranges = tokens * (8 * tile.warps + 16) if tile.fused else 16 * tokens
    assert partial + ranges <= 48 * 1024  # static
    assert tile.blocks_per_sm * (decode.shared_bytes(tile, shape) + partial + ranges + 1024) <= LIMIT + 1024
    assert config["shared_bytes"] == decode.shared_bytes(tile, shape)
    assert config["window"] >= 1

    assert not tile.fused or (shape.m <= 4 and shape.bits <= 8 and (shape.m > 1 or columns == 8))
    assert config["in_floats"] == (shape.group_size > 0 or shape.bits == 16)
    assert config["Sum"] == ("float" if config["in_floats"] else "int")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tiles_are_what_the_kernel_can_do(scheme):
    for k in COLUMNS:
        for m in TOKENS:
            shape = problem(m, scheme, k=k)
            found = decode.candidates(shape, SMS, LIMIT)
            assert len(set(found)) == len(found)
            for tile in found:
                check_decode(tile, shape)
            chosen = decode.choose(shape, SMS, LIMIT)
            assert chosen in found if found else chosen is None, name(shape)
            assert found or k > 28672, name(shape)  # up to there, there is always one


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_block_does_all_of_few_tokens(scheme):
    """The planes of W are read once for as many tokens as registers allow."""
    for m in (1, 2, 4, 8):
        shape = problem(m, scheme)
        (tiles,) = {tile.tiles for tile in decode.candidates(shape, SMS, LIMIT)}
        if not shape.group_size and shape.bits < 16:
            assert 8 * tiles >= m * columns_per_token(shape.bits) > 8 * tiles // 2 - 8


def test_one_token_is_quantized_where_it_is_used():
    for bits in (1, 2, 4, 8):
        for m, choices in ((1, {True}), (2, {True, False}), (4, {True, False}), (5, {False})):
            shape = problem(m, f"W2A{bits}")
            assert {tile.fused for tile in decode.candidates(shape, SMS, LIMIT)} == choices
            assert decode.choose(shape, SMS, LIMIT).fused == (m < 5)
    assert not decode.choose(problem(4, "W2A8", k=11008), SMS, LIMIT).fused  # too much for every block to do anew
    assert not decode.choose(problem(1, "W2A16"), SMS, LIMIT).fused  # it has a scale for every k-block


def test_activations_of_too_many_columns_fit_no_register_file():
    assert decode.choose(problem(1, "W2A8", k=2**20), SMS, LIMIT) is None
    assert decode.candidates(problem(1, "W2A8", k=2**20), SMS, LIMIT) == []


def test_registers_grow_with_what_is_kept_in_them():
    shape = problem(1, "W4A8")
    tile = decode.Tile(1, 8, 2)
    least = decode.registers(tile, shape)
    for more, other in [
        (decode.Tile(1, 4, 2), shape),
        (decode.Tile(2, 8, 2), shape),
        (decode.Tile(1, 8, 2, fused=True), problem(1, "W4A8", k=28672)),
        (tile, problem(1, "W8A8")),
        (tile, problem(1, "W4A8", k=28672)),
        (tile, problem(1, "W4A8g32")),
    ]:
        assert decode.registers(more, other) > least, (more, name(other))


# --- plan


@pytest.mark.parametrize(
    ("m", "scheme", "path"),
    [
        (1, "W2A8", {80: "decode", 86: "decode", 89: "decode", 90: "decode", 100: "mma", 120: "mma"}),
        (1, "W2A8g128", {80: "decode", 90: "decode", 100: "mma"}),
        (3, "W2A8g128", {80: "mma", 90: "mma"}),
        (1, "W2A8g64", {80: "mma", 90: "mma"}),
        (2048, "W4A8", {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "mma", 120: "mma"}),
        (2048, "W4A8g128", {80: "mma", 90: "wgmma", 120: "mma"}),
        (2048, "W2A2", {80: "mma", 89: "mma", 90: "wgmma_b1", 100: "mma"}),
        (2048, "W2A4", {90: "wgmma"}),  # eight pairs of planes: no gain over bytes
        (2048, "W2A2g128", {90: "wgmma"}),  # the binary product has no groups
        (1, "W4A16", {80: "decode", 90: "decode", 100: "mma_f16", 120: "mma_f16"}),
        (1, "W8*A16", dict.fromkeys(GPUS, "mma_f16")),
        (2, "W4A16", dict.fromkeys(GPUS, "mma_f16")),
        (1, "W4A16g128", dict.fromkeys(GPUS, "mma_f16")),
        (64, "W8*A16g64", dict.fromkeys(GPUS, "mma_f16")),
        (65, "W4A16", {80: "dequantize", 90: "wgmma_f16", 120: "dequantize"}),
        (2048, "W4A16", dict.fromkeys(GPUS, "dequantize")),
        (2048, "W4A8g32", {80: "mma", 90: "mma"}),  # a group a step
        (2048, "W8A8g128", {90: "mma"}),  # centered codes of eight bits are no signed bytes
        (2048, "W7A8g512", {90: "mma"}),  # sums beyond what a float holds exactly
        (2048, "W8*A16g128", dict.fromkeys(GPUS, "dequantize")),
        (1, "W8*A8", dict.fromkeys(GPUS, "decode")),  # nine planes fit no byte
        (64, "W8*A8", dict.fromkeys(GPUS, "decode")),
        (2048, "W8*A8g128", dict.fromkeys(GPUS, "decode")),
    ],
)
def test_path(m, scheme, path):
    chosen = {capability: plan.choose(problem(m, scheme), GPUS[capability]).path for capability in path}
    assert chosen == path


@pytest.mark.parametrize(
    ("most", "scheme", "path", "next_path"),
    [
        (plan.DECODE_COLUMNS // 8, "W2A8", "decode", "mma"),
        (plan.DECODE_COLUMNS // 4, "W2A3", "decode", "mma"),
        (plan.DECODE_COLUMNS // 2, "W2A2", "decode", "mma"),  # four tokens a tile
        (plan.MMA_F16_TOKENS, "W4A16", "mma_f16", "wgmma_f16"),
        (plan.WGMMA_F16_TOKENS, "W4A16g128", "wgmma_f16", "dequantize"),
        (plan.WGMMA_TOKENS - 1, "W4A8", "mma", "wgmma"),
        (plan.WGMMA_TOKENS - 1, "W4A8g128", "mma", "wgmma"),
    ],
)
def test_path_changes_where_it_should(most, scheme, path, next_path):
    found = [plan.choose(problem(m, scheme), GPUS[90]).path for m in (most, most + 1)]
    assert found == [path, next_path]


def test_nine_planes_that_fit_no_register_file_are_refused():
    """A dequantized weight would leave activations as they are."""
    for m in (1, 64):
        with pytest.raises(AbqError, match=r"nine bit-planes and K = 1048576"):
            plan.choose(problem(m, "W8*A8", k=2**20), GPUS[90])


def test_one_token_takes_one_kernel():
    for capability in (80, 86, 89, 90):
        assert plan.choose(problem(1, "W2A8"), GPUS[capability]).tile.fused


def check_plan(found, shape, gpu):
    """A plan that this GPU and the kernel of its path can carry out."""
    tile, planes, grouped = found.tile, shape.planes, shape.group_size > 0
    if found.path == "dequantize":
        assert shape.bits == 16 and tile is None  # it would leave activations as they are
    elif found.path == "decode":
        assert isinstance(tile, decode.Tile)
        check_decode(tile, shape)
    elif found.path == "mma":
        assert isinstance(tile, gemm_mma.Tile) and planes <= 8 and shape.bits <= 8
        assert gemm_mma.shared_bytes(tile, planes, shape.group_words, grouped) <= gpu.shared_limit
        assert tile.threads <= 1024 and tile.warps_k <= shape.k_blocks
    elif found.path == "mma_f16":
        assert isinstance(tile, gemm_mma_f16.Tile) and shape.bits == 16
        assert gemm_mma_f16.shared_bytes(tile, shape) <= gpu.shared_limit and tile.warps_k <= shape.k_blocks
    elif found.path == "wgmma_f16":
        assert isinstance(tile, gemm_wgmma.Tile) and gpu.has_wgmma and planes < 8 and shape.bits == 16
        assert gemm_wgmma_f16.shared_bytes(tile, planes) <= gpu.shared_limit
    else:
        assert isinstance(tile, gemm_wgmma.Tile) and gpu.has_wgmma and planes <= 8 and shape.bits <= 8
        binary = found.path == "wgmma_b1"
        assert found.path == "wgmma" or (binary and not grouped)
        assert gemm_wgmma.shared_bytes(tile, planes, shape.bits if binary else None) <= gpu.shared_limit
        assert not grouped or (tile.tokens <= 176 and gemm_wgmma.takes_groups(planes, shape.group_size))


@pytest.mark.parametrize("capability", GPUS)
def test_heuristic_finds_a_plan_that_can_run(capability):
    gpu = GPUS[capability]
    for shape in problems():
        check_plan(plan.choose(shape, gpu), shape, gpu)


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("scheme", ["W2A2", "W2*A8", "W8*A8", "W4A8g128", "W8*A4g32", "W4A16g32"])
def test_candidates_can_run(capability, scheme):
    gpu = GPUS[capability]
    for m in (1, 8, 64, 2048):
        for k in (1, 4096, 11008):
            shape = problem(m, scheme, k=k)
            found = plan.candidates(shape, gpu)
            assert found and len(set(found)) == len(found), name(shape)
            for candidate in found:
                check_plan(candidate, shape, gpu)
            assert plan.choose(shape, gpu) in found, name(shape)  # what is not tuned can be found by tuning
            assert any(candidate.path == "dequantize" for candidate in found) == (shape.bits == 16)
            assert any(candidate.path.startswith("wgmma") for candidate in found) == (
                gpu.has_wgmma and m > (16 if shape.bits == 16 else 8) and shape.planes <= 8
            )
