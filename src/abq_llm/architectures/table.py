"""What a table entry says. All names are module paths relative to a decoder block unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormPair:
    """A norm feeds linears: its weight / s, their columns * s. One s per hidden channel."""

    norm: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class LinearPair:
    """A linear feeds a linear channel by channel: rows of `producer` / s, columns of `consumer` * s."""

    producer: str
    consumer: str


@dataclass(frozen=True)
class ValueOutputPair:
    """Values feed the output projection through attention. One s per value channel, shared by the query heads of
    its group.
    """

    value: str
    output: str


@dataclass(frozen=True)
class QueryKeyPair:
    """Queries meet keys: rows of `query` * s, rows of `key` / s. Both are linears, with one s per key head, or the
    norms per head behind them, whose weights all heads share, with one s for all heads.

    Under RoPE, s is equal for the channels (i, i + d/2), which turn together; without (`rotary=False`), each channel
    has its own.
    """

    query: str
    key: str
    rotary: bool = True


Pair = NormPair | LinearPair | ValueOutputPair | QueryKeyPair


@dataclass(frozen=True)
class Architecture:
    """One model family: where its blocks are, which of their linears are quantized, and which scales can move where."""

    model_types: tuple[str, ...]
    blocks: str  # path of the block list in the model
    attention: str
    linears: tuple[str, ...]
    pairs: tuple[Pair, ...]
    compensated: tuple[str, ...]  # linears that get a compensation vector in the first and the last block
    requires: tuple[tuple[str, object], ...] = ()  # (name, value) in the config without which the pairs are not exact
