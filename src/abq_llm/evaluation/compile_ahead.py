"""Every product of a benchmark once, in several processes, which leaves the compilers' caches on disk warm."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress

import torch

from abq_llm.evaluation import rivals
from abq_llm.evaluation.kernel_speed import CHECKED_TOKENS
from abq_llm.evaluation.kernels_compared import Kernel, ours
from abq_llm.scheme import Scheme


def compile_ahead(
    candidates: Sequence[Kernel],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    device: torch.device,
    processes: int,
    *,
    check: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run each kernel that compiles on each shape (n, k) and number of tokens. One that fails is left for later.

    check: also what the comparison with the reference runs.
    progress: is told how many products are done, and of how many.

    Raises:
        concurrent.futures.BrokenExecutor: a process has died.
    """
    compiling = [kernel for kernel in candidates if kernel.backend or kernel.name in rivals.PACKAGES]
    slowest_first = sorted(compiling, key=lambda kernel: kernel.backend is not None)
    spawn = multiprocessing.get_context("spawn")  # a process that uses CUDA must not be forked
    with ProcessPoolExecutor(processes, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        jobs = [
            pool.submit(_run, kernel.name, kernel.scheme, kernel.backend, (m, n, k), str(device), check)
            for kernel in slowest_first
            for n, k in shapes
            for m in tokens
        ]
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                progress(done, len(jobs))
        finally:
            for job in jobs:
                job.cancel()


def _run(name: str, scheme: str, backend: str | None, problem: tuple[int, int, int], device: str, check: bool) -> None:
    parsed, place, (m, n, k) = Scheme.parse(scheme), torch.device(device), problem
    kernel = ours(backend, parsed) if backend else rivals.PACKAGES[name][1](parsed)
    assert kernel
    both = backend and check and m <= CHECKED_TOKENS and parsed.activation is not None
    dtypes = [torch.float16, torch.float32] if both else [torch.float16]
    with suppress(Exception):  # the measurement meets it again, and reports it
        weight = kernel.load(n, k, place).weight
        for dtype in dtypes:
            kernel.linear(torch.ones(m, k, dtype=dtype, device=place), weight)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
