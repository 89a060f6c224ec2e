"""`abq bench`: how fast the kernels are on this machine."""

from __future__ import annotations

import platform
from concurrent.futures import BrokenExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from abq_llm.cli.common import (
    JsonFile,
    check_json,
    commit_of_code,
    counter,
    figure,
    progress_bar,
    read_shape,
    write_json,
)
from abq_llm.errors import AbqError

if TYPE_CHECKING:
    import torch

    from abq_llm.evaluation.kernel_speed import Row
    from abq_llm.evaluation.kernels_compared import Kernel
    from abq_llm.scheme import Scheme

SCHEMES = ("W2A8", "W2*A8", "W3A8", "W4A8", "W8A8", "W4A4", "W6A6", "W2A2", "W2A16", "W4A16g128")
TOKENS = (1, 2, 4, 8, 16, 64, 512, 2048)
RIVALS = ("torch", "cutlass", "humming", "gemlite")
LLAMA = {"7b": (4096, 11008), "13b": (5120, 13824), "30b": (6656, 17920)}  # hidden and intermediate size

bench = typer.Typer(help="Measure how fast the kernels are on this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """So that `abq bench` stays a group of commands, even of one."""


@bench.command("kernels")
def bench_kernels(
    scheme: Annotated[
        list[str] | None, typer.Option("--scheme", "-s", help=f"Repeatable; default: {' '.join(SCHEMES)}.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NxK", help="Output x input features of a linear; repeatable.")
    ] = None,
    model_shapes: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(LLAMA), help="The linears of LLaMA of this size; repeatable (default: 7b)."),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", "-m", min=1, help=f"Repeatable; default: {' '.join(map(str, TOKENS))}."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    backend: Annotated[str, typer.Option(help="Our kernels: auto, reference, ...")] = "auto",
    rival: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(RIVALS), help="Whose kernels to time, too; repeatable (default: all there are)."),
    ] = None,
    rivals: Annotated[bool, typer.Option(help="Time others' kernels at all.")] = True,
    cutlass: Annotated[
        Path | None, typer.Option(metavar="LIBRARY", help="That benchmarks/cutlass/build.sh has made.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare ours with the reference backend, up to 64 tokens.")] = True,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that first run everything once, to compile (default: compile as needed)."),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Recorded as that of the code, where there is no git history.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the times to FILE, a PNG.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time linear layers of any scheme on cold weights, activation quantization included."""
    check_json(json_file)
    check_json(plot, "--plot")
    from abq_llm import kernels
    from abq_llm.devices import device_name, pick_device
    from abq_llm.evaluation import kernel_plot, kernel_speed
    from abq_llm.scheme import Scheme

    if plot:
        kernel_plot.check_matplotlib()
    place = pick_device(device)
    name = kernels.choose_backend(backend, place)
    schemes = [Scheme.parse(text) for text in dict.fromkeys(scheme or SCHEMES)]
    sizes = _shapes(shape or [], model_shapes or [])
    counts = list(dict.fromkeys(tokens or TOKENS))
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    candidates = _candidates(name, schemes, place, _rivals(rival, rivals, place), cutlass, errors)

    bandwidth = kernel_speed.read_bandwidth(place)
    rows: list[Row] = []
    failures: list[kernel_speed.Failure] = []
    with progress_bar(errors) as bar:
        if jobs:
            _compile(candidates, sizes, counts, place, jobs, check, bar)
        task = bar.add_task("kernels", total=len(candidates) * len(sizes) * len(counts), note="")
        for result in kernel_speed.measure(candidates, sizes, counts, place, bandwidth=bandwidth, check=check):
            if isinstance(result, kernel_speed.Failure):
                failures.append(result)
                bar.console.print(f"failed: {result}", markup=False)
            else:
                rows.append(result)
            whole = isinstance(result, kernel_speed.Failure) and result.m is None
            note = f"{result.kernel} {result.scheme} {result.n}x{result.k}"
            bar.update(task, advance=len(counts) if whole else 1, note=note)
    if not rows:
        raise AbqError(f"nothing could be measured: {failures[0]}")

    values = {
        "device": device_name(place),
        "backend": name,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "versions": _versions(cutlass),
        "commit": commit or commit_of_code(),
        "rows": [asdict(row) for row in rows],
        "failures": [asdict(failure) for failure in failures],
    }
    write_json(json_file, values)
    caption = f"{device_name(place)}, reads {bandwidth / 1e9:,.0f} GB/s; us: the median"
    Console().print(_table(rows, caption))
    if plot:
        kernel_plot.draw(rows, bandwidth, plot, title=device_name(place))


def _rivals(names: list[str] | None, any_at_all: bool, place: torch.device) -> list[str]:
    for name in names or []:
        if name not in RIVALS:
            raise AbqError(f"--rival {name}: is not one of {', '.join(RIVALS)}")
    there = RIVALS if place.type == "cuda" else RIVALS[:1]
    return [name for name in names or there if name in there] if any_at_all else []


def _candidates(
    backend: str, schemes: list[Scheme], place: torch.device, names: list[str], library: Path | None, errors: Console
) -> list[Kernel]:
    """Ours and those of the rivals `names`, torch's fp16 first. A line of `errors` for each rival that is not there."""
    import torch

    from abq_llm.evaluation import kernels_compared, rivals

    torchs = []
    if "torch" in names:
        dtypes = (torch.float32, torch.bfloat16) if place.type == "cpu" else ()
        torchs = [kernels_compared.torch_fp16(), *map(kernels_compared.torch_on_cpu, dtypes)]
        torchs.append(kernels_compared.torch_int8())
    others, missing = rivals.find(names, schemes, library)
    for line in missing:
        errors.print(line)
    return [*torchs, *(kernels_compared.ours(backend, scheme) for scheme in schemes), *others]


def _compile(
    candidates: list[Kernel],
    shapes: list[tuple[int, int]],
    tokens: list[int],
    place: torch.device,
    processes: int,
    check: bool,
    bar: Progress,
) -> None:
    from abq_llm.evaluation.compile_ahead import compile_ahead

    try:
        progress = counter(bar, "compile")
        compile_ahead(candidates, shapes, tokens, place, processes, check=check, progress=progress)
    except BrokenExecutor:
        bar.console.print("a process that compiled has died; what is missing is compiled as needed")


def _shapes(texts: list[str], models: list[str]) -> list[tuple[int, int]]:
    """ "NxK" texts and the linears of models -> (n, k), each once."""
    shapes = []
    for text in texts:
        pair = read_shape(text)
        if pair is None:
            raise AbqError(f"--shape {text}: is not NxK, for example 4096x11008")
        shapes.append(pair)
    for model in models if models or texts else ["7b"]:
        if model not in LLAMA:
            raise AbqError(f"--model-shapes {model}: is not one of {', '.join(LLAMA)}")
        hidden, intermediate = LLAMA[model]
        shapes += [(hidden, hidden), (intermediate, hidden), (hidden, intermediate)]
    return list(dict.fromkeys(shapes))


def _table(rows: list[Row], caption: str) -> Table:
    table = Table(caption=caption)
    for column in ("N x K", "M", "kernel", "scheme", "us", "GB/s", "of the floor", "TOPS", "x fp16", "exact"):
        table.add_column(column, justify="left" if column in ("kernel", "scheme") else "right", no_wrap=True)
    shapes = list(dict.fromkeys((row.n, row.k) for row in rows))
    rows = sorted(rows, key=lambda row: (shapes.index((row.n, row.k)), row.m))
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if (before.n, before.k, before.m) != (row.n, row.k, row.m):
            table.add_section()
        exact = "" if row.max_relative_error is None else f"{row.max_relative_error:.0e}"
        if row.bit_exact is not None:
            exact = "yes" if row.bit_exact else f"NO {exact}"
        table.add_row(
            f"{row.n}x{row.k}",
            str(row.m),
            row.kernel,
            row.scheme,
            figure(row.us),
            figure(row.gb_per_s),
            f"{row.fraction_of_bandwidth_floor:.0%}" + ("" if row.cold else " (hot)"),
            figure(row.tops),
            "" if row.ratio_to_fp16 is None else f"{row.ratio_to_fp16:.2f}",
            exact,
        )
    return table


def _versions(cutlass_library: Path | None = None) -> dict[str, str]:
    import torch

    import abq_llm
    from abq_llm.evaluation import cutlass

    versions = {"abq_llm": abq_llm.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if cutlass_library:
        versions["cutlass"] = cutlass.version(cutlass_library)
    for package in ("cuda-core", "humming-kernels", "gemlite", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
