"""`abq compare`: methods and schemes on one model, in one table, one file and one picture."""

from __future__ import annotations

import csv
import functools
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from abq_llm.cli.common import (
    JsonFile,
    TaskPath,
    Tasks,
    check_json,
    commit_of_code,
    figure,
    megabytes,
    progress_bar,
    quiet_libraries,
    read_method,
    read_tasks,
    write_json,
)
from abq_llm.cli.eval import read_texts
from abq_llm.errors import AbqError

if TYPE_CHECKING:
    import torch

    from abq_llm.evaluation.comparison import Cell, Record
    from abq_llm.evaluation.comparison_jobs import Job
    from abq_llm.methods import Method


def compare(
    model: Annotated[str, typer.Argument(help="Hub id, local directory, or .gguf file.")],
    scheme: Annotated[list[str], typer.Option("--scheme", "-s", help="Repeatable.")],
    methods: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Options follow after colons: rtn,abq,abq:dlc=False:epochs=5")
    ] = "rtn,abq",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Keeps each result: it is not computed again.")
    ] = Path("abq-compare"),
    ppl: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="wikitext2 (the default), c4, c4-legacy, self, or a file; repeatable."),
    ] = None,
    tasks: Tasks = None,
    task_path: TaskPath = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Windows of each text, examples of each task.")] = None,
    calib: Annotated[str, typer.Option(metavar="NAME", help="wikitext2, c4, self, or a file.")] = "wikitext2",
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens in each of them.")] = 2048,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them, for methods that train.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a training step.")] = 1,
    seeds: Annotated[
        str, typer.Option(metavar="N,N", help="Methods that look at data run with each, the others with the first.")
    ] = "0",
    device: Annotated[
        str,
        typer.Option(metavar="NAME,NAME", help="cpu, or GPUs to spread the results over: cuda:0,cuda:1; auto: all."),
    ] = "auto",
    backend: Annotated[str, typer.Option(help="Kernels of the packed models: auto, reference, ...")] = "auto",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Results computed at the same time, on all devices together: one on each.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Recorded as that of the code, where there is no git history.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="One line a result.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw quality against bits per weight to FILE, a PNG.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Quantize MODEL with every method to every scheme, and evaluate the packed results on the same tokens.

    A result that fails is one line and does not stop the others. After Ctrl-C, the same command goes on.
    """
    for path, option in ((json_file, "--json"), (csv_file, "--csv"), (plot, "--plot")):
        check_json(path, option)
    names, seed_list = read_tasks(tasks, task_path), _seeds(seeds)
    from abq_llm import kernels
    from abq_llm.data import calibration_tokens
    from abq_llm.devices import pick_devices
    from abq_llm.evaluation import comparison, comparison_plot, kernel_plot
    from abq_llm.evaluation.comparison_jobs import longest_first
    from abq_llm.integrations import lm_eval
    from abq_llm.quantize import check_model
    from abq_llm.scheme import Scheme

    if plot:
        kernel_plot.check_matplotlib()
    schemes = list(dict.fromkeys(Scheme.parse(text) for text in scheme))
    chosen: dict[str, Method] = {}
    for label in methods.split(","):
        if (method := read_method(label, epochs)) not in chosen.values():
            chosen[label] = method
    devices = pick_devices(device)
    actual_backend = kernels.choose_backend(backend, devices[0])
    if names:
        lm_eval.load_tasks(names, task_path)  # a task that cannot be read is refused now
    quiet_libraries()
    network, tokenizer = comparison.open_base(model)
    for parsed in schemes:
        check_model(network, parsed)
    sources = ppl or ["wikitext2"]
    if "self" in (calib, *sources):
        network.to(devices[0])  # type: ignore[arg-type]  # it writes the text: where that is fast
    texts = read_texts(sources, tokenizer, network, limit)
    draw = functools.cache(
        lambda seed: calibration_tokens(calib, tokenizer, samples=samples, seqlen=seqlen, seed=seed, model=network)
    )
    cells = comparison.cells(schemes, chosen, seed_list, draw)
    network.to("cpu")  # type: ignore[arg-type]
    setup = comparison.Setup(
        model=model,
        model_sha256=comparison.hash_model(network),
        device=devices[0],
        backend=actual_backend,
        texts=tuple(texts),
        batch_size=batch_size,
        tasks=lm_eval.HarnessTasks(tuple(names), task_path, limit) if names else None,
        commit=commit or commit_of_code(),
    )
    failures = compute_missing(longest_first([(cell, setup) for cell in cells]), output, devices, jobs or len(devices))
    records = []
    for cell in cells:
        if record := comparison.read(comparison.file_of(output, cell, setup)):
            records.append({**record, "method": cell.label})  # which another run may have put in other words
    if not records:
        raise AbqError(f"nothing could be computed: {failures[0]['error']}")
    rows = comparison.over_seeds(records)
    name = Path(model).name if Path(model).exists() else model
    write_json(json_file, {"model": name, "rows": records, "over_seeds": rows, "failures": failures})
    if csv_file:
        _write_csv(csv_file, records)
    if plot:
        comparison_plot.draw(rows, plot, title=f"{name}, calibrated on {Path(calib).name}")
    _print_tables(rows, failures, name)


# --- what to compute ---


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise AbqError(f"--seeds {text!r}: is not a list of integers, for example 0,1,2") from None


# --- computing it ---


def compute_missing(
    jobs: list[Job], directory: Path, devices: list[torch.device], processes: int
) -> list[dict[str, Any]]:
    """Compute the cells that have no record in `directory` yet; what went wrong with those that failed."""
    from abq_llm.evaluation.comparison import file_of, read

    directory.mkdir(parents=True, exist_ok=True)
    failures = []
    missing = [(cell, setup) for cell, setup in jobs if read(file_of(directory, cell, setup)) is None]
    errors = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    with progress_bar(errors) as bar:
        task = bar.add_task("compare", total=len(jobs), completed=len(jobs) - len(missing), note="")
        results = _results(missing, directory, devices, processes, lambda note: bar.update(task, note=note))
        try:
            for (cell, setup), error in results:
                if error:
                    failures.append({"scheme": cell.scheme, "method": cell.label, "seed": cell.seed, "error": error})
                bar.console.print(
                    f"{_name(cell)}: {error or _perplexities(read(file_of(directory, cell, setup)))}", markup=False
                )
                bar.update(task, advance=1)
        except KeyboardInterrupt as stop:
            raise AbqError(f"interrupted; finished results are in {directory}, the same command goes on") from stop
        finally:
            results.close()
    return failures


def _results(
    jobs: list[Job], directory: Path, devices: list[torch.device], processes: int, note: Callable[[str], None]
) -> Generator[tuple[Job, str | None]]:
    """Each of `jobs` and its error, as they come: in this process, if one is enough."""
    from abq_llm.evaluation import comparison, comparison_jobs

    if processes > 1:
        yield from comparison_jobs.compute_all(jobs, directory, devices, processes, quiet_libraries)
        return
    for cell, setup in jobs:

        def say(text: str, cell: Cell = cell) -> None:
            note(f"{_name(cell)}: {text}")

        yield (cell, setup), comparison.compute(cell, setup, directory, say)


def _name(cell: Cell) -> str:
    return f"{cell.scheme} {cell.label}" + (f" seed {cell.seed}" if cell.method else "")


# --- showing it ---


def _perplexities(record: Record | None) -> str:
    texts = record["perplexity"] if record else {}
    return ", ".join(f"{text} {'infinite' if value is None else figure(value)}" for text, value in texts.items())


def _print_tables(rows: list[Record], failures: list[dict[str, Any]], title: str) -> None:
    """A table for each text, and one of what it cost."""
    console = Console()
    for text in rows[0]["perplexity"]:
        table = _table(f"{title} on {text}", "bits per weight", "perplexity", "KL", "top-1")
        for row in _sections(rows, table):
            bits = f"{row['bits_per_weight']['mean']:.2f}"
            figures = [_spread(row[key][text]) for key in ("perplexity", "kl", "top1_agreement")]
            table.add_row(row["scheme"], row["method"], bits, *figures)
        console.print(table)
    scored = ["mean accuracy"] if any(row["accuracy"] for row in rows) else []
    table = _table(None, *scored, "seconds", "peak memory", caption="± standard deviation over the seeds")
    for row in _sections(rows, table):
        seconds, peak = row["seconds"], row["peak_memory_bytes"]
        cost = figure(seconds["mean"]) if seconds else "", megabytes(peak["mean"]) if peak else ""
        table.add_row(row["scheme"], row["method"], *(_spread(row["accuracy"]) for _ in scored), *cost)
    for failure in failures:
        table.add_row(failure["scheme"], failure["method"], f"failed, seed {failure['seed']}")
    console.print(table)


def _table(title: str | None, *columns: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for column in ("scheme", "method"):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _sections(rows: list[Record], table: Table) -> Iterator[Record]:
    """`rows`, with a line in `table` before each scheme."""
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if row["scheme"] != before["scheme"]:
            table.add_section()
        yield row


def _spread(value: dict[str, float] | None) -> str:
    """ "20.71 ± 0.12"; nothing for what could not be measured."""
    if value is None:
        return ""
    mean = f"{value['mean']:,.0f}" if value["mean"] >= 1000 else f"{value['mean']:#.4g}"
    return mean + ("" if value["std"] is None else f" ± {value['std']:.2g}")


def _write_csv(path: Path, records: list[Record]) -> None:
    """One line a record; a column for each figure on each text and task."""
    plain = ("scheme", "method", "seed", "bits_per_weight", "size_bytes", "seconds", "peak_memory_bytes")
    lines = []
    for record in records:
        line = {key: record[key] for key in plain}
        for key in ("perplexity", "kl", "top1_agreement"):
            line |= {f"{key} {text}": value for text, value in record[key].items()}
        line |= {f"{key} {task}": value for task, scores in record["tasks"].items() for key, value in scores.items()}
        lines.append(line)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
