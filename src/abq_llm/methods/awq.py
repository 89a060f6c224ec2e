"""AWQ (Lin, Tang, Tang, Yang, Chen, Wang, Gan, Xiao, Han, MLSys 2024, arXiv:2306.00978).

Protects the weights of the channels that see large activations, by scales that move between neighbours (equations 4
and 5):

    s = s_X^alpha        alpha* = argmin || Q(W diag(s)) (diag(s)^-1 X) - W X ||        s_X: mean |x| of each channel

alpha on a grid over [0, 1], for each pair of the architecture's table that rescales inputs of linears. Then the range
of each row or group w is clipped to [-r max|w|, r max|w|], with the r of least || Q(w) X - w X ||.

Differences from the paper and its code: the errors of the linears that share s are taken relative to their outputs and
added up (the code measures the output of attention or MLP); where activations are quantized, so is X; under
grouped-query attention s is shared by the heads of a group; clipping changes the grid only, never the weights. More in
docs/methods/awq.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from abq_llm.architectures.table import Pair, QueryKeyPair, ValueOutputPair
from abq_llm.calibration.block import BlockTask, output_error
from abq_llm.calibration.transforms import (
    LOG_LIMIT,
    Parameters,
    apply,
    block_parameters,
    consumers,
    module_of,
    row_count,
    spread,
    storable_log_scale,
)
from abq_llm.errors import AbqError
from abq_llm.quantizers import QParams, choose_qparams, fake_quantize, fake_quantize_dynamic, from_groups, to_groups


@dataclass(frozen=True)
class Awq:
    """Options. The defaults are those of the published code."""

    name: ClassVar[str] = "awq"
    needs_data: ClassVar[bool] = True

    grid: int = 20  # steps of alpha from 0 to 1, and of the clip r from 1 to 0
    scaling: bool = True  # search s; off: s = 1
    clipping: bool = True  # search r; off: r = 1
    max_shrink: float = 0.5  # r >= 1 - max_shrink
    tokens: int = 4096  # at most so many tokens, drawn at random, measure the errors

    def __post_init__(self) -> None:
        if self.grid < 1 or self.tokens < 1 or not 0 <= self.max_shrink < 1:
            raise AbqError(f"{self}: grid and tokens must be >= 1, max_shrink in 0..1 without 1")

    @torch.no_grad()
    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        assert task.scheme.weight is not None
        target = task.fp_output
        X, s_X = inputs(task, self.tokens)
        parameters = block_parameters(task.block)
        for pair in task.architecture.pairs if self.scaling else ():
            if not consumers(pair):
                continue
            log_s = self.search_scale(task, pair, parameters, X, s_X)
            parameters = apply(pair, parameters, log_s, task.head_dim)
            for name in consumers(pair):
                X[name] = X[name] / spread(log_s, X[name].shape[1], task.head_dim).exp()
        for name, parameter in task.block.named_parameters():
            parameter.copy_(parameters[name])
        # As in the code: what meets in a product before the softmax is hard to clip by the error of either factor.
        unclipped = {
            module_of(part)
            for pair in task.architecture.pairs
            if isinstance(pair, QueryKeyPair)
            for part in (pair.query, pair.key)
        }
        grids = {}
        for name, linear in task.linears.items():
            steps = int(self.max_shrink * self.grid + 1e-6) if self.clipping and name not in unclipped else 0
            ratios = [1 - step / self.grid for step in range(steps + 1)]
            grids[name] = search_clip(task, linear.weight.detach(), X[name], ratios)
        task.block_loss = output_error(task, grids, target)
        return grids

    def search_scale(
        self, task: BlockTask, pair: Pair, parameters: Parameters, X: dict[str, Tensor], s_X: dict[str, Tensor]
    ) -> Tensor:
        """log s of least `scaled_error`; the first, alpha = 0, is s = 1, and stays if no other is better or finite."""
        candidates = [
            storable_log_scale(
                pair, parameters, activation_log_scale(task, pair, s_X, step / self.grid), task.storage_dtype
            )
            for step in range(self.grid + 1)
        ]
        errors = torch.stack([scaled_error(task, pair, parameters, X, log_s) for log_s in candidates])
        least, best = errors.nan_to_num(math.inf, posinf=math.inf).min(0)  # the first of equals
        if least == math.inf:
            task.report(f"block {task.index}: inputs of {consumers(pair)[0]} not finite, left as they are", None)
        return candidates[int(best)]


def inputs(task: BlockTask, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each linear of the fp block on the fp stream: inputs fp32 [tokens, K], at most `count` tokens of all, the same
    for all linears that see them all, and as small a share of an expert's; and the sum of |x| of each channel, divided
    by the number of all tokens, fp32 [K].
    """
    stream = task.fp_stream
    samples, seqlen = stream.shape[:2]
    chosen = torch.randperm(samples * seqlen, generator=task.generator())[:count].sort().values
    rows: dict[str, list[Tensor]] = {name: [] for name in task.linears}
    total: dict[str, Tensor] = {}
    here = chosen

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float().reshape(-1, args[0].shape[-1])
            rows[name].append(x[here[here < len(x)].to(x.device)])
            total[name] = total.get(name, 0) + x.abs().sum(0)

        return see

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in task.linears.items()]
    try:
        for part in task.batches(stream):
            hidden = stream[part].to(task.device)
            first = part.start * seqlen
            here = chosen[(chosen >= first) & (chosen < first + len(hidden) * seqlen)] - first
            task.forward(hidden, quantized=False)
    finally:
        for handle in handles:
            handle.remove()
    X = {name: torch.cat(parts) for name, parts in rows.items()}
    return X, {name: x / (samples * seqlen) for name, x in total.items()}


