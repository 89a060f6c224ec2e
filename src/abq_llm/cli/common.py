"""What the subcommands share: errors in one line, JSON files, progress bars, and opening a model."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

from abq_llm.errors import AbqError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from abq_llm.methods import Method

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to FILE as JSON.")]

Tasks = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME", help="Zero-shot tasks by their names in lm-evaluation-harness: piqa,arc_easy"),
]
TaskPath = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Read the tasks from local files, not from the hub.")
]


class CommandGroup(TyperGroup):
    """Turns what a user can cause into one line on stderr and exit code 2; ABQ_DEBUG=1 shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (AbqError, OSError, KeyboardInterrupt, RuntimeError) as error:
            readable = not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError"
            if not readable or os.environ.get("ABQ_DEBUG") == "1":
                raise
            print(f"abq: error: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from error


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def check_json(path: Path | None, option: str = "--json") -> None:
    """Refuse a FILE that cannot be written, before hours of work rather than after."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise AbqError(f"{option} {path}: {'is a directory' if path.is_dir() else 'its folder cannot be written to'}")


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write `values` to `path`, if any; numbers that are not finite become null, since JSON has none."""
    if path is not None:
        path.write_text(json.dumps(_finite(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress_bar(console: Console) -> Progress:
    """A bar with counts, time and a column for `task.fields["note"]`; nothing where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def counter(bar: Progress, name: str) -> Callable[[int, int], None]:
    """A new line of `bar`, as what to call with (done, total)."""
    task = bar.add_task(name, total=None, note="")
    return lambda done, total: bar.update(task, completed=done, total=total)


def read_method(label: str, epochs: int) -> Method:
    """The method that "abq:dlc=False" stands for; with `epochs`, if it trains and the label does not say."""
    from abq_llm.methods import method_by_name

    method = method_by_name(label)
    if hasattr(method, "epochs") and ":epochs=" not in label:
        method = replace(method, epochs=epochs)  # type: ignore[type-var]
    return method


def read_tasks(text: str | None, task_path: Path | None) -> list[str]:
    """ "piqa,arc_easy" -> its names, each once.

    Raises:
        AbqError: an empty name, or a `task_path` that is no folder or that nothing is read from.
    """
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if "" in names:
        raise AbqError(f"--tasks {text!r}: a name is empty")
    if task_path is not None and not (names and task_path.is_dir()):
        raise AbqError(f"--task-path {task_path}: " + ("no such folder" if names else "needs --tasks"))
    return list(dict.fromkeys(names))


def quiet_libraries() -> None:
    """Keep the bars and warnings of Transformers from the terminal; errors still raise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_model(
    name: str, *, device: torch.device, backend: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A packed checkpoint or any other model, with its tokenizer; float32 on a CPU, its own dtype elsewhere."""
    import torch

    from abq_llm import checkpoint, kernels, models

    dtype: torch.dtype | Literal["auto"] = torch.float32 if device.type == "cpu" else "auto"
    if checkpoint.is_packed(name):
        model, tokenizer = checkpoint.load(name, device=device, dtype=dtype, backend=backend)
        if tokenizer is None:
            raise AbqError(f"{name}: has no tokenizer")
        return model, tokenizer
    kernels.choose_backend(backend, device)
    return models.load_model(name, dtype=dtype, device=device)


def megabytes(size: int) -> str:
    """Bytes in decimal megabytes, as file sizes are given."""
    return f"{size / 1e6:,.1f} MB"


def figure(value: float) -> str:
    """Three significant digits, and all that are left of the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def read_shape(text: str) -> tuple[int, int] | None:
    """ "4096x11008", output x input features of a linear -> (n, k); None if that is not what it is."""
    match = re.fullmatch(r"([1-9][0-9]*)[xX×]([1-9][0-9]*)", text)
    return (int(match[1]), int(match[2])) if match else None


def commit_of_code() -> str | None:
    """The commit of this code, "-dirty" after it if there are changes; None if git does not know this file."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return None if done.returncode else done.stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
        return tracked and git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except OSError:  # no git
        return None
