"""The training loop that learned methods share: AdamW over a few vectors of one block, keep-best, NaN-safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    tensors: tuple[Tensor, ...]
    lr: float


@dataclass(frozen=True)
class Outcome:
    """Held-out loss before training and of the state that was kept; whether a loss or gradient was not finite on the way."""

    before: float
    after: float
    diverged: bool


def reconstruct(
    groups: Sequence[Group],
    loss: Callable[[Tensor], Tensor],
    *,
    training: Tensor,
    held_out: Tensor,
    batch_size: int,
    epochs: int,
    generator: torch.Generator,
    report: Callable[[int, float], None],
) -> Outcome:
    """Minimise `loss(sample indices)` over `training`; leave the tensors at the epoch that was best on `held_out`.

    An epoch that meets a loss or gradient which is not finite ends the training at the best state so far.
    """
    tensors = [tensor for group in groups for tensor in group.tensors]
    best_loss = before = _evaluate(loss, held_out, batch_size)
    best_state = [tensor.detach().clone() for tensor in tensors]
    diverged = not _finite(before)
    if tensors and epochs and not diverged:
        optimizer = torch.optim.AdamW(
            [{"params": list(g.tensors), "lr": g.lr} for g in groups if g.tensors], weight_decay=0.0, fused=True
        )
        for tensor in tensors:
            tensor.requires_grad_(True)
        for epoch in range(epochs):
            for batch in training[torch.randperm(len(training), generator=generator)].split(batch_size):
                optimizer.zero_grad()
                loss(batch).backward()
                optimizer.step()
            epoch_loss = _evaluate(loss, held_out, batch_size)
            report(epoch, epoch_loss)
            if not _finite(epoch_loss):
                diverged = True
                break
            if epoch_loss < best_loss:
                best_loss = epoch_loss
                best_state = [tensor.detach().clone() for tensor in tensors]
        for tensor, best in zip(tensors, best_state, strict=True):
            tensor.requires_grad_(False)
            tensor.copy_(best)
    return Outcome(before, best_loss, diverged)


@torch.no_grad()
def _evaluate(loss: Callable[[Tensor], Tensor], samples: Tensor, batch_size: int) -> float:
    batches = samples.split(batch_size)
    return float(sum(loss(batch) * len(batch) for batch in batches) / len(samples))


def _finite(loss: float) -> bool:
    return abs(loss) < float("inf")
