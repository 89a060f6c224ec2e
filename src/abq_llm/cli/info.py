"""`abq info`: what a packed checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from abq_llm.cli.common import JsonFile, check_json, megabytes, quiet_libraries, write_json


def info(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Packed directory.")], json_file: JsonFile = None
) -> None:
    """Check the checkpoint DIR and describe it; no tensor is read."""
    check_json(json_file)
    from abq_llm import checkpoint

    quiet_libraries()
    config = checkpoint.read_config(directory)
    size = checkpoint.packed_size(directory)
    values = {
        "scheme": str(config.scheme),
        "weight_symmetric": config.scheme.weight_symmetric,
        "activation_symmetric": config.scheme.activation_symmetric,
        "levels": config.scheme.levels,
        "planes": config.scheme.planes,
        "bits_per_weight": size.bits_per_weight,
        "size_bytes": size.size_bytes,
        "linears": size.linears,
        "modules_to_not_convert": list(config.modules_to_not_convert),
        "provenance": config.provenance,
    }
    table = Table(title=str(directory), show_header=False)
    rows = {**values, "bits_per_weight": f"{size.bits_per_weight:.3f}", "size_bytes": megabytes(size.size_bytes)}
    rows["modules_to_not_convert"] = ", ".join(config.modules_to_not_convert)
    for key, value in {**rows, **config.provenance}.items():
        if key != "provenance":
            table.add_row(key.removesuffix("_bytes").replace("_", " "), str(value))
    Console().print(table)
    write_json(json_file, values)
