"""The weight as the kernels read it, made once from the bit-planes on disk.

Rows come in tiles of 16, columns in blocks of 256, each group of columns padded to a multiple of 32:

    int32 [ceil(N/16), k-blocks, planes, 32 lanes, 4]     lane = 4 g + t holds word [h, e] of row g + 8 e at 2 h + e
    bit i + 8 j of a word  <->  column 32 i + 16 h + 4 t + j of the block

A lane's four words are its A fragment of the binary product m16n8k256, 512 contiguous bytes a warp; and
`(word >> i) & 0x01010101` are four neighbours of its fragment of the int8 product over columns 32 i .. 32 i + 31.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from abq_llm.kernels.cuda.problem import BLOCK, Problem
from abq_llm.packing import unpack_planes
from abq_llm.scheme import Scheme


def prepare(weight: list[Tensor], scheme: Scheme, in_features: int) -> list[Tensor]:
    """[weight_packed, weight_scale, (weight_zero_point)] -> [planes, scale, zero, total, group_total, rows].

    With R = 16 ceil(N/16) rows and G groups, padded with zeros:

    planes  as above
    per channel   scale fp32 [R]      zero int32 [R]      total int32 [R] = sum_k (q - z)
    grouped       scale fp32 [G, R]   zero uint8 [G, R]   total fp32 [R] = sum_g s_g group_total[g]
                  group_total int32 [G, R] = sum_{k in g} (q - z), empty per channel
    rows    [N, 0]: holds nothing but N
    """
    packed, scale, *zero_point = weight
    zero = zero_point[0] if zero_point else None
    symmetric = scheme.weight_symmetric, scheme.activation_symmetric
    return [*_prepare(packed, scale, zero, str(scheme), *symmetric, in_features), scale.new_empty(packed.shape[1], 0)]


@torch.library.custom_op("abq_llm::prepare_cuda", mutates_args=())
def _prepare(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: str,
    weight_symmetric: bool,
    activation_symmetric: bool,
    in_features: int,
) -> list[Tensor]:
    """An op, so that a compiler looks at its results only."""
    parsed = Scheme.parse(scheme, weight_symmetric=weight_symmetric, activation_symmetric=activation_symmetric)
    assert parsed.weight is not None
    n = packed.shape[1]
    problem = Problem.of(1, n, in_features, parsed)
    codes = unpack_planes(packed, in_features)
    size = problem.group_size or in_features
    fixed = parsed.weight.fixed_zero_point
    zero = (
        zero_point.int()
        if zero_point is not None
        else torch.full(scale.shape, fixed or 0, dtype=torch.int32, device=scale.device)
    )
    scale = scale.float()
    if scale.shape[1] != problem.groups:  # one scale, but groups to keep sums within 32 bits
        scale, zero = scale.expand(-1, problem.groups), zero.expand(-1, problem.groups)
    filled = pad(codes, (0, problem.groups * size - in_features)).view(n, problem.groups, size)
    counts = torch.full((problem.groups,), size, device=scale.device)
    counts[-1] = problem.last_group if problem.group_size else in_features
    centered = filled.sum(-1, dtype=torch.int64) - counts * zero

    rows = (0, -n % 16)
    planes = _fragments(filled, problem)
    if problem.group_size:
        total = (centered.double() * scale.double()).sum(1).float()
        by_group = [pad(table, (0, 0, *rows)).t() for table in (scale, zero.to(torch.uint8), centered.int())]
        tables = [*by_group[:2], pad(total, rows), by_group[2]]
    else:
        tables = [pad(scale[:, 0], rows), pad(zero[:, 0], rows), pad(centered[:, 0].int(), rows), zero.new_empty(0, 0)]
    prepared = [planes, *(table.contiguous() for table in tables)]
    if scale.is_cuda:
        torch.cuda.synchronize(scale.device)  # kernels read weights before they wait for their predecessor
    return prepared


@_prepare.register_fake
def _(packed, scale, zero_point, scheme, weight_symmetric, activation_symmetric, in_features):  # type: ignore[no-untyped-def]
    parsed = Scheme.parse(scheme, weight_symmetric=weight_symmetric, activation_symmetric=activation_symmetric)
    problem = Problem.of(1, packed.shape[1], in_features, parsed)
    rows, grouped = 16 * problem.row_tiles, problem.group_size > 0
    table = (problem.groups, rows) if grouped else (rows,)
    return [
        packed.new_empty(problem.row_tiles, problem.k_blocks, problem.planes, 32, 4),
        scale.new_empty(table, dtype=torch.float32),
        scale.new_empty(table, dtype=torch.uint8 if grouped else torch.int32),
        scale.new_empty(rows, dtype=torch.float32 if grouped else torch.int32),
        scale.new_empty(table if grouped else (0, 0), dtype=torch.int32),
    ]


def _fragments(codes: Tensor, problem: Problem) -> Tensor:
    """codes [N, G, size] -> planes."""
    n = codes.shape[0]
    columns = pad(codes, (0, problem.group_padded - problem.group_size if problem.group_size else 0)).flatten(1)
    columns = columns[:, : problem.k_blocks * BLOCK]
    columns = pad(columns, (0, problem.k_blocks * BLOCK - columns.shape[1], 0, -n % 16))
    view = columns.view(-1, 2, 8, problem.k_blocks, 8, 2, 4, 4)  # row tile, e, g, block, i, h, t, j
    place = torch.arange(8, dtype=torch.uint8, device=codes.device).view(8, 1, 1, 1)
    planes = []
    for plane in range(problem.planes):
        bits = (view >> plane & 1).to(torch.uint8)
        octets = (bits << place).sum(4, dtype=torch.uint8)  # row tile, e, g, block, h, t, j
        planes.append(octets.permute(0, 3, 2, 5, 4, 1, 6).contiguous().view(torch.int32).flatten(2))
    return torch.stack(planes, 2).view(-1, problem.k_blocks, problem.planes, 32, 4)
