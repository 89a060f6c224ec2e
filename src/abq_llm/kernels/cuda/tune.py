"""Automatic kernel search: time every candidate plan of a product on this GPU, and keep the fastest on disk.

One JSON file per kind of GPU, `<cache>/tuned/<device>.json`: {problem: {"path", "tile", "us"}}, where a problem is
itself JSON. Entries are only ever used as a choice among the plans of this version: see `lookup`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import activations, decode, gemm_mma, gemm_mma_f16, gemm_wgmma, gemm_wgmma_f16, jit, plan
from abq_llm.kernels.cuda.gpus import Gpu
from abq_llm.kernels.cuda.plan import Plan
from abq_llm.kernels.cuda.problem import Problem

COLD_BYTES = 120 * 2**20  # weights are rotated until so many lie between two uses: more than any L2 keeps
REPLAYS = 6  # of which the first is not counted
EXACT_TOKENS = 16  # up to which every number of tokens has a plan of its own
TILES = {
    "decode": decode.Tile,
    "mma": gemm_mma.Tile,
    "mma_f16": gemm_mma_f16.Tile,
    "wgmma": gemm_wgmma.Tile,
    "wgmma_b1": gemm_wgmma.Tile,
    "wgmma_f16": gemm_wgmma.Tile,
    "dequantize": None,
}

Timed = tuple[float, Plan]  # µs of one product by that plan
Run = Callable[[Plan, Problem, Tensor, list[Tensor], None], Tensor]


def bucket(problem: Problem) -> Problem:
    """Problems that share a plan: beyond 16 tokens, those up to the next power of two."""
    return problem if problem.m <= EXACT_TOKENS else replace(problem, m=1 << (problem.m - 1).bit_length())


@lru_cache(maxsize=256)
def plans(problem: Problem, gpu: Gpu) -> tuple[Plan, ...]:
    """What `search` times: the heuristic's plan, then every other candidate."""
    return tuple(dict.fromkeys([plan.choose(problem, gpu), *plan.candidates(problem, gpu)]))


# --- store ---


def directory() -> Path:
    try:
        return jit.cache_directory().parent / "tuned"
    except RuntimeError as error:  # of Path.home()
        raise AbqError(f"no folder for tuned kernels ({error}); set ABQ_CACHE_DIR") from error


def file_of(device_name: str) -> Path:
    return directory() / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name).strip('-')}.json"


def lookup(problem: Problem, device_name: str, gpu: Gpu) -> Plan | None:
    """The plan that was the fastest on this kind of GPU, unless this version would not consider it for the problem.

    Milliseconds, so `abq_llm.kernels.cuda` remembers the answer.
    """
    try:
        file = file_of(device_name)
    except AbqError:
        return None
    shared = bucket(problem)
    timed = read(file).get(shared)
    if timed is None:
        return None
    if timed[1] not in plans(shared, gpu):
        _warn(f"{file} has plans that this version of abq-llm does not offer; run `abq tune` again")
        return None
    return timed[1]


