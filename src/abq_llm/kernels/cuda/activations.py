"""Activations -> codes in the layout that a product wants, and what its corrections need: `src/quantize.cuh`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from abq_llm.kernels.cuda import jit, launch
from abq_llm.kernels.cuda.gpus import gpu
from abq_llm.kernels.cuda.problem import BLOCK, Problem

MANY_TOKENS = 1024  # tiles of 8 that fill a GPU
GROUP_TOTALS_LIMIT = 24 * 1024  # bytes of shared memory for a tile's sums over groups
AT_ONCE = 4  # k-blocks of a tile of 8 tokens
BUFFER_BYTES = 17 * 1024  # of shared memory: a tile's codes on their way out, at most, and what its warps share
FEW_TOKENS = 64  # blocks, one a token, that leave room for larger ones
TYPE_NAMES = {torch.float16: "half_t", torch.bfloat16: "bf16_t", torch.float32: "float"}
FRAGMENTS, BYTES, PLANE_BYTES = 0, 1, 2  # layouts, as in the kernel
PLAIN, RMS_NORM, SILU_MUL = 0, 1, 2  # prologues


class Quantized(NamedTuple):
    """x ~ (codes - zero) * scale, token by token. `sums` of codes: int32 [tokens], or [groups, tokens]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor


def columns_per_token(bits: int) -> int:
    """Columns of the binary product that one token takes."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8 if bits <= 8 else 16


def aligned(x: Tensor, problem: Problem) -> bool:
    """Whether tokens can be read in fours."""
    return problem.in_fours and x.data_ptr() % (4 * x.element_size()) == 0


def quantize(
    x: Tensor,
    problem: Problem,
    layout: int,
    *,
    tokens: int = 8,
    prologue: int = PLAIN,
    other: Tensor | None = None,
    epsilon: float = 0.0,
    group_sums: bool = False,
) -> Quantized:
    """x [M, K], contiguous -> codes.

    tokens: pad to a multiple (itself of 8). The filling is not written: it only reaches outputs that nobody keeps.
    prologue: RMS_NORM with `other` the norm's weight [K], or SILU_MUL with x the gate and `other` up [M, K].
    """
    m, k_blocks, bits = len(x), problem.k_blocks, problem.bits
    padded = -(-m // tokens) * tokens
    tiles = padded * columns_per_token(bits) // 8 if layout == FRAGMENTS else padded // 8
    size = k_blocks * tiles * {FRAGMENTS: 64, BYTES: 8 * BLOCK // 4, PLANE_BYTES: bits * 64}[layout]
    empty = x.new_empty
    out = Quantized(
        empty(size, dtype=torch.int32),
        empty(k_blocks * m if bits == 16 else padded, dtype=torch.float32),
        empty(padded, dtype=torch.int32),
        empty((problem.groups, padded) if group_sums else padded, dtype=torch.int32),
    )
    sources = [x] if other is None else [x, other]
    many = m >= MANY_TOKENS and layout != FRAGMENTS and 32 * problem.groups <= GROUP_TOTALS_LIMIT
    threads = 1024 if m <= FEW_TOKENS and problem.k >= 4096 else 256
    held = -(-k_blocks // (threads // 32))
    constants: dict[str, bool | int | str] = {
        "T": TYPE_NAMES[x.dtype],
        "bits": bits,
        "symmetric": problem.symmetric,
        "layout": layout,
        "prologue": prologue,
        "group_sums": group_sums,
        "aligned": all(aligned(source, problem) for source in sources),
        **problem.columns(),
    }
    unpadded = problem.group_size == problem.group_padded
    shared = 4 * problem.groups * (8 if many else 1) if group_sums else 0
    if many:
        tile_bytes = 8 * BLOCK * k_blocks * x.element_size()
        needed, limit = tile_bytes + shared + BUFFER_BYTES, gpu(x.get_device()).shared_limit
        shared += tile_bytes if needed <= limit else 0
        parts = 2 if 2 * needed <= limit else 4  # few blocks of an SM have more warps
        whole = unpadded and problem.k % BLOCK == 0
        threads = 256 * parts
        constants |= {"parts": parts, "blocks": AT_ONCE // parts, "kept": needed <= limit, "whole": whole}
    else:
        whole = unpadded and problem.k == 8 * threads * held
        constants |= {"columns": columns_per_token(bits), "threads": threads, "held": held, "whole": whole}
    name = "quantize_tiles" if many else "quantize"
    kernel = jit.load(name, name, constants, x.device)
    sums, groups = (empty(padded, dtype=torch.int32), out.sums) if group_sums else (out.sums, None)
    launch.launch(
        kernel,
        (-(-m // 8) if many else m, 1, 1),
        (threads, 1, 1),
        [
            *(x, other, float(epsilon), out.codes, out.scale, out.zero, sums, groups),
            *(m, problem.k, k_blocks, tiles, problem.groups),
        ],
        shared_bytes=shared,
        programmatic=True,
    )
    return out
