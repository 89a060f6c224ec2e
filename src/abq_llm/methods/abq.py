"""ABQ-LLM (Zeng et al., AAAI 2025, arXiv:2408.08554).

Learns balance vectors s, clips, compensation vectors a, b and, beyond the paper, the rounding of every weight of one
block (`calibration.learned`) by the losses

    -log cos(d_q, d_fp) - log cos(d_q, d*_fp) + KL(A_q || A_fp) + KL(A_fp || A_q)        (`calibration.losses`)

Where this differs from the paper and from its published code, and what each part is worth, is in docs/methods/abq.md.
Bit balance is not here: it is a property of the grid, `W2*`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abq_llm.architectures.table import Pair, QueryKeyPair
from abq_llm.attention import record_attention
from abq_llm.calibration.block import BlockTask, InputStatistics, input_statistics
from abq_llm.calibration.fit import fit, split_samples, take
from abq_llm.calibration.learned import CLIP_AT_START, LearnedWeights, Vectors
from abq_llm.calibration.losses import akl_loss, dlc_loss, relative_mse
from abq_llm.calibration.reconstruct import Group, steps_of_epoch
from abq_llm.calibration.transforms import consumers, initial_log_scale, spread
from abq_llm.errors import AbqError
from abq_llm.quantizers import QParams, choose_qparams, fake_quantize, to_groups

FEWEST_STEPS = 32  # with fewer, steps long enough to turn every rounding do more harm than good


@dataclass(frozen=True)
class Abq:
    """Options. Each part can be switched off for ablation; `rounding` and `search` are not the paper's."""

    name: ClassVar[str] = "abq"
    needs_data: ClassVar[bool] = True

    epochs: int = 20
    balance: bool = True
    clipping: bool = True
    compensation: bool = True
    rounding: bool = True  # learn of each weight whether it goes up or down, at rates that fall to 0; off: to nearest
    dlc: bool = True  # off: relative MSE to the fp output
    akl: bool = True
    search: bool = True  # start from the best of a few alphas and from error-minimising clips; off: alpha 0.5, clip 1
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    lr_balance: float = 5e-3
    lr_clipping: float = 1e-2
    lr_compensation: float = 1e-2
    lr_rounding: float = 1.0  # divided by the number of steps: V can get half a step of the grid away, as in SignRound
    akl_rows: int = 256  # at most so many rows of each attention map in a step, drawn at random

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.akl_rows < 1 or not self.alphas:
            raise AbqError(f"{self}: epochs must be >= 0, akl_rows >= 1, and alphas not empty")

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        return _BlockFit(self, task).run()


