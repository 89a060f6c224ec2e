"""What the linears of a block are given: which share an input, and the second moments of that input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress

import torch
from torch import Tensor, nn

from abq_llm.calibration.block import BlockTask
from abq_llm.calibration.experts import experts_shown_all
from abq_llm.calibration.transforms import Parameters
from abq_llm.errors import AbqError


@torch.no_grad()
def linears_by_input(task: BlockTask) -> list[list[str]]:
    """Names of the block's linears in the order in which they run, those that are given one tensor together.

    Seen on one sample, so that no table has to say it; on more where experts do not run on the first.
    """
    seen: list[tuple[Tensor, list[str]]] = []
    missing = set(task.linears)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in missing:
                return
            missing.remove(name)
            for x, names in seen:
                if x is args[0]:
                    names.append(name)
                    return
            seen.append((args[0], [name]))

        return see

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in task.linears.items()]
    try:
        for sample in task.quantized_stream.split(1):
            if missing:
                task.forward(sample.to(task.device), quantized=False)
    finally:
        for handle in handles:
            handle.remove()
    if missing:
        raise AbqError(f"block {task.index} never runs {', '.join(sorted(missing))}: nothing to calibrate it with")
    return [names for _, names in seen]


@torch.no_grad()
def moments(task: BlockTask, linear: nn.Linear, original: Parameters | None = None) -> tuple[Tensor, Tensor | None]:
    """H = 2 X X^T and D = 2 (X_fp - X) X^T, float64 [K, K]; D only with the parameters of the `original` block.

    X is the input of `linear` on the quantized stream, quantized as in the scheme, X_fp that of the original block on
    the fp stream; then experts are shown all tokens, so that both are of the same. Products of one batch are fp32,
    their sum is float64. A pass ends where it reaches `linear`.
    """

    class Reached(Exception):
        pass

    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # args: what the pre-hooks made of it
        seen.append(args[0].float().reshape(-1, linear.in_features).T)
        raise Reached

    def run(stream: Tensor, parameters: Parameters | None, *, quantized: bool) -> None:
        with suppress(Reached):
            task.forward(stream.to(task.device), parameters, quantized=quantized)

    def product(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(task.device.type, enabled=False):
            return a @ b.T

    H = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64, device=task.device)
    D = None if original is None else torch.zeros_like(H)
    handle = linear.register_forward_hook(see)
    try:
        with experts_shown_all(task, range(len(task.experts or ()))) if original else nullcontext():
            for part in task.batches(task.quantized_stream):
                run(task.quantized_stream[part], None, quantized=True)
                if original:
                    run(task.fp_stream[part], original, quantized=False)
                if seen:  # an expert need not run
                    H.add_(product(seen[0], seen[0]), alpha=2)
                if D is not None:
                    D.add_(product(seen[1] - seen[0], seen[0]), alpha=2)
                seen.clear()
    finally:
        handle.remove()
    return H, D
