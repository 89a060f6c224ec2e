"""Bit-planes: the layout on disk.

A weight of N rows and K columns whose codes need P bits becomes int32 [P, N, ceil(K / 32)]:

    codes[n, :]      k = 0    1    2   ...  31 | 32  ...
    plane 0 (LSB)  word 0:  bit 0, 1, 2, ... 31 | word 1: ...      bit (k % 32) of word (k // 32), LSB first
    plane 1        word 0:  bit 0, 1, 2, ... 31 | ...
    ...
    code = sum_i plane_i << i                                      bits past K are zero

On a little-endian machine byte j of a row of a plane holds k = 8j .. 8j + 7, which is how both functions work here.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

if sys.byteorder != "little":
    raise ImportError("abq_llm packs bit-planes on little-endian machines only")


def pack_planes(codes: Tensor, planes: int) -> Tensor:
    """codes [N, K] of any integer dtype, 0 <= code < 2^planes -> int32 [planes, N, ceil(K / 32)].

    Raises:
        ValueError: a code is out of range.
    """
    if codes.numel():
        low, high = (int(end) for end in codes.aminmax())  # as Python integers: 2^8 is 0 in uint8
        if low < 0 or high >= 2**planes:
            raise ValueError(f"codes in {low}..{high} do not fit {planes} bit-planes")
    n, k = codes.shape
    codes = torch.nn.functional.pad(codes.to(torch.int16), (0, -k % 32)).view(n, -1, 8)
    place = 1 << torch.arange(8, dtype=torch.int16, device=codes.device)
    bytes_ = torch.stack([(((codes >> plane) & 1) * place).sum(-1).to(torch.uint8) for plane in range(planes)])
    return bytes_.view(torch.int32)


def unpack_planes(packed: Tensor, in_features: int) -> Tensor:
    """int32 [planes, N, ceil(K / 32)] -> codes [N, K], uint8 (int16 for nine planes)."""
    planes, n, words = packed.shape
    table = _byte_to_bits(packed.device)
    octets = packed.contiguous().view(torch.uint8).view(planes, n, words * 4)
    if planes > 8:
        bits = (table[octets[plane].int()].view(torch.uint8).view(n, -1).short() << plane for plane in range(planes))
        return sum(bits, torch.zeros((), dtype=torch.int16, device=packed.device))[:, :in_features]
    codes = table[octets[0].int()]
    for plane in range(1, planes):
        codes |= table[octets[plane].int()] << plane  # eight codes at a time: bits never cross a byte
    return codes.view(torch.uint8).view(n, words * 32)[:, :in_features]


@lru_cache
def _byte_to_bits(device: torch.device) -> Tensor:
    """int64 [256]: byte j of entry b is bit j of b."""
    values = torch.arange(256, device=device)
    bits = (values[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()
