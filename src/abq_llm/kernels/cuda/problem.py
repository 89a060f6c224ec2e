"""What a product is, in integers: everything that the choice of a kernel and its tile may depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from abq_llm.errors import AbqError
from abq_llm.scheme import Scheme

BLOCK = 256  # columns of a k-block: what one binary product multiplies
WORD = 32  # columns of a step of the int8 products; groups are padded to a multiple


def groups_in_block(words: int) -> int:
    """Groups of `words` x 32 columns that meet a k-block, at most: as in the kernels' `common.cuh`."""
    return 1 + (words - math.gcd(words, BLOCK // WORD) + BLOCK // WORD - 1) // words


@dataclass(frozen=True)
class Problem:
    """y[m, n] = x[m, k] W[n, k]^T."""

    m: int
    n: int
    k: int
    planes: int  # of a weight's code
    bits: int  # of an activation's code, 1..8 or 16
    symmetric: bool  # activations
    group_size: int  # of the weights along k; 0: one scale per channel

    @classmethod
    def of(cls, m: int, n: int, k: int, scheme: Scheme) -> Problem:
        assert scheme.weight is not None and scheme.planes is not None
        activation = scheme.activation
        size = scheme.group_size if scheme.group_size and scheme.group_size < k else 0
        if activation and scheme.weight.qmax * activation.qmax * (size or k) >= 2**31:
            if size:
                raise AbqError(f"{scheme}: sums over {size} columns may not fit 32 bits; use the reference backend")
            size = 2**14  # equal scales group by group: the sum over all columns might not fit 32 bits
        return cls(
            m,
            n,
            k,
            scheme.planes,
            activation.bits if activation else 16,
            bool(activation and activation.symmetric),
            size,
        )

    @property
    def group_padded(self) -> int:
        """Columns that a group takes in the layout."""
        return -(-self.group_size // WORD) * WORD

    @property
    def group_words(self) -> int:
        return self.group_padded // WORD

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size) if self.group_size else 1

    @property
    def k_blocks(self) -> int:
        columns = (self.groups - 1) * self.group_padded + self.last_group if self.group_size else self.k
        return -(-columns // BLOCK)

    @property
    def in_fours(self) -> bool:
        """Whether four neighbouring columns of the layout are neighbours in the token, or all of them padding."""
        return self.k % 4 == 0 and self.group_size % 4 == 0

    @property
    def row_tiles(self) -> int:
        return -(-self.n // 16)

    @property
    def last_group(self) -> int:
        """Columns of the last group, which may be short."""
        return self.k - (self.groups - 1) * self.group_size

    def columns(self) -> dict[str, int]:
        """Constants of kernels that map the columns of the layout to those of x."""
        return {"group_size": self.group_size or WORD, "group_padded": self.group_padded or WORD}