@lru_cache
def read(file: Path) -> dict[Problem, Timed]:
    """What `file` holds; nothing if there is no such file. Entries that make no sense are left out, and it says so."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8")).items()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        _warn(f"tuned kernels in {file} cannot be read ({error}); run `abq tune` again")
        return {}
    found, bad = {}, []
    for key, entry in entries:
        try:
            found[_problem(key)] = float(entry["us"]), _plan(entry["path"], entry["tile"])
        except (ValueError, KeyError, TypeError) as error:
            bad.append(error)
    if bad:
        _warn(f"{len(bad)} of {len(entries)} tuned kernels in {file} make no sense ({bad[0]!r}); run `abq tune` again")
    return found


def keep(found: Mapping[Problem, Timed], device_name: str) -> Path:
    """Add to the file of this kind of GPU, which is written aside and renamed. Entries that make no sense are dropped.

    Takes effect in processes started later, and here after `abq_llm.kernels.cuda._plan.cache_clear()`.
    """
    file = file_of(device_name)
    read.cache_clear()  # another process may have written since
    merged = {**read(file), **{bucket(problem): timed for problem, timed in found.items()}}
    entries = {
        json.dumps(asdict(problem)): {"path": best.path, "tile": asdict(best.tile) if best.tile else None, "us": us}
        for problem, (us, best) in merged.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
        read.cache_clear()
    return file


def _problem(key: str) -> Problem:
    return Problem(**_integers(json.loads(key)))


def _plan(path: str, tile: dict[str, Any] | None) -> Plan:
    kind = TILES[path]
    if kind is None:
        if tile is not None:
            raise ValueError(f"{path} with a tile")
        return Plan(path)
    return Plan(path, kind(**_integers(tile)))


def _integers(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(value, int) for value in values.values()):
        raise TypeError(f"{values!r} is no object of integers")
    return values


@cache  # once
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


# --- search ---


def search(problem: Problem, run: Run, gpu: Gpu, x: Tensor, weights: Sequence[list[Tensor]]) -> list[Timed]:
    """Every plan that runs, fastest first.

    x [m, k]; weights: prepared copies of the weight, rotated so that each is read from memory.

    Raises:
        AbqError: none runs; the message is that of the heuristic's plan.
    """
    timed: list[Timed] = []
    errors = []
    for candidate in plans(problem, gpu):
        try:
            timed.append((measure(candidate, problem, run, x, weights), candidate))
        except AbqError as error:  # does not compile or launch here: not a candidate after all
            errors.append(error)
    if not timed:
        raise AbqError(f"no kernel runs: {errors[0]}") from errors[0]
    return sorted(timed, key=lambda pair: pair[0])


def measure(chosen: Plan, problem: Problem, run: Run, x: Tensor, weights: Sequence[list[Tensor]]) -> float:
    """µs of one product, activations' quantization included: the median of replays of a CUDA graph over `weights`."""
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        for weight in weights[:2]:
            run(chosen, problem, x, weight, None)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for weight in weights:
            run(chosen, problem, x, weight, None)
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(weights))
    return statistics.median(times[1:])


def cold_copies(weight: list[Tensor]) -> list[list[Tensor]]:
    """The prepared weight and enough copies of it."""
    size = sum(tensor.nbytes for tensor in weight)
    copies = min(200, max(3, -(-COLD_BYTES // size)))
    return [weight, *([tensor.clone() for tensor in weight] for _ in range(copies))]


# --- compilation ahead of the search ---


def precompile(
    problems: Sequence[Problem],
    gpu: Gpu,
    dtype: torch.dtype,
    arch: str,
    pool: Executor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compile all that `search` will want in `pool`, whose processes share the cache on disk.

    progress: is told how many kernels are done, and of how many.
    """
    kernels = {
        (stem, json.dumps(constants))
        for problem in problems
        for candidate in plans(problem, gpu)
        if candidate.tile
        for stem, constants in [_kernel(candidate, problem, dtype, gpu)]
    }
    jobs = [pool.submit(_compile, stem, constants, arch) for stem, constants in sorted(kernels)]
    progress(0, len(jobs))
    try:
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            progress(done, len(jobs))
    finally:
        for job in jobs:
            job.cancel()


def _compile(stem: str, constants: str, arch: str) -> None:
    try:
        jit.compile_cubin(stem, stem, json.loads(constants), arch)
    except AbqError:
        return  # `search` leaves it out


def _kernel(candidate: Plan, problem: Problem, dtype: torch.dtype, gpu: Gpu) -> tuple[str, dict[str, bool | int | str]]:
    """(stem, constants) of what the `run` of the plan's module loads."""
    tile, words, grouped = candidate.tile, problem.group_words, problem.group_size > 0
    if isinstance(tile, decode.Tile):
        return "decode", decode.constants(tile, problem, activations.TYPE_NAMES[dtype], problem.in_fours, gpu.sms)
    if isinstance(tile, gemm_mma_f16.Tile):
        return "gemm_mma_f16", gemm_mma_f16.constants(tile, problem, dtype, gpu.shared_limit)
    if isinstance(tile, gemm_mma.Tile):
        return "gemm_mma", gemm_mma.constants(
            tile, problem.planes, dtype, words, zero_point=grouped, programmatic=True, shared_limit=gpu.shared_limit
        )
    assert isinstance(tile, gemm_wgmma.Tile)
    if candidate.path == "wgmma_f16":
        return "gemm_wgmma_f16", gemm_wgmma_f16.constants(tile, problem, dtype)
    constants = gemm_wgmma.constants(tile, problem.planes, dtype, group_words=words, programmatic=True)
    if candidate.path == "wgmma_b1":
        return "gemm_wgmma_b1", {**constants, "x_planes": problem.bits}
    return "gemm_wgmma", constants
