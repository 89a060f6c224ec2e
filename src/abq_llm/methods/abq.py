"""ABQ-LLM (Zeng et al., AAAI 2025, arXiv:2408.08554): balance vectors, learned clipping, compensation, DLC and AKL losses.

    W_q = Q( W diag(s) + a b^T ;  hi = sigmoid(gamma) max,  lo = sigmoid(beta) min )        learned: s, gamma, beta, a, b
    loss = -log cos(d_q, d_fp) - log cos(d_q, d*_fp) + KL(A_q || A_fp) + KL(A_fp || A_q)

Where this differs from the paper and from its published code, and what each part is worth, is in docs/methods/abq.md. Bit balance is
not here: it is a property of the grid, `W2*`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from abq_llm.architectures.table import Pair, QueryKeyPair
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
from abq_llm.attention import record_attention
from abq_llm.quantizers import QParams, choose_qparams, fake_quantize, from_groups, to_groups

CLIP_LOGIT = 4.0  # where the clip logits start; the clip is sigmoid(logit) / sigmoid(4), so it starts at exactly 1


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
    akl_rows: int = 256  # rows of each attention map in a step, drawn at random

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        return _BlockFit(self, task).run()


@dataclass
class Vectors:
    """What is learned in one block."""

    balance: dict[Pair, Tensor] = field(default_factory=dict)  # log s
    clip_hi: dict[str, Tensor] = field(default_factory=dict)  # logits [N, groups, 1]
    clip_lo: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)  # a [N, 1]
    right: dict[str, Tensor] = field(default_factory=dict)  # b [1, K]


class _BlockFit:
    """Fit the vectors of one block and fold them into it."""

    def __init__(self, options: Abq, task: BlockTask) -> None:
        self.options, self.task = options, task
        self.parameters = block_parameters(task.block)
        self.generator = torch.Generator().manual_seed(task.seed * 1_000_003 + task.index)
        self.target = task.fp_output
        self.second_target = task.forward_stream(task.quantized_stream, quantized=False)
        self.teacher = task.queries_and_keys(task.fp_stream) if options.akl else None
        samples = len(task.fp_stream)
        held_out = samples // 8 if samples >= 8 else 0
        order = torch.randperm(samples, generator=self.generator)
        self.training, self.held_out = order[held_out:], order[:held_out] if held_out else order

    def run(self) -> dict[str, QParams]:
        task, options = self.task, self.options
        vectors = self._start(input_statistics(task, task.quantized_stream))
        outcome = reconstruct(
            [
                Group(tuple(vectors.balance.values()), options.lr_balance),
                Group((*vectors.clip_hi.values(), *vectors.clip_lo.values()), options.lr_clipping),
                Group((*vectors.left.values(), *vectors.right.values()), options.lr_compensation),
            ],
            lambda samples: self._loss(vectors, samples),
            training=self.training,
            held_out=self.held_out,
            batch_size=task.batch_size,
            epochs=options.epochs,
            generator=self.generator,
            report=lambda epoch, loss: task.report(f"epoch {epoch + 1}/{options.epochs}", loss),
        )
        task.block_loss = outcome.after
        if outcome.diverged:
            task.report(f"block {task.index}: loss not finite, kept the best state (loss {outcome.after:.4g})", outcome.after)
        return self._fold(vectors)

    def _start(self, statistics: InputStatistics) -> Vectors:
        options, task = self.options, self.task
        vectors = Vectors()
        if options.balance:
            alphas = options.alphas if options.search else (0.5,)
            candidates = [self._balance(statistics, alpha) for alpha in alphas]
            if options.search:
                candidates.append({pair: torch.zeros_like(log_scale) for pair, log_scale in candidates[0].items()})
            with torch.no_grad():
                losses = [float(self._loss(Vectors(balance), self.held_out[:8])) for balance in candidates]
            vectors.balance = candidates[min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))]
        moved = self._transform(vectors)
        if options.clipping:
            energy = dict(statistics.energy)
            for pair, log_scale in vectors.balance.items():
                for name in consumers(pair):
                    columns = len(energy[name]) // len(log_scale)
                    energy[name] = energy[name] / _spread(log_scale, columns, task.head_dim).exp().square()
            for name in task.linears:
                logits = self._clip_logits(moved[f"{name}.weight"], energy[name])
                vectors.clip_hi[name], vectors.clip_lo[name] = logits, logits.clone()
        if options.compensation and task.index in (0, task.count - 1):
            for name in task.architecture.compensated:
                weight = self.parameters[f"{name}.weight"]
                vectors.left[name] = weight.new_zeros(weight.shape[0], 1)
                vectors.right[name] = weight.new_ones(1, weight.shape[1])
        return vectors

    def _balance(self, statistics: InputStatistics, alpha: float) -> dict[Pair, Tensor]:
        """Where the balance vectors start. Queries and keys take part only if keys are quantized: else their scales do nothing."""
        return {
            pair: initial_log_scale(pair, self.parameters, statistics.peak, self.task.head_dim, alpha)
            for pair in self.task.architecture.pairs
            if self.task.scheme.kv is not None or not isinstance(pair, QueryKeyPair)
        }

    def _clip_logits(self, weight: Tensor, energy: Tensor) -> Tensor:
        """Logits of the clip that each group starts with: 1, or with `search` the one of least energy-weighted error."""
        grouped = to_groups(weight, self.task.scheme.group_size)
        best = torch.ones_like(grouped[..., :1])
        if self.options.search:
            fmt, size = self.task.scheme.weight, grouped.shape[-1]
            assert fmt is not None
            importance = to_groups(energy[None], self.task.scheme.group_size)
            least = torch.full_like(best, math.inf)
            for clip in torch.linspace(1.0, 0.4, 13).tolist():
                grid = choose_qparams(grouped, fmt, clip_hi=clip, clip_lo=clip, scale_dtype=self.task.scale_dtype)
                error = ((fake_quantize(grouped, grid, fmt) - grouped).square_() * importance).sum(-1, keepdim=True)
                best, least = torch.where(error < least, clip, best), torch.minimum(error, least)
            assert size == grouped.shape[-1]
        return torch.logit(best * torch.sigmoid(torch.tensor(CLIP_LOGIT)))

    def _loss(self, vectors: Vectors, samples: Tensor) -> Tensor:
        task, device = self.task, self.task.device
        with record_attention(task.attention) as records:
            output = task.forward(
                task.quantized_stream[samples].to(device), self._quantized(vectors), quantized=True
            )
        target = self.target[samples].to(device)
        if self.options.dlc:
            loss = dlc_loss(output, target, self.second_target[samples].to(device))
        else:
            loss = relative_mse(output, target)
        if self.teacher is not None:
            queries, keys = self.teacher
            tokens = output.shape[1]
            rows = torch.arange(tokens)
            if tokens > self.options.akl_rows:
                rows = torch.randperm(tokens, generator=self.generator)[: self.options.akl_rows]
            teacher = queries[samples].to(device), keys[samples].to(device)
            loss = loss + akl_loss(records[0], teacher, rows.to(device))
        return loss

    def _transform(self, vectors: Vectors) -> Parameters:
        parameters = self.parameters
        for pair, log_scale in vectors.balance.items():
            parameters = apply(pair, parameters, log_scale, self.task.head_dim)
        for name, left in vectors.left.items():
            weight = parameters[f"{name}.weight"]
            parameters = {**parameters, f"{name}.weight": weight + left @ vectors.right[name]}
        return parameters

    def _grid(self, vectors: Vectors, name: str, grouped: Tensor) -> QParams:
        assert self.task.scheme.weight is not None
        hi, lo = (
            torch.sigmoid(logits[name]) / torch.sigmoid(torch.tensor(CLIP_LOGIT)) if logits else 1.0
            for logits in (vectors.clip_hi, vectors.clip_lo)
        )
        return choose_qparams(grouped, self.task.scheme.weight, clip_hi=hi, clip_lo=lo, scale_dtype=self.task.scale_dtype)

    def _quantized(self, vectors: Vectors) -> Parameters:
        """The block's parameters as they will run: transformed, compensated, quantized; differentiable in the vectors."""
        assert self.task.scheme.weight is not None
        parameters = dict(self._transform(vectors))
        for name in self.task.linears:
            weight = parameters[f"{name}.weight"]
            grouped = to_groups(weight, self.task.scheme.group_size)
            fake = fake_quantize(grouped, self._grid(vectors, name, grouped), self.task.scheme.weight)
            parameters[f"{name}.weight"] = from_groups(fake, weight.shape[1])
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
        return {
            name: self._grid(vectors, name, to_groups(linear.weight, self.task.scheme.group_size))
            for name, linear in self.task.linears.items()
        }


def _spread(log_scale: Tensor, repeats: int, head_dim: int) -> Tensor:
    """A scale per channel of a linear's input: value channels are shared by `repeats` query heads."""
    return log_scale if repeats == 1 else log_scale.view(-1, head_dim).repeat_interleave(repeats, 0).flatten()
