"""Which kernel computes a product, and with which tile: pure functions of integers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import decode, gemm_mma, gemm_mma_f16, gemm_wgmma, gemm_wgmma_f16
from abq_llm.kernels.cuda.activations import columns_per_token
from abq_llm.kernels.cuda.gpus import Gpu
from abq_llm.kernels.cuda.problem import Problem

Tile = decode.Tile | gemm_mma.Tile | gemm_mma_f16.Tile | gemm_wgmma.Tile

DECODE_COLUMNS = 32  # of the binary product, up to which it beats the int8 product, whose activations are more compact
DECODE_COLUMNS_GROUPED = 16  # the same for groups of 128 columns and more; shorter ones take too many binary products
DECODE_TOKENS_16 = 32  # of 16-bit activations, up to which it beats a dequantized weight
DECODE_TOKENS_F16 = 8, 4  # the same where warpgroup products of floats can be had, on every SM: per channel, in groups
ROW_TILES_F16 = 8  # of a block of those products
MMA_F16_TOKENS = 64  # of 16-bit activations, up to which it beats the products with more rows a block
WGMMA_F16_TOKENS = 1024  # of 16-bit activations, up to which it beats a dequantized weight
WGMMA_TOKENS = 65  # from which the warpgroup product is worth its larger blocks


@dataclass(frozen=True)
class Plan:
    """`path`: decode, mma, mma_f16, wgmma, wgmma_b1, wgmma_f16, or dequantize (which has no tile)."""

    path: str
    tile: Tile | None = None


@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: Gpu) -> Plan:
    """The plan for a shape that nobody has tuned."""
    columns = problem.m * columns_per_token(problem.bits)
    if problem.bits == 16 and problem.m > _decode_tokens_16(problem, gpu):
        return _many_tokens_16(problem, gpu)
    nine_planes = problem.planes > 8  # W8*: its codes are no bytes
    few_columns = DECODE_COLUMNS
    if problem.group_size:
        few_columns = DECODE_COLUMNS_GROUPED if problem.group_words >= 4 else 0
    elif problem.planes <= 3 and problem.row_tiles * problem.k_blocks >= 64 * gpu.sms:
        few_columns *= 2  # large weights of few bits
    if nine_planes or problem.bits == 16 or (gpu.has_binary and columns <= few_columns):
        if decode_tile := decode.choose(problem, gpu.sms, gpu.shared_limit):
            return Plan("decode", decode_tile)
        if nine_planes and problem.bits < 16:
            raise AbqError(f"no CUDA kernel for nine bit-planes and K = {problem.k}; use the reference backend")
        if problem.bits == 16:
            return _many_tokens_16(problem, gpu)
    m, n, blocks, planes = problem.m, problem.n, problem.k_blocks, problem.planes
    if gpu.has_wgmma and m >= WGMMA_TOKENS and _wgmma_takes(problem):
        if not problem.group_size and planes * problem.bits < 8:
            return Plan("wgmma_b1", gemm_wgmma.choose_b1(m, n, blocks, planes, problem.bits, gpu.sms))
        return Plan("wgmma", gemm_wgmma.choose(m, n, blocks, planes, gpu.sms, problem.group_words))
    tile = gemm_mma.choose(m, n, blocks, planes, gpu.sms, problem.group_words, problem.group_size > 0, gpu.shared_limit)
    return Plan("mma", tile)


def _decode_tokens_16(problem: Problem, gpu: Gpu) -> int:
    if not (gpu.has_wgmma and gemm_wgmma_f16.takes(problem)):
        return DECODE_TOKENS_16
    # `decode` takes time for every token and weight, the warpgroup product for every round of blocks, full or not
    rows = ROW_TILES_F16 * gpu.sms
    busy = problem.row_tiles / (-(-problem.row_tiles // rows) * rows)
    return min(DECODE_TOKENS_16, int(DECODE_TOKENS_F16[problem.group_size > 0] / busy))


def _many_tokens_16(problem: Problem, gpu: Gpu) -> Plan:
    if gpu.has_wgmma and problem.m <= WGMMA_F16_TOKENS and gemm_wgmma_f16.takes(problem):
        return Plan("wgmma_f16", gemm_wgmma_f16.choose(problem, gpu.sms))
    return Plan("dequantize")


def _wgmma_takes(problem: Problem) -> bool:
    return not problem.group_size or gemm_wgmma.takes_groups(problem.planes, problem.group_size)


def candidates(problem: Problem, gpu: Gpu) -> list[Plan]:
    """Every plan worth a measurement."""
    columns = problem.m * columns_per_token(problem.bits)
    plans = []
    if problem.planes > 8 or columns <= (16 * DECODE_TOKENS_16 if problem.bits == 16 else 4 * DECODE_COLUMNS):
        plans += [Plan("decode", tile) for tile in decode.candidates(problem, gpu.sms, gpu.shared_limit)]
    if problem.bits == 16:
        if problem.m <= MMA_F16_TOKENS:
            plans += [Plan("mma_f16", tile) for tile in gemm_mma_f16.candidates(problem, gpu.sms, gpu.shared_limit)]
        if gpu.has_wgmma and problem.m > 4 and gemm_wgmma_f16.takes(problem):
            plans += [Plan("wgmma_f16", tile) for tile in gemm_wgmma_f16.candidates(problem)]
        return [*plans, Plan("dequantize")]
    if problem.planes > 8:
        return plans
    m, n, blocks, planes, grouped = problem.m, problem.n, problem.k_blocks, problem.planes, problem.group_size > 0
    words, limit = problem.group_words, gpu.shared_limit
    plans += [Plan("mma", tile) for tile in gemm_mma.candidates(m, n, blocks, planes, gpu.sms, words, grouped, limit)]
    if gpu.has_wgmma and m > 8 and _wgmma_takes(problem):
        plans += [Plan("wgmma", tile) for tile in gemm_wgmma.candidates(m, n, planes, gpu.sms, words)]
        if not grouped and planes * problem.bits < 8:
            plans += [Plan("wgmma_b1", tile) for tile in gemm_wgmma.candidates_b1(m, planes, problem.bits)]
    return plans
