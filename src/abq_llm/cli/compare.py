"""`abq compare`: methods and schemes on one model, in one table, one file and one picture."""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
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
    read_tasks,
    write_json,
)
from abq_llm.cli.eval import read_texts
from abq_llm.errors import AbqError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from abq_llm.evaluation.comparison import Cell, Record, Setup
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
        str, typer.Option(metavar="N,N", help="Methods that train run with each, the others with the first.")
    ] = "0",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    backend: Annotated[str, typer.Option(help="Kernels of the packed models: auto, reference, ...")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Results computed at the same time.")] = 1,
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
    from abq_llm.devices import pick_device
    from abq_llm.evaluation import comparison, comparison_plot, kernel_plot
    from abq_llm.integrations import lm_eval
    from abq_llm.quantize import check_model
    from abq_llm.scheme import Scheme

    if plot:
        kernel_plot.check_matplotlib()
    schemes = list(dict.fromkeys(Scheme.parse(text) for text in scheme))
    chosen: dict[str, Method] = {}
    for label in methods.split(","):
        if (method := _method(label, epochs)) not in chosen.values():
            chosen[label] = method
    place = pick_device(device)
    actual_backend = kernels.choose_backend(backend, place)
    if names:
        lm_eval.load_tasks(names, task_path)  # a task that cannot be read is refused now
    quiet_libraries()
    network, tokenizer = comparison.open_base(model)
    for parsed in schemes:
        check_model(network, parsed)
    sources = ppl or ["wikitext2"]
    if "self" in (calib, *sources):
        network.to(place)  # type: ignore[arg-type]  # it writes the text: where that is fast
    texts = read_texts(sources, tokenizer, network, limit)
    draw = functools.cache(
        lambda seed: calibration_tokens(calib, tokenizer, samples=samples, seqlen=seqlen, seed=seed, model=network)
    )
    cells = [comparison.Cell("W16A16", comparison.UNQUANTIZED)]
    for parsed in schemes:
        for label, method in chosen.items():
            for seed in seed_list if hasattr(method, "epochs") else seed_list[:1]:
                tokens = draw(seed) if method.needs_data else None
                cells.append(comparison.Cell(str(parsed), label, method, seed, tokens))
    network.to("cpu")  # type: ignore[arg-type]
    setup = comparison.Setup(
        model=model,
        model_sha256=comparison.hash_model(network),
        device=place,
        backend=actual_backend,
        texts=tuple(texts),
        batch_size=batch_size,
        tasks=_Tasks(tuple(names), task_path, limit) if names else None,
        commit=commit or commit_of_code(),
    )
    output.mkdir(parents=True, exist_ok=True)
    failures = _compute(cells, setup, output, jobs)
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


def _method(label: str, epochs: int) -> Method:
    """The method that "abq:dlc=False" stands for; with `epochs`, if it trains and the label does not say."""
    from abq_llm.methods import method_by_name

    name, *options = label.split(":")
    values = {}
    for option in options:
        key, _, text = option.partition("=")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise AbqError(f"--methods {label!r}: {option!r} is not OPTION=VALUE, for example epochs=5") from None
    method = method_by_name(name, **values)
    if hasattr(method, "epochs") and "epochs" not in values:
        method = replace(method, epochs=epochs)  # type: ignore[type-var]
    return method


@dataclass(frozen=True)
class _Tasks:
    """The harness's tasks as `comparison.Setup` wants them."""

    names: tuple[str, ...]
    path: Path | None
    limit: int | None

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        from abq_llm.integrations.lm_eval import evaluate_tasks

        scores = evaluate_tasks(model, tokenizer, self.names, task_path=self.path, limit=self.limit)
        return {name: asdict(score) for name, score in scores.items()}

    def inputs(self) -> dict[str, Any]:
        from abq_llm.evaluation import local_tasks

        files = [file for name in self.names for file in (local_tasks.files(name, self.path) if self.path else [])]
        digests = {file.name: _sha256(file) for file in files}
        return {"names": self.names, "files": digests, "limit": self.limit, "lm_eval": version("lm_eval")}


@functools.cache  # each cell asks
def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- computing it ---


def _compute(cells: list[Cell], setup: Setup, directory: Path, jobs: int) -> list[dict[str, Any]]:
    """Compute the cells that have no record in `directory` yet; what went wrong with those that failed."""
    from abq_llm.evaluation.comparison import file_of, read

    failures = []
    missing = [cell for cell in cells if read(file_of(directory, cell, setup)) is None]
    errors = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    with progress_bar(errors) as bar:
        task = bar.add_task("compare", total=len(cells), completed=len(cells) - len(missing), note="")
        try:
            for cell, error in _results(missing, setup, directory, jobs, lambda note: bar.update(task, note=note)):
                if error:
                    failures.append({"scheme": cell.scheme, "method": cell.label, "seed": cell.seed, "error": error})
                bar.console.print(
                    f"{_name(cell)}: {error or _perplexities(read(file_of(directory, cell, setup)))}", markup=False
                )
                bar.update(task, advance=1)
        except KeyboardInterrupt as stop:
            raise AbqError(f"interrupted; finished results are in {directory}, the same command goes on") from stop
    return failures


def _results(
    cells: list[Cell], setup: Setup, directory: Path, jobs: int, note: Callable[[str], None]
) -> Iterator[tuple[Cell, str | None]]:
    """Each of `cells` and its error, as they come."""
    from abq_llm.evaluation.comparison import compute

    if jobs == 1:
        for cell in cells:

            def say(text: str, cell: Cell = cell) -> None:
                note(f"{_name(cell)}: {text}")

            yield cell, compute(cell, setup, directory, say)
        return
    spawn = multiprocessing.get_context("spawn")  # a process that uses CUDA must not be forked
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, spawn, _start_worker, (threads,)) as pool:
        futures = {pool.submit(compute, cell, setup, directory): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenExecutor as error:
            raise AbqError(
                f"a process has died, of memory perhaps: finished results are in {directory}, try --jobs {jobs // 2}"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: its result is not needed any more
    torch.set_num_threads(threads)
    quiet_libraries()


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
