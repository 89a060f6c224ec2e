"""Fit what is learned in one block: a part of the samples held out, the others trained on, the outcome reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abq_llm.calibration.block import BlockTask
from abq_llm.calibration.experts import experts_shown_all
from abq_llm.calibration.reconstruct import Batch, Group, reconstruct


@dataclass(frozen=True)
class Samples:
    """Indices of samples, int64, and the generator that drew them."""

    training: Tensor
    held_out: Tensor
    generator: torch.Generator


def split_samples(task: BlockTask) -> Samples:
    """An eighth of the samples, rounded down, is held out; if that is none, all are used for both."""
    generator = task.generator()
    order = torch.randperm(len(task.fp_stream), generator=generator)
    held_out = len(order) // 8
    return Samples(order[held_out:], order[:held_out] if held_out else order, generator)


def take(task: BlockTask, streams: Sequence[Tensor], samples: Tensor) -> list[Tensor]:
    """Some samples (int64) of streams that may live elsewhere, on the task's device; the GPU is not waited for."""
    places = {stream.device for stream in streams}
    indices = {place: samples.to(place, non_blocking=True) for place in places}
    return [stream[indices[stream.device]].to(task.device) for stream in streams]


def fit(
    task: BlockTask,
    groups: Sequence[Group],
    fetch: Callable[[Tensor, bool], Batch],
    loss: Callable[..., Tensor],
    samples: Samples,
    epochs: int,
    *,
    decay: bool = False,
    before_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train the tensors of `groups` by `reconstruct`, where the arguments are explained; the held-out loss that is left
    becomes the block's.
    """
    with experts_shown_all(task, ()):  # what they make of tokens that are not theirs has no part in the loss
        outcome = reconstruct(
            groups,
            fetch,
            loss,
            training=samples.training,
            held_out=samples.held_out,
            batch_size=task.batch_size,
            epochs=epochs,
            generator=samples.generator,
            report=lambda epoch, value: task.report(f"epoch {epoch + 1}/{epochs}", value),
            before_epoch=before_epoch,
            decay=decay,
            graphs=task.experts is None,
        )
    task.block_loss = outcome.after
    if outcome.diverged:
        task.report(
            f"block {task.index}: loss not finite, kept the best state (loss {outcome.after:.4g})", outcome.after
        )
