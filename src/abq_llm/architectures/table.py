"""What a table entry says. All names are module paths relative to a decoder block unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Rows:
    """Some rows of a linear that computes several things at once: of every `period` rows, those in start..stop."""

    linear: str
    start: int
    stop: int
    period: int


def fused(linear: str, *sizes: int) -> tuple[Rows, ...]:
    """The parts of a fused linear, which takes turns: `sizes` rows of each part, and again up to its last row."""
    ends = tuple(accumulate(sizes))
    return tuple(Rows(linear, end - size, end, ends[-1]) for size, end in zip(sizes, ends, strict=True))


Part = str | Rows


@dataclass(frozen=True)
class NormPair:
    """A norm feeds linears: its weight / s, their columns * s. One s per hidden channel.

    The norm multiplies by `offset` + weight. What else it feeds, and is not quantized, is `kept`: its columns * s, too.
    """

    norm: str
    linears: tuple[str, ...]
    offset: float = 0.0
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class LinearPair:
    """A linear feeds a linear channel by channel: rows of `producer` / s, columns of `consumer` * s."""

    producer: Part
    consumer: str


@dataclass(frozen=True)
class ValueOutputPair:
    """Values feed the output projection through attention. One s per value channel, shared by the query heads of
    its group.
    """

    value: Part
    output: str


@dataclass(frozen=True)
class QueryKeyPair:
    """Queries meet keys: rows of `query` * s, rows of `key` / s. Both are linears, with one s per key head, or the
    norms per head behind them, whose weights all heads share, with one s for all heads.

    RoPE turns the first r = `rotary` * d channels of a head, i and i + r/2 together: they have one s. Each of the
    others has its own.
    """

    query: Part
    key: Part
    rotary: float = 1.0


Pair = NormPair | LinearPair | ValueOutputPair | QueryKeyPair


@dataclass(frozen=True)
class Architecture:
    """One model family: where its blocks are, which of their linears are quantized, and which scales can move where."""

    blocks: str  # path of the block list in the model
    attention: str
    linears: tuple[str, ...]
    pairs: tuple[Pair, ...]
    compensated: tuple[str, ...]  # linears that get a compensation vector in the first and the last block
    requires: tuple[tuple[str, object], ...] = ()  # (name, value) in the config without which the pairs are not exact
