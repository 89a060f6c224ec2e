"""Automatic kernel search: time every candidate plan of a product on this GPU, keep the fastest on disk.

One JSON file per kind of GPU, `<cache>/tuned/<name>.json`: {problem: {"path", "tile", "us"}}.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import activations, decode, gemm_mma, gemm_wgmma, jit, plan
from abq_llm.kernels.cuda.plan import Gpu, Plan
from abq_llm.kernels.cuda.problem import Problem

COLD_BYTES = 120 * 2**20  # weights are rotated until so many lie between two uses: more than any L2 keeps
TILES = {"decode": decode.Tile, "mma": gemm_mma.Tile, "wgmma": gemm_wgmma.Tile, "wgmma_b1": gemm_wgmma.Tile}

Run = Callable[[Plan, Problem, Tensor, list[Tensor], None], Tensor]


def bucket(problem: Problem) -> Problem:
    """Problems that share a plan: beyond 16 tokens, those up to the next power of two."""
    return problem if problem.m <= 16 else replace(problem, m=1 << (problem.m - 1).bit_length())


def file_of(device_name: str) -> Path:
    return jit.cache_directory().parent / "tuned" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name).strip('-')}.json"


def lookup(problem: Problem, device_name: str) -> Plan | None:
    """The plan that was found to be the fastest on this kind of GPU."""
    return read(file_of(device_name)).get(bucket(problem))


@lru_cache
def read(file: Path) -> dict[Problem, Plan]:
    """The plans in `file`; none if there is no such file, or it is not readable (which is said once)."""
    try:
        entries = json.loads(file.read_text())
        return {_problem(key): _plan(entry) for key, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"tuned kernels in {file} are not usable ({error}); run `abq tune` again", stacklevel=2)
        return {}


def keep(found: dict[Problem, tuple[float, Plan]], device_name: str) -> Path:
    """Add (µs, plan) of each problem to the file of this kind of GPU; written aside and renamed."""
    file = file_of(device_name)
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError):
        entries = {}
    for problem, (us, chosen) in found.items():
        tile = asdict(chosen.tile) if chosen.tile else None
        entries[json.dumps(asdict(bucket(problem)))] = {"path": chosen.path, "tile": tile, "us": us}
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(entries, indent=1) + "\n")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    read.cache_clear()
    return file


def _problem(key: str) -> Problem:
    return Problem(**json.loads(key))


def _plan(entry: dict[str, Any]) -> Plan:
    return Plan(entry["path"], TILES[entry["path"]](**entry["tile"]) if entry["tile"] else None)


def search(
    problem: Problem, run: Run, gpu: Gpu, x: Tensor, weights: Sequence[list[Tensor]]
) -> list[tuple[float, Plan]]:
    """(µs, plan) of every candidate that runs, fastest first.

    x [m, k]; weights: prepared copies of the weight, rotated so that each is read from memory.
    """
    timed = []
    for candidate in plan.candidates(problem, gpu):
        try:
            timed.append((measure(candidate, problem, run, x, weights), candidate))
        except AbqError:  # does not compile or launch here: not a candidate after all
            continue
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
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(weights))
    return statistics.median(times[1:])


def cold_copies(weight: list[Tensor]) -> list[list[Tensor]]:
    """The prepared weight and enough copies of it."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in weight)
    return [weight, *([tensor.clone() for tensor in weight] for _ in range(min(200, max(3, -(-COLD_BYTES // size)))))]


def precompile(problems: Sequence[Problem], gpu: Gpu, dtype: torch.dtype, arch: str, pool: Executor) -> None:
    """Compile all candidates in `pool`, whose processes share the cache on disk."""
    jobs = {
        (stem, json.dumps(constants))
        for problem in problems
        for candidate in plan.candidates(problem, gpu)
        if candidate.tile
        for stem, constants in [_kernel(candidate, problem, dtype, gpu)]
    }
    list(pool.map(_compile, *zip(*((stem, constants, arch) for stem, constants in jobs), strict=True)))


def _compile(stem: str, constants: str, arch: str) -> None:
    try:
        jit.compile_cubin(stem, stem, json.loads(constants), arch)
    except AbqError:
        return  # `search` leaves it out


def _kernel(candidate: Plan, problem: Problem, dtype: torch.dtype, gpu: Gpu) -> tuple[str, dict[str, bool | int | str]]:
    tile, words, grouped = candidate.tile, problem.group_words, problem.group_size > 0
    if isinstance(tile, decode.Tile):
        return "decode", decode.constants(tile, problem, activations.TYPE_NAMES[dtype])
    if isinstance(tile, gemm_mma.Tile):
        options = {"group_words": words, "zero_point": grouped, "programmatic": True, "shared_limit": gpu.shared_limit}
        return "gemm_mma", gemm_mma.constants(tile, problem.planes, dtype, **options)  # type: ignore[arg-type]
    assert isinstance(tile, gemm_wgmma.Tile)
    constants = gemm_wgmma.constants(tile, problem.planes, dtype, group_words=words, programmatic=True)
    if candidate.path == "wgmma_b1":
        return "gemm_wgmma_b1", {**constants, "x_planes": problem.bits}
    return "gemm_wgmma", constants
