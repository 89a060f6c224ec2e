"""Cells of a comparison computed at the same time: a few processes on every device, each with one cell at a time."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from abq_llm.evaluation.comparison import Cell, Setup, compute

Job = tuple[Cell, Setup]


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """Methods that train before those that only look at data before those that need none; else in their order.

    What takes long and starts last would keep one process busy while the others have nothing left to do.
    """

    def length(job: Job) -> tuple[bool, bool]:
        method = job[0].method
        return hasattr(method, "epochs"), method is not None and method.needs_data

    return sorted(jobs, key=length, reverse=True)


def compute_all(
    jobs: Sequence[Job],
    directory: Path,
    devices: Sequence[torch.device],
    processes: int,
    prepare: Callable[[], None],
) -> Iterator[tuple[Job, str | None]]:
    """`comparison.compute` in that many processes, spread evenly over the devices (of one type, as the setups say).

    A process whose cell failed is replaced, since a CUDA error would stay with it; so is one that died, of memory
    perhaps, which costs the cell it had. Closing the iterator ends all of them.

    `prepare`, a function of a module, is called once in every process.

    Yields:
        each of `jobs`, started in their order, and its error if there is one, as they come.
    """
    waiting = deque(jobs)
    threads = max(1, (os.cpu_count() or 1) // processes)
    workers: dict[Connection, tuple[SpawnProcess, torch.device, Job]] = {}

    def give(ours: Connection, process: SpawnProcess, device: torch.device) -> None:
        job = waiting.popleft()
        cell, setup = job
        workers[ours] = process, device, job
        with suppress(BrokenPipeError):  # it died: whoever waits for it will see
            ours.send((cell, replace(setup, device=device)))

    def start(device: torch.device) -> None:
        spawn = get_context("spawn")  # a process that uses CUDA must not be forked
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(theirs, directory, device, threads, prepare), daemon=True)
        process.start()
        theirs.close()
        give(ours, process, device)

    try:
        for index in range(min(processes, len(waiting))):
            start(devices[index % len(devices)])
        while workers:
            for ours in wait(list(workers)):
                assert isinstance(ours, Connection)
                process, device, job = workers.pop(ours)
                try:
                    error = ours.recv()
                except (EOFError, ConnectionResetError):  # the latter if it had not read its job
                    error = "its process has died, of memory perhaps: try fewer --jobs"
                yield job, error
                if error is None and waiting:
                    give(ours, process, device)
                    continue
                ours.close()  # which ends it
                if waiting:
                    start(device)
    finally:
        for process, _, _ in workers.values():
            process.terminate()


def _work(
    connection: Connection, directory: Path, device: torch.device, threads: int, prepare: Callable[[], None]
) -> None:
    """Compute cell after cell until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: its result is not needed any more
    torch.set_num_threads(threads)
    prepare()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    while True:
        try:
            cell, setup = connection.recv()
        except EOFError:
            return
        connection.send(compute(cell, setup, directory))
