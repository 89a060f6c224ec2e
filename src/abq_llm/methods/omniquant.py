"""OmniQuant (Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao, Luo, ICLR 2024, arXiv:2308.13137).

Learns, block by block, where the range of each row or group of weights is clipped (LWC) and an equivalent
transformation of what the linears see (LET):

    Y = Q_a( (X - delta) / s )  Q_w( s W )  +  B + delta W              LET, equation 3
    h = ( sigmoid(gamma) max W - sigmoid(beta) min W ) / (2^N - 1)      LWC, equation 2: the step of Q_w
    argmin || F(W, X) - F(Q_w(W), Q_a(X)) ||^2                          equation 1: F is the block

The vectors and what they do to the weights are in `calibration.learned`, shifts in `calibration.affine`. Differences
from the paper and its published code are in docs/methods/omniquant.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from abq_llm.architectures.table import LinearPair, Pair, QueryKeyPair
from abq_llm.calibration.affine import can_shift, initial_shift
from abq_llm.calibration.block import BlockTask, input_statistics
from abq_llm.calibration.fit import fit, split_samples, take
from abq_llm.calibration.learned import LearnedWeights, Vectors
from abq_llm.calibration.reconstruct import Group
from abq_llm.calibration.transforms import Parameters, consumers, spread
from abq_llm.errors import AbqError
from abq_llm.quantizers import QParams


@dataclass(frozen=True)
class OmniQuant:
    """Options. The defaults are those of the published code."""

    name: ClassVar[str] = "omniquant"
    needs_data: ClassVar[bool] = True

    epochs: int = 20
    lwc: bool = True  # learn clips; off: min-max grids
    let: bool = True  # learn s and delta; off: s = 1, delta = 0
    alpha: float = 0.5  # where s starts: act^alpha / w^(1 - alpha)
    aug_loss: bool = False  # a second target: what the fp block makes of the quantized stream
    lr_lwc: float = 1e-2
    lr_let: float = 5e-3

    def __post_init__(self) -> None:
        if self.epochs < 0 or not 0 <= self.alpha <= 1:
            raise AbqError(f"{self}: epochs must be >= 0, alpha in 0..1")

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        weights, vectors = LearnedWeights(task), Vectors()
        if self.let:
            vectors = initial_transformation(task, weights, self.alpha)
        if self.lwc:
            vectors.clip = weights.full_ranges()
        groups = [
            Group((*vectors.balance.values(), *vectors.shift.values()), self.lr_let),
            Group(tuple(vectors.clip.values()), self.lr_lwc),
        ]
        reconstruct_output(task, groups, lambda: weights.quantized(vectors), self.epochs, aug_loss=self.aug_loss)
        return weights.fold(vectors)


def initial_transformation(task: BlockTask, weights: LearnedWeights, alpha: float) -> Vectors:
    """Where LET starts: delta in the middle of each channel's range, s by SmoothQuant's formula on what is left of it.

    Scales at every pair but up -> down (section 3.3), and between queries and keys only if keys are quantized, for they
    cancel otherwise. Shifts wherever there are biases to take them, if activations are quantized.
    """
    pairs: list[Pair] = [
        pair
        for pair in task.architecture.pairs
        if not isinstance(pair, LinearPair) and (task.scheme.kv is not None or not isinstance(pair, QueryKeyPair))
    ]
    statistics = input_statistics(task, task.fp_stream)
    peaks, shifts = dict(statistics.peak), {}
    for pair in pairs if task.scheme.activation is not None else ():
        if can_shift(pair, weights.parameters):
            shifts[pair] = initial_shift(pair, weights.parameters, statistics.high, statistics.low, task.head_dim)
            for name in consumers(pair):
                delta = spread(shifts[pair], len(peaks[name]), task.head_dim)
                peaks[name] = torch.maximum(statistics.high[name] - delta, delta - statistics.low[name])
    return Vectors(weights.smoothing(pairs, peaks, alpha), shifts)


def reconstruct_output(
    task: BlockTask,
    groups: Sequence[Group],
    quantized: Callable[[], Parameters],
    epochs: int,
    *,
    aug_loss: bool,
    before_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train the tensors of `groups`, from which `quantized` makes the block's parameters: least mean squared error."""
    streams = [task.quantized_stream, task.fp_output]
    if aug_loss:
        streams.append(task.forward_stream(task.quantized_stream, quantized=False))

    def loss(hidden: Tensor, *targets: Tensor) -> Tensor:
        output = task.forward(hidden, quantized(), quantized=True).float()
        return torch.stack([F.mse_loss(output, target) for target in targets]).sum()

    fit(
        task,
        groups,
        lambda samples, training: tuple(take(task, streams, samples)),
        loss,
        split_samples(task),
        epochs,
        before_epoch=before_epoch,
    )
