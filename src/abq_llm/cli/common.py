"""What the subcommands share: errors in one line, JSON files, progress bars, and opening a model."""

from __future__ import annotations

import json
import math
import os
import re
import sys
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

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to FILE as JSON.")]


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
