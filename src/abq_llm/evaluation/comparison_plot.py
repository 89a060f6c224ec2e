"""A comparison as a picture: quality against the bits that a weight takes, one line a method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from abq_llm.evaluation.comparison import UNQUANTIZED

MARKERS = "os^vDP*X<>"
DODGE = 0.02  # bits between the points of two methods at one scheme
NEAR = 0.15  # bits: schemes closer than that share a tick

Row = dict[str, Any]  # of `comparison.over_seeds`
Spread = dict[str, float]  # "mean" and "std"


def draw(rows: list[Row], path: Path, *, title: str) -> None:
    """Perplexity on each text, and the mean accuracy if there were tasks; weights only beside weights and activations.

    Points are means, a little beside each other, bars the standard deviation over the seeds, hollow points schemes with
    bit balance, the dashed line is the unquantized model.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quantized = [row for row in rows if row["method"] != UNQUANTIZED]
    kinds = {
        kind: part
        for kind, only in (("weights only", True), ("weights and activations", False))
        if (part := [row for row in quantized if ("A16" in row["scheme"]) is only])
    }
    texts = dict.fromkeys(text for row in rows for text in row["perplexity"])
    measures = [f"perplexity, {text}" for text in texts] + ["accuracy"] * any(row["accuracy"] for row in rows)
    methods = list(dict.fromkeys(row["method"] for row in quantized))
    colours = dict(zip(methods, colormaps["tab10"].colors * len(methods), strict=False))  # type: ignore[attr-defined]
    markers = dict(zip(methods, MARKERS * len(methods), strict=False))

    figure = Figure(figsize=(1.8 + 4.6 * len(kinds), 0.6 + 3.4 * len(measures)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(measures), max(1, len(kinds)), squeeze=False)
    for line, measure in zip(panels, measures, strict=True):
        for axes, (kind, part) in zip(line, kinds.items(), strict=False):
            shown = [row for row in part if _of(row, measure)]
            if not shown:
                axes.set_axis_off()
                continue
            for place, method in enumerate(methods):
                for balanced in (True, False):  # W2* takes the bits of W3 and is no step on the way to it
                    rows_of = [r for r in shown if r["method"] == method and ("*" in r["scheme"]) is balanced]
                    hollow = {"markerfacecolor": "none", "linestyle": "none"} if balanced else {}
                    style = {"color": colours[method], "marker": markers[method], "label": method, **hollow}
                    _draw_line(axes, rows_of, measure, DODGE * (place - (len(methods) - 1) / 2), style)
            for row in rows:
                if row["method"] == UNQUANTIZED and (spread := _of(row, measure)):
                    axes.axhline(spread["mean"], color="k", linestyle="--", linewidth=0.8, label="unquantized")
            if measure != "accuracy":
                _log_scale(axes)
            _name_schemes(axes, part)
            axes.set_ylabel(measure)
            axes.set_title(kind, fontsize=10)
            axes.grid(alpha=0.3)
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format="png", dpi=130)


def _draw_line(axes: Any, rows: list[Row], measure: str, aside: float, style: dict[str, Any]) -> None:
    """The rows of one method from few bits to many, moved `aside`, with a bar for the spread of each."""
    rows = sorted(rows, key=lambda row: row["bits_per_weight"]["mean"])
    spreads = [spread for row in rows if (spread := _of(row, measure))]
    axes.errorbar(
        [row["bits_per_weight"]["mean"] + aside for row in rows],
        [spread["mean"] for spread in spreads],
        [spread["std"] or 0 for spread in spreads],
        markersize=5,
        linewidth=1,
        capsize=2,
        **style,
    )


def _of(row: Row, measure: str) -> Spread | None:
    """What `row` has on an axis of that name."""
    found: Spread | None = row["accuracy"] if measure == "accuracy" else row["perplexity"][measure.split(", ", 1)[1]]
    return found


def _log_scale(axes: Any) -> None:
    """A logarithmic axis with plain numbers, as many as fit."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    ticks = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=ticks))
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _name_schemes(axes: Any, rows: list[Row]) -> None:
    """Ticks at the bits of the schemes, with their names; W2* and W3 take the same, and share one."""
    bits = {row["scheme"]: row["bits_per_weight"]["mean"] for row in rows}
    ticks: list[list[str]] = []
    for scheme in sorted(bits, key=lambda scheme: bits[scheme]):
        if ticks and bits[scheme] - bits[ticks[-1][0]] < NEAR:
            ticks[-1].append(scheme)
        else:
            ticks.append([scheme])
    labels = ["\n".join([f"{bits[names[0]]:.2f}", *names]) for names in ticks]
    axes.set_xticks([bits[names[0]] for names in ticks], labels, fontsize=7)
    axes.set_xlabel("bits stored per weight")
