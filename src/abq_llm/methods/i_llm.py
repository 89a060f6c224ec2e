"""I-LLM (Hu, Cheng, Yang, Yuan, Yu, Xu, Zhou, 2024, arXiv:2405.17849): fully-smooth block reconstruction.

One scale s a channel is learned for every pair of neighbours between which it can move (section 3.2),

    Y = (X diag(s)^-1) (diag(s) W)        s* = argmin || block(X) - block_q(X; s) ||^2

norm -> linears, v -> o, up -> down and q <-> k, by the squared error of the block's output, from SmoothQuant's s on.
Then everything is rounded to nearest on min-max grids. Where activations are quantized, so are keys and values while s
is learned, whatever the scheme says of the cache: integer-only inference (`abq_llm.integer_only`) rounds them. There,
too, gate and up are smoothed against each other, which is not learned. More in docs/methods/i_llm.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from abq_llm.architectures.table import QueryKeyPair
from abq_llm.calibration.block import BlockTask, input_statistics
from abq_llm.calibration.fit import fit, split_samples, take
from abq_llm.calibration.learned import LearnedWeights, Vectors
from abq_llm.calibration.losses import relative_mse
from abq_llm.calibration.reconstruct import Group
from abq_llm.errors import AbqError
from abq_llm.quantizers import QParams
from abq_llm.scheme import IntFormat

KV = IntFormat(8)


@dataclass(frozen=True)
class ILlm:
    """Options."""

    name: ClassVar[str] = "i_llm"
    needs_data: ClassVar[bool] = True

    epochs: int = 20
    lr: float = 5e-3  # of log s
    alpha: float = 0.5  # of the start, s = max|X|^alpha / max|W|^(1 - alpha)

    def __post_init__(self) -> None:
        if self.epochs < 0 or not 0 <= self.alpha <= 1:
            raise AbqError(f"{self}: epochs must be >= 0, alpha in 0..1")

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        target, weights = task.fp_output, LearnedWeights(task)
        kv = task.scheme.kv or (task.scheme.activation and KV)
        fully = replace(task, scheme=replace(task.scheme, kv=kv))
        peaks = input_statistics(task, task.fp_stream).peak
        pairs = [
            pair
            for pair in task.architecture.pairs
            if kv is not None or not isinstance(pair, QueryKeyPair)  # nothing rounds keys: their scales cancel
        ]
        vectors = Vectors(weights.smoothing(pairs, peaks, self.alpha))

        def loss(hidden: Tensor, target: Tensor) -> Tensor:
            return relative_mse(fully.forward(hidden, weights.quantized(vectors), quantized=True), target)

        fit(
            task,
            [Group(tuple(vectors.balance.values()), self.lr)],
            lambda samples, training: tuple(take(task, (task.quantized_stream, target), samples)),
            loss,
            split_samples(task),
            self.epochs,
        )
        return weights.fold(vectors)
