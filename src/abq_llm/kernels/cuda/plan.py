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
MMA_F16_TOKENS = 64  # of 16-bit activations, up to which it beats the warpgroup product and a dequantized weight
WGMMA_F16_TOKENS = 1024  # the same, up to which the warpgroup product beats a dequantized weight
WGMMA_TOKENS = 65  # from which the warpgroup product is worth its larger blocks


@dataclass(frozen=True)
class Plan:
    """`path`: decode, mma, mma_f16, wgmma, wgmma_b1, wgmma_f16, or dequantize (which has no tile)."""

    path: str
    tile: Tile | None = None


@lru_cache(maxsize=4096)
def choose(problem: Problem, gpu: Gpu) -> Plan:
    """The plan for a shape that nobody has tuned."""
    if problem.bits == 16:
        return _choose_16(problem, gpu)
    columns = problem.m * columns_per_token(problem.bits)
    nine_planes = problem.planes > 8  # W8*: its codes are no bytes
    few_columns = DECODE_COLUMNS
    if problem.group_size:
        few_columns = DECODE_COLUMNS_GROUPED if problem.group_words >= 4 else 0
    elif problem.planes <= 3 and problem.row_tiles * problem.k_blocks >= 64 * gpu.sms:
        few_columns *= 2  # large weights of few bits
    if nine_planes or (gpu.has_binary and columns <= few_columns):
        if decode_tile := decode.choose(problem, gpu.sms, gpu.shared_limit):
            return Plan("decode", decode_tile)
        if nine_planes:
            raise AbqError(f"no CUDA kernel for nine bit-planes and K = {problem.k}; use the reference backend")
    m, n, blocks, planes = problem.m, problem.n, problem.k_blocks, problem.planes
    if gpu.has_wgmma and m >= WGMMA_TOKENS and _wgmma_takes(problem):
        if not problem.group_size and planes * problem.bits < 8:
            return Plan("wgmma_b1", gemm_wgmma.choose_b1(m, n, blocks, planes, problem.bits, gpu.sms))
        return Plan("wgmma", gemm_wgmma.choose(m, n, blocks, planes, gpu.sms, problem.group_words))
    tile = gemm_mma.choose(m, n, blocks, planes, gpu.sms, problem.group_words, problem.group_size > 0, gpu.shared_limit)
    return Plan("mma", tile)


def _choose_16(problem: Problem, gpu: Gpu) -> Plan:
    if _decodes_16(problem, gpu) and (decode_tile := decode.choose(problem, gpu.sms, gpu.shared_limit)):
        return Plan("decode", decode_tile)
    if problem.m <= MMA_F16_TOKENS:
        return Plan("mma_f16", gemm_mma_f16.choose(problem, gpu.sms, gpu.shared_limit))
    if gpu.has_wgmma and problem.m <= WGMMA_F16_TOKENS and gemm_wgmma_f16.takes(problem):
        return Plan("wgmma_f16", gemm_wgmma_f16.choose(problem, gpu.sms))
    return Plan("dequantize")


def _decodes_16(problem: Problem, gpu: Gpu) -> bool:
    """Whether binary products of 16-bit activations are the fastest: the planes of more tokens take too many."""
    return gpu.has_binary and problem.m == 1 and not problem.group_size and problem.planes <= 8


def _wgmma_takes(problem: Problem) -> bool:
    return not problem.group_size or gemm_wgmma.takes_groups(problem.planes, problem.group_size)


def candidates(problem: Problem, gpu: Gpu) -> list[Plan]:
    """Every plan worth a measurement."""
    if problem.bits == 16:
        return _candidates_16(problem, gpu)
    columns = problem.m * columns_per_token(problem.bits)
    plans = []
    if problem.planes > 8 or columns <= 4 * DECODE_COLUMNS:
        plans += [Plan("decode", tile) for tile in decode.candidates(problem, gpu.sms, gpu.shared_limit)]
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


def _candidates_16(problem: Problem, gpu: Gpu) -> list[Plan]:
    plans = [Plan("dequantize")]
    if _decodes_16(problem, gpu):
        plans += [Plan("decode", tile) for tile in decode.candidates(problem, gpu.sms, gpu.shared_limit)]
    if problem.m <= 2 * MMA_F16_TOKENS:
        plans += [Plan("mma_f16", tile) for tile in gemm_mma_f16.candidates(problem, gpu.sms, gpu.shared_limit)]
    if gpu.has_wgmma and problem.m > MMA_F16_TOKENS // 4 and gemm_wgmma_f16.takes(problem):
        plans += [Plan("wgmma_f16", tile) for tile in gemm_wgmma_f16.candidates(problem)]
    return plans