class _BlockFit:
    """Fit the vectors and the rounding of one block and fold them into it."""

    def __init__(self, options: Abq, task: BlockTask) -> None:
        self.options, self.task = options, task
        self.weights = LearnedWeights(task)
        self.target = task.fp_output
        self.statistics = input_statistics(task, task.quantized_stream)
        self.second_target = self.statistics.output
        self.teacher = task.queries_and_keys(task.fp_stream) if options.akl else None
        self.samples = split_samples(task)

    def run(self) -> dict[str, QParams]:
        options, vectors = self.options, self._start(self.statistics)
        steps = options.epochs * steps_of_epoch(self.samples.training, self.task.batch_size)
        fit(
            self.task,
            [
                Group(tuple(vectors.balance.values()), options.lr_balance),
                Group(tuple(vectors.clip.values()), options.lr_clipping),
                Group((*vectors.left.values(), *vectors.right.values()), options.lr_compensation),
                Group(tuple(vectors.rounding.values()), options.lr_rounding / max(FEWEST_STEPS, steps)),
            ],
            self._fetch,
            lambda *batch: self._loss(vectors, *batch),
            self.samples,
            options.epochs,
            decay=options.rounding,
        )
        return self.weights.fold(vectors)

    def _start(self, statistics: InputStatistics) -> Vectors:
        """Balance by the best alpha, clips of least error, compensation a b^T = 0, rounding to nearest."""
        options, task = self.options, self.task
        vectors = Vectors()
        if options.balance:
            vectors.balance = self._balance(statistics, 0.5)
            if options.search:
                vectors.balance = self._best([self._balance(statistics, alpha) for alpha in options.alphas])
        if options.clipping:
            moved = self.weights.transformed(vectors)
            energy = dict(statistics.energy)
            for pair, log_scale in vectors.balance.items():
                for name in consumers(pair):
                    scale = spread(log_scale, len(energy[name]), task.head_dim).exp()
                    energy[name] = energy[name] / scale.square()
            for size, names in self.weights.sizes.items():
                logits = torch.cat([self._clip_logits(moved[f"{name}.weight"], energy[name]) for name in names])
                vectors.clip[size] = torch.stack([logits, logits])
        if options.compensation and task.index in (0, task.count - 1):
            for name in task.architecture.compensated:
                weight = self.weights.parameters[f"{name}.weight"]
                vectors.left[name] = weight.new_zeros(weight.shape[0], 1)
                vectors.right[name] = weight.new_ones(1, weight.shape[1])
        if options.rounding:
            vectors.rounding = self.weights.to_nearest()
        return vectors

    @torch.no_grad()
    def _best(self, candidates: list[dict[Pair, Tensor]]) -> dict[Pair, Tensor]:
        """The candidate of least held-out loss, among them no balance at all."""
        candidates = [*candidates, {pair: torch.zeros_like(log_scale) for pair, log_scale in candidates[0].items()}]
        losses = [0.0] * len(candidates)
        for samples in self.samples.held_out.split(self.task.batch_size):
            batch = self._fetch(samples, False)
            for i, balance in enumerate(candidates):
                losses[i] += float(self._loss(Vectors(balance), *batch)) * len(samples)
        return candidates[min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))]

    def _balance(self, statistics: InputStatistics, alpha: float) -> dict[Pair, Tensor]:
        """Where the balance vectors start. Queries and keys take part only if keys are quantized: else their scales
        do nothing.
        """
        return {
            pair: initial_log_scale(pair, self.weights.parameters, statistics.peak, self.task.head_dim, alpha)
            for pair in self.task.architecture.pairs
            if self.task.scheme.kv is not None or not isinstance(pair, QueryKeyPair)
        }

    def _clip_logits(self, weight: Tensor, energy: Tensor) -> Tensor:
        """Logits [groups, 1] of the clips to start with: 1, or with `search` those of least energy-weighted error."""
        grouped = to_groups(weight, self.task.scheme.group_size)
        best = torch.ones_like(grouped[..., :1])
        if self.options.search:
            fmt = self.task.scheme.weight
            assert fmt is not None
            importance = to_groups(energy[None], self.task.scheme.group_size)
            least = torch.full_like(best, math.inf)
            for clip in torch.linspace(1.0, 0.4, 13).tolist():
                grid = choose_qparams(grouped, fmt, clip_hi=clip, clip_lo=clip, scale_dtype=self.task.scale_dtype)
                error = ((fake_quantize(grouped, grid, fmt) - grouped).square_() * importance).sum(-1, keepdim=True)
                best, least = torch.where(error < least, clip, best), torch.minimum(error, least)
        return torch.logit(best.flatten(0, 1) * CLIP_AT_START)

    def _fetch(self, samples: Tensor, training: bool) -> tuple[Tensor, ...]:
        """What `_loss` needs of some samples: the quantized stream, both targets, the teacher's queries, keys and
        rows.
        """
        streams = [self.task.quantized_stream, self.target, self.second_target, *(self.teacher or ())]
        batch = take(self.task, streams, samples)
        if self.teacher is not None:
            tokens = self.target.shape[1]
            rows = torch.arange(0, tokens, -(-tokens // self.options.akl_rows))
            if training:  # other rows each time
                rows = torch.randperm(tokens, generator=self.samples.generator)[: len(rows)]
            batch.append(rows.to(self.task.device, non_blocking=True))
        return tuple(batch)

    def _loss(
        self, vectors: Vectors, hidden: Tensor, target: Tensor, second_target: Tensor, *teacher: Tensor
    ) -> Tensor:
        with record_attention(self.task.attention) as records:
            output = self.task.forward(hidden, self.weights.quantized(vectors), quantized=True)
        loss = dlc_loss(output, target, second_target) if self.options.dlc else relative_mse(output, target)
        if teacher:
            queries, keys, rows = teacher
            met = records[0]
            loss = loss + akl_loss((met.query, met.key), (queries, keys), rows, met.mask, met.softcap)
        return loss
