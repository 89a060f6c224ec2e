"""The training loop that learned methods share: AdamW over what is learned in one block, keep-best, NaN-safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    tensors: tuple[Tensor, ...]
    lr: float


@dataclass(frozen=True)
class Outcome:
    """Held-out loss before training and of the state that was kept; whether a loss was not finite on the way."""

    before: float
    after: float
    diverged: bool


def reconstruct(
    groups: Sequence[Group],
    fetch: Callable[[Tensor, bool], Batch],
    loss: Callable[..., Tensor],
    *,
    training: Tensor,
    held_out: Tensor,
    batch_size: int,
    epochs: int,
    generator: torch.Generator,
    report: Callable[[int, float], None],
    graphs: bool = True,
    decay: bool = False,
    before_epoch: Callable[[int], None] = lambda epoch: None,
) -> Outcome:
    """Minimise `loss(*fetch(samples, True))` over `training`; leave the tensors as after the epoch best on `held_out`.

    Args:
        fetch: (sample indices int64 [batch], whether for training) -> tensors on the device, of the same shapes each
            time.
        loss: those tensors -> scalar.
        training, held_out: sample indices, int64. A last short batch of a shuffled epoch is left out.
        report: called with (epoch, held-out loss).
        graphs: on a GPU, capture steps into CUDA graphs. Then the loss must not look at values, as routing does.
        decay: learning rates fall linearly, from those of the groups in the first step to nearly 0 in the last.
        before_epoch: called with the epoch. What it changes in place, `loss` sees, captured or not.

    A held-out loss that is not finite ends the training; the best state so far is kept.
    """
    tensors = [tensor for group in groups for tensor in group.tensors]
    device = fetch(held_out[:1], False)[0].device
    graphed = _graphed if graphs and device.type == "cuda" else lambda function, device: function
    evaluate = graphed(torch.no_grad()(loss), device)

    def held_out_loss() -> float:
        batches = held_out.split(batch_size)
        losses = [float(evaluate(*fetch(batch, False))) * len(batch) for batch in batches]
        return sum(losses) / len(held_out)

    best_loss = before = held_out_loss()
    if not tensors or not epochs or not _finite(before):
        return Outcome(before, before, not _finite(before))
    best_state = [tensor.detach().clone() for tensor in tensors]
    trained = [group for group in groups if group.tensors]
    optimizer = torch.optim.AdamW(
        [{"params": list(group.tensors), "lr": _rate(group.lr, decay, device)} for group in trained],
        weight_decay=0.0,
        fused=True,
        capturable=device.type == "cuda",
    )
    for tensor in tensors:
        tensor.requires_grad_(True)

    def train(*batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss(*batch)
        value.backward()
        optimizer.step()
        return value.detach()

    step, diverged = graphed(train, device), False
    steps = steps_of_epoch(training, batch_size)
    for epoch in range(epochs):
        before_epoch(epoch)
        order = training[torch.randperm(len(training), generator=generator)]
        for i, batch in enumerate(order.split(batch_size)[:steps]):
            if decay:
                for group, state in zip(trained, optimizer.param_groups, strict=True):
                    state["lr"].fill_(group.lr * (1 - (epoch * steps + i) / (epochs * steps)))
            step(*fetch(batch, True))
        epoch_loss = held_out_loss()
        report(epoch, epoch_loss)
        if not _finite(epoch_loss):
            diverged = True
            break
        if epoch_loss < best_loss:
            best_loss = epoch_loss
            best_state = [tensor.detach().clone() for tensor in tensors]
    for tensor, best in zip(tensors, best_state, strict=True):
        tensor.requires_grad_(False)
        tensor.grad = None
        tensor.copy_(best)
    return Outcome(before, best_loss, diverged)


def steps_of_epoch(training: Tensor, batch_size: int) -> int:
    """How many batches are trained on: the whole ones, or one if there is none."""
    return max(1, len(training) // batch_size)


def _graphed(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Run `function` from a CUDA graph once it has been called three times with the same shapes.

    One block's step is some 500 small kernels; launched one by one they leave the GPU idle most of the time. Other
    shapes run eagerly. The result is overwritten by the next call.
    """
    calls: dict[tuple[torch.Size, ...], int] = {}
    graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}

    def call(*batch: Tensor) -> Tensor:
        with torch.cuda.device(device):  # a graph is captured on the current device, whichever that is
            return run(*batch)

    def run(*batch: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in batch)
        calls[shapes] = calls.get(shapes, 0) + 1
        if calls[shapes] <= 3:  # warm up on a side stream, as capturing wants it
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                value = function(*batch)
            torch.cuda.current_stream(device).wait_stream(stream)
            return value
        if shapes not in graphs:
            static = tuple(tensor.clone() for tensor in batch)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                value = function(*static)
            graphs[shapes] = graph, static, value
        graph, static, value = graphs[shapes]
        for to, tensor in zip(static, batch, strict=True):
            to.copy_(tensor)
        graph.replay()
        return value

    return call


def _rate(lr: float, changes: bool, device: torch.device) -> float | Tensor:
    """What AdamW is given: a tensor if it changes, for a captured step to see it."""
    return torch.tensor(lr, device=device) if changes else lr


def _finite(loss: float) -> bool:
    return abs(loss) < float("inf")
