"""Experts that few calibration tokens reach: they are shown all of them, lest a method fits an expert to those few."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from abq_llm.calibration.block import BlockTask
from abq_llm.modules import LinearExperts


@contextmanager
def rare_experts_shown_all(task: BlockTask) -> Iterator[None]:
    """Within, experts to which fewer tokens of a stream are routed than they have inputs run on every token.

    Fewer vectors than their dimension do not span it: statistics and Hessians would know nothing of some directions.
    What the block computes stays the same. The experts are reported with their tokens.
    """
    experts = task.experts
    if experts is None or not len(task.fp_stream):
        yield
        return
    counts = [routed_tokens(task, experts, stream) for stream in (task.fp_stream, task.quantized_stream)]
    inputs, tokens = experts.in_features, task.fp_stream[..., 0].numel()
    rare = {index: count for index, count in enumerate(torch.stack(counts).amin(0).tolist()) if count < inputs}
    if rare:
        listing = ", ".join(f"{index} ({count})" for index, count in rare.items())
        task.report(
            f"block {task.index}: few of the {tokens} tokens reach experts {listing}: they are shown all tokens", None
        )
    with experts_shown_all(task, rare):
        yield


@contextmanager
def experts_shown_all(task: BlockTask, which: Iterable[int]) -> Iterator[None]:
    """Within, these experts of the block, if it has any, and no others run on every token; what it computes stays the
    same.
    """
    experts = task.experts
    if experts is None:
        yield
        return
    before, experts.shown_all = experts.shown_all, frozenset(which)
    try:
        yield
    finally:
        experts.shown_all = before


@torch.no_grad()
def routed_tokens(task: BlockTask, experts: LinearExperts, stream: Tensor) -> Tensor:
    """int64 [experts]: how many tokens of `stream` the router sends to each."""
    total = torch.zeros(len(experts), dtype=torch.int64, device=task.device)

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        total.add_(args[1].flatten().bincount(minlength=len(experts)))

    handle = experts.register_forward_pre_hook(count)
    try:
        for part in task.batches(stream):
            task.forward(stream[part].to(task.device), quantized=False)
    finally:
        handle.remove()
    return total
