"""`abq tune`: measure which kernel is the fastest for the linears of a model, on the GPU of this machine."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from abq_llm.cli.bench import TOKENS
from abq_llm.cli.common import (
    JsonFile,
    check_json,
    figure,
    progress_bar,
    quiet_libraries,
    read_shape,
    write_json,
)
from abq_llm.errors import AbqError

if TYPE_CHECKING:
    import torch

    from abq_llm.kernels.cuda.gpus import Gpu
    from abq_llm.kernels.cuda.plan import Plan
    from abq_llm.kernels.cuda.problem import Problem
    from abq_llm.scheme import Scheme

Work = dict["Problem", list["Scheme"]]  # with the schemes that have it: W3A8 and W2*A8 are the same product


class Dtype(str, Enum):
    """Of activations and results."""

    float16 = "float16"
    bfloat16 = "bfloat16"


def tune(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DIR | NxK...", help="Packed directory, or output x input features of linears.", show_default=False
        ),
    ] = None,
    scheme: Annotated[
        list[str] | None, typer.Option("--scheme", "-s", help="Of the shapes; repeatable. DIR has its own.")
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", "-m", min=1, help=f"Repeatable; default: {' '.join(map(str, TOKENS))}."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the activations that are timed.")] = Dtype.float16,
    stored: Annotated[bool, typer.Option("--list", help="Show what is stored, and measure nothing.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile (default: one per core).", show_default=False)
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Find the fastest kernel for the linears of DIR, or of some shapes, on this GPU; from then on it is used."""
    check_json(json_file)
    if stored:
        if targets or scheme or tokens:
            raise AbqError("--list shows all that is stored: it takes no shapes, schemes or tokens")
        _list(json_file)
        return

    import torch

    from abq_llm import kernels
    from abq_llm.devices import pick_device
    from abq_llm.kernels import cuda
    from abq_llm.kernels.cuda import jit
    from abq_llm.kernels.cuda import tune as search

    schemes, shapes = _what(targets or [], scheme or [])
    work = _problems(schemes, shapes, tokens or TOKENS)
    device = pick_device("auto")
    kernels.choose_backend("cuda", device)
    index = device.index or 0
    gpu, name, arch = cuda.gpu(index), torch.cuda.get_device_name(index), jit.arch_of(device)
    file = search.keep({}, name)  # a folder that cannot be written to is refused now
    torch_dtype = getattr(torch, dtype.value)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    rows: list[dict[str, Any]] = []
    with progress_bar(errors) as bar:
        try:
            _compile(list(work), gpu, torch_dtype, arch, jobs or os.cpu_count() or 1, bar)
            _time(work, gpu, torch_dtype, device, name, bar, rows)
        except KeyboardInterrupt as stop:
            raise AbqError(f"interrupted; the plans of {len(rows)} of {len(work)} products are in {file}") from stop
    if not rows:
        raise AbqError("nothing could be measured, see above")
    write_json(json_file, {"rows": rows})
    table = _table("scheme", "N x K", "M", "heuristic us", "best us", "gain", "plan", caption=f"{name}; kept in {file}")
    for row in rows:
        times = ("", figure(row["us"]), "")
        if row["heuristic_us"] is not None:
            times = figure(row["heuristic_us"]), figure(row["us"]), f"{row['gain']:.2f}x"
        table.add_row(", ".join(row["schemes"]), f"{row['n']}x{row['k']}", _tokens(row), *times, _plan_text(row))
    Console().print(table)


# --- what to tune ---


def _what(targets: list[str], schemes: list[str]) -> tuple[list[Scheme], list[tuple[int, int]]]:
    """(schemes, shapes (n, k)) that the command line asks for."""
    from abq_llm.scheme import Scheme

    if not targets:
        raise AbqError("name a packed directory or shapes NxK, or pass --list")
    if len(targets) == 1 and Path(targets[0]).exists():
        if schemes:
            raise AbqError(f"--scheme is for shapes: {targets[0]} has a scheme of its own")
        return _checkpoint(Path(targets[0]))
    shapes = []
    for text in targets:
        pair = read_shape(text)
        if pair is None:
            raise AbqError(f"{text}: is neither one packed directory nor NxK, for example 4096x11008")
        shapes.append(pair)
    if not schemes:
        raise AbqError("--scheme is required with shapes, for example -s W4A8")
    parsed = [Scheme.parse(text) for text in schemes]
    for one in parsed:
        if one.weight is None:
            raise AbqError(f"--scheme {one}: its weights stay floating point, there is no kernel to tune")
    return parsed, shapes


def _checkpoint(directory: Path) -> tuple[list[Scheme], list[tuple[int, int]]]:
    """The scheme of a packed directory, and the shapes of its linears; no tensor is read."""
    from abq_llm import checkpoint
    from abq_llm.linear import QuantLinear

    quiet_libraries()
    config = checkpoint.read_config(directory)
    linears = [module for module in checkpoint.validate(directory).modules() if isinstance(module, QuantLinear)]
    if not linears:
        raise AbqError(f"{directory}: no linear is quantized")
    return [config.scheme], list(dict.fromkeys((linear.out_features, linear.in_features) for linear in linears))