def activation_log_scale(task: BlockTask, pair: Pair, s_X: dict[str, Tensor], alpha: float) -> Tensor:
    """log of s = s_X^alpha with geometric mean 1, one for each channel of the pair; 0 where s_X is not finite."""
    act = torch.stack([s_X[name] for name in consumers(pair)]).mean(0)  # of all tokens, also where experts share them
    if isinstance(pair, ValueOutputPair):  # the mean over the query heads that share a value head
        channels = row_count(dict(task.block.named_parameters()), pair.value)
        act = act.view(channels // task.head_dim, -1, task.head_dim).mean(1).flatten()
    log_s = alpha * act.clamp_min(1e-5).log()
    log_s = (log_s - log_s.mean()).clamp(-LOG_LIMIT, LOG_LIMIT)
    return torch.where(log_s.isfinite().all(), log_s, 0)


def scaled_error(task: BlockTask, pair: Pair, parameters: Parameters, X: dict[str, Tensor], log_s: Tensor) -> Tensor:
    """|| Q(W diag(s)) (diag(s)^-1 X) - W X ||^2 / || W X ||^2, summed over the linears that the pair feeds: a scalar
    that is left on the device.
    """
    scheme = task.scheme
    assert scheme.weight is not None
    total = log_s.new_zeros(())
    for name in consumers(pair):
        W, x = parameters[f"{name}.weight"], X[name]
        s = spread(log_s, x.shape[1], task.head_dim).exp()
        grouped = to_groups(W * s, scheme.group_size)
        grid = choose_qparams(grouped, scheme.weight, scale_dtype=task.scale_dtype)
        Q = from_groups(fake_quantize(grouped, grid, scheme.weight), W.shape[1])
        expected = x @ W.T
        error = (fake_quantize_dynamic(x / s, scheme.activation) @ Q.T - expected).square().sum()
        total = total + error / expected.square().sum().clamp_min(1e-12)
    return total


def search_clip(task: BlockTask, W: Tensor, X: Tensor, ratios: list[float]) -> QParams:
    """The grids [N, groups, 1] of W [N, K], each group's range within +-r max|w|, r of least `clipped_error`.

    `ratios` begins with 1, which stays where no other is better.
    """
    fmt = task.scheme.weight
    assert fmt is not None
    w = to_groups(W, task.scheme.group_size)
    x = to_groups(fake_quantize_dynamic(X, task.scheme.activation), task.scheme.group_size).transpose(0, 1)
    gram = x.transpose(1, 2) @ x  # X X^T of each group, [groups, size, size]
    hi, lo = (end.clamp_min(1e-30) for end in (w.amax(-1, keepdim=True), -w.amin(-1, keepdim=True)))
    largest = w.abs().amax(-1, keepdim=True)
    best, least = None, torch.full_like(largest, math.inf)
    for r in ratios:
        grid = choose_qparams(
            w,
            fmt,
            clip_hi=(r * largest / hi).clamp_max(1),
            clip_lo=(r * largest / lo).clamp_max(1),
            scale_dtype=task.scale_dtype,
        )
        error = clipped_error(w, fake_quantize(w, grid, fmt), gram)
        better = error < least
        best = grid if best is None else QParams(*(torch.where(better, *both) for both in zip(grid, best, strict=True)))
        least = torch.where(better, error, least)
    assert best is not None
    return best


def clipped_error(w: Tensor, Q: Tensor, gram: Tensor) -> Tensor:
    """|| Q X - w X ||^2 of each group: w and Q [N, groups, size], gram [groups, size, size] -> [N, groups, 1]."""
    gap = (Q - w).transpose(0, 1)
    return ((gap @ gram) * gap).sum(-1, keepdim=True).transpose(0, 1)
