"""SmoothQuant (Xiao, Lin, Seznec, Wu, Demouth, Han, ICML 2023, arXiv:2211.10438).

Moves the outliers of activations into the weights, which are easier to quantize (equations 3 and 4):

    Y = (X diag(s)^-1) (diag(s) W)        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

for the linears behind a norm, into whose weight 1 / s is folded; then everything is rounded to nearest on min-max
grids. No gradient and no search. The maxima are those of the fp block on the fp stream, as in the paper. Differences
from it: s is scaled to geometric mean 1 (no quantizer notices a common factor), kept within e^-10 .. e^10, and fitted
to what the norm's dtype can store; maxima below 1e-5 count as 1e-5; tokens are always quantized dynamically. More in
docs/methods/smoothquant.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from abq_llm.architectures.table import NormPair
from abq_llm.calibration.block import BlockTask, input_statistics, output_error
from abq_llm.calibration.learned import LearnedWeights, Vectors
from abq_llm.errors import AbqError
from abq_llm.quantizers import QParams


@dataclass(frozen=True)
class SmoothQuant:
    """Options."""

    name: ClassVar[str] = "smoothquant"
    needs_data: ClassVar[bool] = True

    alpha: float = 0.5  # migration strength: the larger, the flatter the activations and the harder the weights

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise AbqError(f"{self}: alpha must be in 0..1")

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        target, weights, vectors = task.fp_output, LearnedWeights(task), Vectors()
        peaks = input_statistics(task, task.fp_stream).peak
        norms = [pair for pair in task.architecture.pairs if isinstance(pair, NormPair)]
        vectors.balance = weights.smoothing(norms, peaks, self.alpha)
        grids = weights.fold(vectors)
        task.block_loss = output_error(task, grids, target)
        return grids
