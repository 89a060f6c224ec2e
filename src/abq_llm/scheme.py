"""Schemes: ``"W2*A8KV4g128"`` <-> a frozen `Scheme`.

    W<p>[*]A<q>[KV<r>][g<size>]      p, q, r in 1..8 or 16 (16: stays floating point)

``*`` is bit balance (ABQ-LLM, section "bit balance"): 2^p + 1 levels, symmetric about zero. W2* is {-2, -1, 0, 1, 2}:
five levels, so three bit-planes in memory. ``g<size>`` groups the weights along the input dimension; a group size that
does not divide it leaves a short last group. Without ``KV`` the cache stays floating point, without ``g`` the scales
are per channel.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

from abq_llm.errors import AbqError

GRAMMAR = "W<p>[*]A<q>[KV<r>][g<size>] with p, q, r in 1..8 or 16 and size >= 1, for example W4A8g128 or W2*A8"


@dataclass(frozen=True)
class IntFormat:
    """An unsigned integer code of `bits` bits, from 0 to `qmax`, that stands for (code - zero point) * scale."""

    bits: int
    balanced: bool = False
    symmetric: bool = False

    @property
    def levels(self) -> int:
        """How many values a code can take: 2^bits, one more if balanced."""
        return (1 << self.bits) + self.balanced

    @property
    def qmax(self) -> int:
        """The largest code."""
        return self.levels - 1

    @property
    def planes(self) -> int:
        """Bit-planes that hold one code: ceil(log2(levels))."""
        return math.ceil(math.log2(self.levels))

    @property
    def fixed_zero_point(self) -> int | None:
        """2^(bits-1) if the grid is balanced or symmetric; None if every row or token has its own zero point."""
        return 2 ** (self.bits - 1) if self.balanced or self.symmetric else None


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and to how many bits. None stands for 16: that operand stays floating point.

    `weight_symmetric` and `activation_symmetric` live in the formats (`weight.symmetric`, `activation.symmetric`) and
    in config.json, not in the string.
    """

    weight: IntFormat | None
    activation: IntFormat | None
    kv: IntFormat | None = None
    group_size: int | None = None

    @classmethod
    def parse(cls, text: str, *, weight_symmetric: bool = False, activation_symmetric: bool = False) -> Scheme:
        """Read a scheme string.

        Raises:
            AbqError (a ValueError): not of the grammar; the message names the string, the position and the grammar.
        """
        return _parse(str(text), weight_symmetric, activation_symmetric)

    def __str__(self) -> str:
        text = f"W{_bits(self.weight)}{'*' if self.weight and self.weight.balanced else ''}A{_bits(self.activation)}"
        if self.kv is not None:
            text += f"KV{self.kv.bits}"
        return text + (f"g{self.group_size}" if self.group_size else "")

    @property
    def weight_symmetric(self) -> bool:
        return self.weight is not None and self.weight.symmetric

    @property
    def activation_symmetric(self) -> bool:
        return any(fmt is not None and fmt.symmetric for fmt in (self.activation, self.kv))

    @property
    def levels(self) -> int | None:
        """Levels of a weight; None at W16."""
        return self.weight.levels if self.weight else None

    @property
    def planes(self) -> int | None:
        """Bit-planes of a weight; None at W16."""
        return self.weight.planes if self.weight else None

    def groups(self, in_features: int) -> int:
        """Scales in one row of a weight of `in_features` columns."""
        return math.ceil(in_features / self.group_size) if self.group_size else 1

    def bits_per_weight(self, out_features: int, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight of a linear [out_features, in_features], with scales, zero points and padding."""
        if self.weight is None:
            return 16.0
        row = self.weight.planes * 32 * math.ceil(in_features / 32)
        row += self.groups(in_features) * (scale_bits + (8 if self.weight.fixed_zero_point is None else 0))
        return out_features * row / (out_features * in_features)


def _bits(fmt: IntFormat | None) -> int:
    return fmt.bits if fmt else 16


@lru_cache(maxsize=1024)
def _parse(text: str, weight_symmetric: bool, activation_symmetric: bool) -> Scheme:
    position = 0

    def fail(why: str) -> AbqError:
        return AbqError(f"bad scheme {text!r} at position {position}: {why}; the grammar is {GRAMMAR}")

    def number(prefix: str, *, required: bool) -> int | None:
        nonlocal position
        if not text.startswith(prefix, position):
            if required:
                raise fail(f"expected {prefix!r}")
            return None
        position += len(prefix)
        digits = re.compile(r"[1-9][0-9]{0,8}").match(text, position)
        if digits is None:
            raise fail(f"expected a number after {prefix!r}")
        value = int(digits.group())
        if prefix != "g" and value not in (*range(1, 9), 16):
            raise fail(f"{value} bits are not in 1..8 or 16")
        position = digits.end()
        return value

    weight_bits = number("W", required=True)
    balanced = text.startswith("*", position)
    if balanced and weight_bits == 16:
        raise fail("W16 stays floating point and has no levels to balance")
    position += balanced
    act_bits = number("A", required=True)
    kv_bits = number("KV", required=False)
    group_size = number("g", required=False)
    if position != len(text):
        raise fail(f"unexpected {text[position:]!r}")
    if group_size and weight_bits == 16:
        raise fail("W16 stays floating point and has no groups")
    assert weight_bits is not None and act_bits is not None

    def fmt(bits: int | None) -> IntFormat | None:
        return None if bits is None or bits == 16 else IntFormat(bits)

    weight, activation = fmt(weight_bits), fmt(act_bits)
    if weight is not None:
        weight = replace(weight, balanced=balanced, symmetric=weight_symmetric and not balanced)
    activation, kv = (f and replace(f, symmetric=activation_symmetric) for f in (activation, fmt(kv_bits)))
    return Scheme(weight, activation, kv, group_size)
