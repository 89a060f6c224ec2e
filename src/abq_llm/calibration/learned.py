"""What is learned in one block, and what it does to the block's weights: move scales, compensate, clip, quantize.

    W_q = Q( W diag(s) + a b^T + step V )        on the range [ clip_lo min, clip_hi max ] of each group

V, within -1/2 .. 1/2, decides of each weight whether it goes up or down (as in SignRound, Cheng et al., 2023,
arXiv:2309.05516); without it, to nearest. diag(s) may be a matrix for each head, diag(s) (I + P), and a constant may be
taken off x before (`calibration.affine`).
`quantized` is differentiable in the vectors, for training; `fold` writes the result into the block once, for good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abq_llm.architectures.table import Pair
from abq_llm.calibration.affine import mix, shift, storable_shift
from abq_llm.calibration.block import BlockTask
from abq_llm.calibration.transforms import (
    Parameters,
    apply,
    block_parameters,
    initial_log_scale,
    storable_log_scale,
)
from abq_llm.quantizers import QParams, choose_qparams, fake_quantize, from_groups, to_groups

CLIP_AT_START = 1 / (1 + math.exp(-4))  # sigmoid(4): a clip starts at exactly 1, where the sigmoid still has a slope


@dataclass
class Vectors:
    """What is learned in one block. An empty field leaves that part out."""

    balance: dict[Pair, Tensor] = field(default_factory=dict)  # log s
    shift: dict[Pair, Tensor] = field(default_factory=dict)  # delta, of pairs that are balanced
    mix: dict[Pair, Tensor] = field(default_factory=dict)  # P [heads, d, d], of pairs that are balanced
    clip: dict[int, Tensor] = field(default_factory=dict)  # group size -> logits [2, groups of its linears, 1]: hi, lo
    left: dict[str, Tensor] = field(default_factory=dict)  # a [N, 1]
    right: dict[str, Tensor] = field(default_factory=dict)  # b [1, K]
    rounding: dict[int, Tensor] = field(default_factory=dict)  # group size -> V [groups of its linears, size]


class LearnedWeights:
    """The weights of one block under `Vectors`."""

    def __init__(self, task: BlockTask) -> None:
        self.task = task
        self.parameters = block_parameters(task.block)
        self.sizes: dict[int, list[str]] = {}  # group size -> linears
        for name, linear in task.linears.items():
            self.sizes.setdefault(to_groups(linear.weight, task.scheme.group_size).shape[-1], []).append(name)

    def smoothing(self, pairs: Iterable[Pair], peaks: dict[str, Tensor], alpha: float) -> dict[Pair, Tensor]:
        """Where balance starts: `initial_log_scale`, or 0 and a message where the inputs are not finite."""
        scales = {}
        for pair in pairs:
            log_scale = initial_log_scale(pair, self.parameters, peaks, self.task.head_dim, alpha)
            if not log_scale.isfinite().all():
                self.task.report(f"block {self.task.index}: {pair} sees values that are not finite, left alone", None)
                log_scale = torch.zeros_like(log_scale)
            scales[pair] = log_scale
        return scales

    def full_ranges(self) -> dict[int, Tensor]:
        """Logits with which every clip is 1."""
        clip = {}
        for size, names in self.sizes.items():
            weights = [self.parameters[f"{name}.weight"] for name in names]
            groups = sum(len(weight) * self.task.scheme.groups(weight.shape[1]) for weight in weights)
            clip[size] = torch.logit(weights[0].new_full((2, groups, 1), CLIP_AT_START))
        return clip

    def to_nearest(self) -> dict[int, Tensor]:
        """V = 0 for every weight."""
        return {size: torch.zeros_like(self._groups(names, self.parameters)) for size, names in self.sizes.items()}

    def transformed(self, vectors: Vectors) -> Parameters:
        """The parameters with scales moved and compensation added; only the latter changes what the block computes."""
        parameters = self.parameters
        for pair, log_scale in vectors.balance.items():
            if vectors.rounding:  # worth nothing to a weight that is scaled otherwise once it is stored
                log_scale = self._as_stored(pair, log_scale)
            if pair in vectors.shift:
                parameters = shift(pair, parameters, vectors.shift[pair], self.task.head_dim)
            parameters = apply(pair, parameters, log_scale, self.task.head_dim)
            if pair in vectors.mix:
                parameters = mix(pair, parameters, vectors.mix[pair])
        for name, left in vectors.left.items():
            weight = parameters[f"{name}.weight"]
            parameters = {**parameters, f"{name}.weight": weight + left @ vectors.right[name]}
        return parameters

    def _as_stored(self, pair: Pair, log_scale: Tensor) -> Tensor:
        """What `fold` will make of it; straight through for the gradient."""
        stored = storable_log_scale(pair, self.parameters, log_scale.detach(), self.task.storage_dtype)
        return stored + (log_scale - log_scale.detach())

    def quantized(self, vectors: Vectors) -> Parameters:
        """The block's parameters as they will run: transformed, compensated, quantized; differentiable in the
        vectors.
        """
        parameters = dict(self.transformed(vectors))
        for names, groups, grid in self._grids(vectors, parameters):
            parameters |= self._rounded(names, groups, grid)
        return parameters

    @torch.no_grad()
    def fold(self, vectors: Vectors) -> dict[str, QParams]:
        """Write the transformed weights, on their grids already if their rounding is learned, into the block and return
        the grids.
        """
        vectors.balance = {
            pair: storable_log_scale(pair, self.parameters, log_scale, self.task.storage_dtype)
            for pair, log_scale in vectors.balance.items()
        }
        vectors.shift = {
            pair: storable_shift(pair, self.parameters, delta, vectors.balance[pair], self.task.storage_dtype)
            for pair, delta in vectors.shift.items()
        }
        parameters = self.transformed(vectors)
        folded, grids = dict(parameters), dict[str, QParams]()
        for names, groups, grid in self._grids(vectors, parameters):
            if vectors.rounding:
                folded |= self._rounded(names, groups, grid)
            scales, zero_points = self._split(names, grid.scale), self._split(names, grid.zero_point)
            grids |= {name: QParams(scale, zero) for (name, scale), (_, zero) in zip(scales, zero_points, strict=True)}
        for name, parameter in self.task.block.named_parameters():
            parameter.copy_(folded[name])
        return grids

    def _grids(self, vectors: Vectors, parameters: Parameters) -> Iterator[tuple[list[str], Tensor, QParams]]:
        """What to round to nearest, [groups of all linears of one size, size], and its grids: in one tensor, for far
        fewer kernels.
        """
        scheme = self.task.scheme
        assert scheme.weight is not None
        for size, names in self.sizes.items():
            groups = self._groups(names, parameters)
            hi, lo = torch.sigmoid(vectors.clip[size]) / CLIP_AT_START if vectors.clip else (1.0, 1.0)
            grid = choose_qparams(groups, scheme.weight, clip_hi=hi, clip_lo=lo, scale_dtype=self.task.scale_dtype)
            if vectors.rounding:
                V = vectors.rounding[size]
                with torch.no_grad():
                    V.clamp_(-0.5, 0.5)
                groups = torch.addcmul(groups, V, grid.scale)
            yield names, groups, grid

    def _groups(self, names: list[str], parameters: Parameters) -> Tensor:
        group_size = self.task.scheme.group_size
        return torch.cat([to_groups(parameters[f"{name}.weight"], group_size).flatten(0, 1) for name in names])

    def _rounded(self, names: list[str], groups: Tensor, grid: QParams) -> Parameters:
        """What `_grids` yields -> the weights that will run, [N, K] for each linear."""
        assert self.task.scheme.weight is not None
        fake = self._split(names, fake_quantize(groups, grid, self.task.scheme.weight))
        return {f"{name}.weight": from_groups(w, self.parameters[f"{name}.weight"].shape[1]) for name, w in fake}

    def _split(self, names: list[str], groups: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensor of `_grids` back into one [N, groups, ...] for each linear."""
        shapes = [self.parameters[f"{name}.weight"].shape for name in names]
        counts = [(n, self.task.scheme.groups(k)) for n, k in shapes]
        parts = groups.split([n * per_row for n, per_row in counts])
        return ((name, part.unflatten(0, count)) for name, part, count in zip(names, parts, counts, strict=True))
