"""ABQ-LLM (Zeng et al., AAAI 2025, arXiv:2408.08554): balance vectors, learned clipping, compensation, DLC and AKL
losses.

    W_q = Q( W diag(s) + a b^T ;  hi = sigmoid(gamma) max,  lo = sigmoid(beta) min )        learned: s, gamma, beta,
    a, b
    loss = -log cos(d_q, d_fp) - log cos(d_q, d*_fp) + KL(A_q || A_fp) + KL(A_fp || A_q)

Where this differs from the paper and from its published code, and what each part is worth, is in
docs/methods/abq.md. Bit balance is not here: it is a property of the grid, `W2*`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from abq_llm.architectures.table import Pair, QueryKeyPair
from abq_llm.attention import record_attention
from abq_llm.calibration.block import BlockTask, InputStatistics, input_statistics
from abq_llm.calibration.losses import akl_loss, dlc_loss, relative_mse
from abq_llm.calibration.reconstruct import Group, reconstruct
from abq_llm.calibration.transforms import (
    Parameters,
    apply,
    block_parameters,
    consumers,
    initial_log_scale,
    storable_log_scale,
)
from abq_llm.errors import AbqError
from abq_llm.quantizers import QParams, choose_qparams, fake_quantize, from_groups, to_groups

CLIP_AT_START = 1 / (
    1 + math.exp(-4)
)  # a clip is sigmoid(logit) / sigmoid(4): it starts at exactly 1, where the slope is not 0


@dataclass(frozen=True)
class Abq:
    """Options. Each part of the paper can be switched off for ablation."""

    name: ClassVar[str] = "abq"
    needs_data: ClassVar[bool] = True

    epochs: int = 20
    balance: bool = True
    clipping: bool = True
    compensation: bool = True
    dlc: bool = True  # off: relative MSE to the fp output
    akl: bool = True
    search: bool = True  # start from the best of a few alphas and from error-minimising clips; off: alpha 0.5, clip 1
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    lr_balance: float = 5e-3
    lr_clipping: float = 1e-2
    lr_compensation: float = 1e-2
    akl_rows: int = 256  # at most so many rows of each attention map in a step, drawn at random

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.akl_rows < 1 or not self.alphas:
            raise AbqError(f"{self}: epochs must be >= 0, akl_rows >= 1, and alphas not empty")

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        return _BlockFit(self, task).run()


@dataclass
class Vectors:
    """What is learned in one block."""

    balance: dict[Pair, Tensor] = field(default_factory=dict)  # log s
    clip: dict[int, Tensor] = field(
        default_factory=dict
    )  # group size -> logits [2, groups of all its linears, 1]: hi, lo
    left: dict[str, Tensor] = field(default_factory=dict)  # a [N, 1]
    right: dict[str, Tensor] = field(default_factory=dict)  # b [1, K]


class _BlockFit:
    """Fit the vectors of one block and fold them into it."""

    def __init__(self, options: Abq, task: BlockTask) -> None:
        self.options, self.task = options, task
        self.parameters = block_parameters(task.block)
        self.sizes: dict[int, list[str]] = {}  # group size -> linears
        for name, linear in task.linears.items():
            self.sizes.setdefault(to_groups(linear.weight, task.scheme.group_size).shape[-1], []).append(name)
        self.generator = torch.Generator().manual_seed(task.seed * 1_000_003 + task.index)
        self.target = task.fp_output
        self.statistics = input_statistics(task, task.quantized_stream)
        self.second_target = self.statistics.output
        self.teacher = task.queries_and_keys(task.fp_stream) if options.akl else None
        samples = len(task.fp_stream)
        held_out = samples // 8 if samples >= 8 else 0
        order = torch.randperm(samples, generator=self.generator)
        self.training, self.held_out = order[held_out:], order[:held_out] if held_out else order

    def run(self) -> dict[str, QParams]:
        task, options = self.task, self.options
        vectors = self._start(self.statistics)
        outcome = reconstruct(
            [
                Group(tuple(vectors.balance.values()), options.lr_balance),
                Group(tuple(vectors.clip.values()), options.lr_clipping),
                Group((*vectors.left.values(), *vectors.right.values()), options.lr_compensation),
            ],
            self._fetch,
            lambda *batch: self._loss(vectors, *batch),
            training=self.training,
            held_out=self.held_out,
            batch_size=task.batch_size,
            epochs=options.epochs,
            generator=self.generator,
            report=lambda epoch, loss: task.report(f"epoch {epoch + 1}/{options.epochs}", loss),
        )
        task.block_loss = outcome.after
        if outcome.diverged:
            task.report(
                f"block {task.index}: loss not finite, kept the best state (loss {outcome.after:.4g})", outcome.after
            )
        return self._fold(vectors)

    def _start(self, statistics: InputStatistics) -> Vectors:
        options, task = self.options, self.task
        vectors = Vectors()
        if options.balance:
            vectors.balance = self._balance(statistics, 0.5)
            if options.search:
                vectors.balance = self._best([self._balance(statistics, alpha) for alpha in options.alphas])
        if options.clipping:
            moved = self._transform(vectors)
            energy = dict(statistics.energy)
            for pair, log_scale in vectors.balance.items():
                for name in consumers(pair):
                    repeats = len(energy[name]) // len(log_scale)
                    energy[name] = energy[name] / _spread(log_scale, repeats, task.head_dim).exp().square()
            for size, names in self.sizes.items():
                logits = torch.cat([self._clip_logits(moved[f"{name}.weight"], energy[name]) for name in names])
                vectors.clip[size] = torch.stack([logits, logits])
        if options.compensation and task.index in (0, task.count - 1):
            for name in task.architecture.compensated:
                weight = self.parameters[f"{name}.weight"]
                vectors.left[name] = weight.new_zeros(weight.shape[0], 1)
                vectors.right[name] = weight.new_ones(1, weight.shape[1])
        return vectors

    @torch.no_grad()
    def _best(self, candidates: list[dict[Pair, Tensor]]) -> dict[Pair, Tensor]:
        """The candidate of least held-out loss, among them no balance at all."""
        candidates = [*candidates, {pair: torch.zeros_like(log_scale) for pair, log_scale in candidates[0].items()}]
        losses = [0.0] * len(candidates)
        for samples in self.held_out.split(self.task.batch_size):
            batch = self._fetch(samples, False)
            for i, balance in enumerate(candidates):
                losses[i] += float(self._loss(Vectors(balance), *batch)) * len(samples)
        return candidates[min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))]

    def _balance(self, statistics: InputStatistics, alpha: float) -> dict[Pair, Tensor]:
        """Where the balance vectors start. Queries and keys take part only if keys are quantized: else their scales
        do nothing.
        """
        return {
            pair: initial_log_scale(pair, self.parameters, statistics.peak, self.task.head_dim, alpha)
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
        tensors = [self.task.quantized_stream, self.target, self.second_target, *(self.teacher or ())]
        batch = [tensor[samples.to(tensor.device)].to(self.task.device) for tensor in tensors]
        if self.teacher is not None:
            tokens = self.target.shape[1]
            rows = torch.arange(0, tokens, -(-tokens // self.options.akl_rows))
            if training:  # other rows each time
                rows = torch.randperm(tokens, generator=self.generator)[: len(rows)]
            batch.append(rows.to(self.task.device))
        return tuple(batch)

    def _loss(
        self, vectors: Vectors, hidden: Tensor, target: Tensor, second_target: Tensor, *teacher: Tensor
    ) -> Tensor:
        with record_attention(self.task.attention) as records:
            output = self.task.forward(hidden, self._quantized(vectors), quantized=True)
        loss = dlc_loss(output, target, second_target) if self.options.dlc else relative_mse(output, target)
        if teacher:
            queries, keys, rows = teacher
            loss = loss + akl_loss(records[0], (queries, keys), rows)
        return loss

    def _transform(self, vectors: Vectors) -> Parameters:
        parameters = self.parameters
        for pair, log_scale in vectors.balance.items():
            parameters = apply(pair, parameters, log_scale, self.task.head_dim)
        for name, left in vectors.left.items():
            weight = parameters[f"{name}.weight"]
            parameters = {**parameters, f"{name}.weight": weight + left @ vectors.right[name]}
        return parameters

    def _grids(self, vectors: Vectors, parameters: Parameters) -> Iterator[tuple[list[str], Tensor, QParams]]:
        """All groups of one size in one tensor, [groups of all linears, size], with their grids: far fewer kernels."""
        scheme = self.task.scheme
        assert scheme.weight is not None
        for size, names in self.sizes.items():
            groups = torch.cat(
                [to_groups(parameters[f"{name}.weight"], scheme.group_size).flatten(0, 1) for name in names]
            )
            hi, lo = torch.sigmoid(vectors.clip[size]) / CLIP_AT_START if vectors.clip else (1.0, 1.0)
            yield (
                names,
                groups,
                choose_qparams(groups, scheme.weight, clip_hi=hi, clip_lo=lo, scale_dtype=self.task.scale_dtype),
            )

    def _split(self, names: list[str], groups: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensor of `_grids` back into one [N, groups, ...] for each linear."""
        shapes = [self.parameters[f"{name}.weight"].shape for name in names]
        counts = [(n, self.task.scheme.groups(k)) for n, k in shapes]
        parts = groups.split([n * per_row for n, per_row in counts])
        return ((name, part.unflatten(0, count)) for name, part, count in zip(names, parts, counts, strict=True))

    def _quantized(self, vectors: Vectors) -> Parameters:
        """The block's parameters as they will run: transformed, compensated, quantized; differentiable in the
        vectors.
        """
        assert self.task.scheme.weight is not None
        parameters = dict(self._transform(vectors))
        for names, groups, grid in self._grids(vectors, parameters):
            for name, fake in self._split(names, fake_quantize(groups, grid, self.task.scheme.weight)):
                parameters[f"{name}.weight"] = from_groups(fake, self.parameters[f"{name}.weight"].shape[1])
        return parameters

    @torch.no_grad()
    def _fold(self, vectors: Vectors) -> dict[str, QParams]:
        """Write the transformed weights into the block and return the grids."""
        vectors.balance = {
            pair: storable_log_scale(pair, self.parameters, log_scale, self.task.storage_dtype)
            for pair, log_scale in vectors.balance.items()
        }
        parameters = self._transform(vectors)
        for name, parameter in self.task.block.named_parameters():
            parameter.copy_(parameters[name])
        grids: dict[str, QParams] = {}
        for names, _, grid in self._grids(vectors, parameters):
            scales, zero_points = self._split(names, grid.scale), self._split(names, grid.zero_point)
            grids |= {name: QParams(scale, zero) for (name, scale), (_, zero) in zip(scales, zero_points, strict=True)}
        return grids


def _spread(log_scale: Tensor, repeats: int, head_dim: int) -> Tensor:
    """A scale per channel of a linear's input: value channels are shared by `repeats` query heads."""
    return log_scale if repeats == 1 else log_scale.view(-1, head_dim).repeat_interleave(repeats, 0).flatten()
