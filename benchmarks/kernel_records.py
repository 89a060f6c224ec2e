"""The rows of several records of `abq bench kernels` together, and the options that select among them."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from abq_llm.evaluation.kernel_speed import Row


@dataclass(frozen=True)
class Records:
    device: str
    bandwidth: float  # bytes a second, the highest that was measured
    rows: list[Row]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of `read`: RECORD..., --kernel, --scheme, --shape, --tokens."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("records", type=Path, nargs="+", help="a row of a later one replaces that of an earlier one")
    for flag, name, kind in (("-k", "kernel", str), ("-s", "scheme", str), ("-n", "shape", str), ("-m", "tokens", int)):
        options.add_argument(flag, f"--{name}", action="append", type=kind, help="only this one; repeatable")
    return options


def read(options: argparse.Namespace) -> Records:
    """What `parser` was told to. All records must be of one device."""
    records = [json.loads(path.read_text()) for path in options.records]
    (device,) = {record["device"] for record in records}
    rows = {}
    for record in records:
        for values in record["rows"]:
            row = Row(**(values | {"us_range": tuple(values["us_range"])}))
            rows[row.kernel, row.scheme, row.m, row.n, row.k] = row
    wanted = [
        row
        for row in rows.values()
        if _among(row.kernel, options.kernel)
        and _among(row.scheme, options.scheme)
        and _among(f"{row.n}x{row.k}", options.shape)
        and _among(row.m, options.tokens)
    ]
    return Records(device, max(record["bandwidth_gb_per_s"] for record in records) * 1e9, wanted)


def _among(value: str | int, wanted: list[str | int] | None) -> bool:
    return wanted is None or value in wanted