def _problems(schemes: list[Scheme], shapes: list[tuple[int, int]], tokens: list[int] | tuple[int, ...]) -> Work:
    """Each product once; those with the same weight follow one another."""
    from abq_llm.kernels.cuda.problem import Problem
    from abq_llm.kernels.cuda.tune import bucket

    work: Work = {}
    for scheme, (n, k), m in itertools.product(schemes, shapes, tokens):
        sharing = work.setdefault(bucket(Problem.of(m, n, k, scheme)), [])
        if scheme not in sharing:
            sharing.append(scheme)
    return work


# --- the two phases ---


def _compile(problems: list[Problem], gpu: Gpu, dtype: torch.dtype, arch: str, jobs: int, bar: Progress) -> None:
    from abq_llm.kernels.cuda import tune

    task = bar.add_task("compile", total=None, note="kernels")
    spawn = multiprocessing.get_context("spawn")  # a process that uses CUDA must not be forked
    try:
        with ProcessPoolExecutor(jobs, spawn, _leave_interrupts_to_parent) as pool:
            tune.precompile(
                problems, gpu, dtype, arch, pool, lambda done, total: bar.update(task, completed=done, total=total)
            )
    except BrokenExecutor as error:
        raise AbqError(
            f"a process that compiled has died, of memory perhaps: try --jobs {max(1, jobs // 2)}"
        ) from error


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _time(
    work: Work,
    gpu: Gpu,
    dtype: torch.dtype,
    device: torch.device,
    device_name: str,
    bar: Progress,
    rows: list[dict[str, Any]],
) -> None:
    """Search, keep, and append to `rows`, problem by problem."""
    import torch

    from abq_llm.evaluation.kernels_compared import random_weight
    from abq_llm.kernels import cuda
    from abq_llm.kernels.cuda import plan, tune

    task = bar.add_task("time", total=len(work), note="products")
    for (scheme, n, k), problems in itertools.groupby(work, lambda problem: (work[problem][0], problem.n, problem.k)):
        weights = None  # those of the last shape are freed before
        weights = tune.cold_copies(cuda.prepare(random_weight(scheme, n, k, device), scheme, k))
        for problem in problems:
            bar.update(task, note=f"{scheme} {n}x{k} M={problem.m}")
            x = torch.randn(problem.m, k, device=device).to(dtype)
            try:
                timed = tune.search(problem, cuda.run, gpu, x, weights)
            except AbqError as error:
                bar.console.print(f"failed: {scheme} {n}x{k} M={problem.m}: {error}", markup=False)
            else:
                file = tune.keep({problem: timed[0]}, device_name)
                chosen = plan.choose(problem, gpu)
                heuristic = next((us for us, one in timed if one == chosen), None)
                us, best = timed[0]
                row = _row(file, problem, us, best)
                gain = None if heuristic is None else heuristic / us
                rows.append({**row, "schemes": list(map(str, work[problem])), "heuristic_us": heuristic, "gain": gain})
            bar.update(task, advance=1)


# --- what is stored ---


def _list(json_file: Path | None) -> None:
    import torch

    from abq_llm.kernels.cuda import tune

    files = sorted(tune.directory().glob("*.json"))
    if torch.cuda.is_available():
        mine = tune.file_of(torch.cuda.get_device_name())
        files = [file for file in files if file == mine]
    rows = [_row(file, problem, us, best) for file in files for problem, (us, best) in tune.read(file).items()]
    rows.sort(key=lambda row: [row[key] for key in ("device", "planes", "bits", "group_size", "n", "k", "m")])
    write_json(json_file, {"rows": rows})
    if not rows:
        print(f"nothing is stored in {tune.directory()}" + (" for this GPU" if torch.cuda.is_available() else ""))
        return
    table = _table("device", "planes", "activations", "group", "N x K", "M", "us", "plan")
    for row in rows:
        bits = f"{row['bits']} bits" + (" symmetric" if row["symmetric"] else "")
        shape = str(row["group_size"] or ""), f"{row['n']}x{row['k']}", _tokens(row)
        table.add_row(row["device"], str(row["planes"]), bits, *shape, figure(row["us"]), _plan_text(row))
    Console().print(table)


def _row(file: Path, problem: Problem, us: float, best: Plan) -> dict[str, Any]:
    tile = asdict(best.tile) if best.tile else None
    return {"device": file.stem, **asdict(problem), "us": us, "path": best.path, "tile": tile}


def _tokens(row: dict[str, Any]) -> str:
    from abq_llm.kernels.cuda.tune import EXACT_TOKENS

    return str(row["m"]) if row["m"] <= EXACT_TOKENS else f"{row['m'] // 2 + 1}..{row['m']}"


def _plan_text(row: dict[str, Any]) -> str:
    return " ".join([row["path"], *(f"{name}={value:d}" for name, value in (row["tile"] or {}).items())])


def _table(*columns: str, caption: str | None = None) -> Table:
    table = Table(caption=caption)
    for column in columns:
        if column == "plan":
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="left" if column in ("scheme", "device") else "right", no_wrap=True)
    return table
