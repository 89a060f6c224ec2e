"""The times of `kernel_speed` as a picture: one panel a shape, one line a kernel, dashed the time to read it."""

from __future__ import annotations

import importlib.util
import itertools
from collections import defaultdict
from pathlib import Path

from abq_llm.errors import AbqError
from abq_llm.evaluation.kernel_speed import Row

STYLES = {"abq": "o-", "torch": "s-.", "cutlass": "D-.", "humming": "^:", "gemlite": "v:"}  # marker and line


def check_matplotlib() -> None:
    """Refuse to plot before the work, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise AbqError("--plot needs matplotlib: pip install 'abq-llm[plot]'")


def draw(rows: list[Row], bandwidth: float, path: Path, *, title: str) -> None:
    """µs against tokens; of a single number of tokens, against the bits stored per weight.

    bandwidth: bytes a second, for the floor.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row.n, row.k) for row in rows))
    against_tokens = len({row.m for row in rows}) > 1
    groups = list(dict.fromkeys(_group(row, against_tokens) for row in rows))
    colours = dict(zip(groups, itertools.cycle(colormaps["tab20"].colors), strict=False))  # type: ignore[attr-defined]
    figure = Figure(figsize=(2 + 4.5 * len(shapes), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    for axes, (n, k) in zip(panels, shapes, strict=True):
        lines: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if (row.n, row.k) == (n, k):
                lines[f"{row.kernel} {_group(row, against_tokens)}"].append(row)
        for label, points in lines.items():
            points.sort(key=lambda row: (_x(row, against_tokens), row.us))
            x = [_x(row, against_tokens) for row in points]
            colour = colours[_group(points[0], against_tokens)]
            style = STYLES[points[0].kernel.split("-")[0]]
            axes.plot(x, [row.us for row in points], style, color=colour, markersize=4, label=label)
            if against_tokens and points[0].kernel.startswith("abq-"):
                floor = [row.weight_bytes / bandwidth * 1e6 for row in points]
                axes.plot(x, floor, linestyle="--", linewidth=0.8, color=colour)
        if not against_tokens:
            ends = [0.0, max(_x(row, False) for points in lines.values() for row in points)]
            axes.plot(ends, [bits / 8 * n * k / bandwidth * 1e6 for bits in ends], "k--", linewidth=0.8, label="floor")
        if against_tokens:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens" if against_tokens else f"bits stored per weight, M = {rows[0].m}")
        axes.set_ylabel("µs")
        axes.set_title(f"{n}×{k}", fontsize=10)
        axes.grid(alpha=0.3)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=7)
    figure.suptitle(f"{title}: lower is better; dashed: time to read the weight", fontsize=10)
    figure.savefig(path, format="png", dpi=130)


def _x(row: Row, against_tokens: bool) -> float:
    return row.m if against_tokens else 8 * row.weight_bytes / (row.n * row.k)


def _group(row: Row, against_tokens: bool) -> str:
    """What shares a colour: a scheme, or its activations where the weights' bits are the axis ("A8" of "W2*A8g128")."""
    return row.scheme if against_tokens else "A" + row.scheme.split("A")[1].split("g")[0].split("KV")[0]
