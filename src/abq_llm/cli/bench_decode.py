"""`abq bench decode`: how fast whole models write."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from abq_llm.cli.bench import _versions, bench
from abq_llm.cli.common import (
    JsonFile,
    check_json,
    commit_of_code,
    figure,
    megabytes,
    open_model,
    progress_bar,
    quiet_libraries,
    write_json,
)
from abq_llm.errors import AbqError


@bench.command("decode")
def bench_decode(
    model: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Packed directories, or any other models.")],
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="cpu|transformers", help="Repeatable; default: each one that can run the model."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Written and timed.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Random tokens that are read before.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    commit: Annotated[
        str | None, typer.Option(help="Recorded as that of the code, where there is no git history.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time decoding, one sequence, token by token."""
    check_json(json_file)
    from abq_llm.devices import device_name, pick_device
    from abq_llm.evaluation import decode_speed, kernel_speed

    wanted = list(dict.fromkeys(engine or decode_speed.ENGINES))
    for name in wanted:
        if name not in decode_speed.ENGINES:
            raise AbqError(f"--engine {name}: is not one of {', '.join(decode_speed.ENGINES)}")
    place = pick_device(device)
    quiet_libraries()
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    bandwidth = kernel_speed.read_bandwidth(place)
    rows: list[decode_speed.Row] = []
    with progress_bar(errors) as bar:
        task = bar.add_task("decode", total=len(model) * len(wanted) * tokens, note="")
        for source in model:
            loaded, _ = open_model(source, device=place)
            for name in wanted:
                bar.update(task, note=f"{source} {name}")
                if reason := decode_speed.cannot(loaded, name, prompt + tokens):
                    bar.console.print(f"{source}: engine {name} cannot run it: {reason}", markup=False)
                    bar.update(task, advance=tokens)
                    continue
                row = decode_speed.measure(
                    loaded,
                    name,
                    name=source,
                    prompt=prompt,
                    tokens=tokens,
                    bandwidth=bandwidth,
                    progress=lambda: bar.update(task, advance=1),
                )
                rows.append(row)
    if not rows:
        raise AbqError("nothing could be measured: no engine can run the models")
    values = {
        "device": device_name(place),
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "versions": _versions(),
        "commit": commit or commit_of_code(),
        "rows": [asdict(row) for row in rows],
    }
    write_json(json_file, values)
    caption = f"{device_name(place)}, reads {bandwidth / 1e9:,.0f} GB/s; {prompt} tokens read, {tokens} written"
    table = Table(caption=caption)
    for column in (
        "model",
        "scheme",
        "head",
        "engine",
        "tokens/s",
        "ms a token",
        "of the floor",
        "prefill tokens/s",
        "memory",
    ):
        table.add_column(column, justify="left" if column in ("model", "scheme", "engine") else "right")
    for row in rows:
        memory = "" if row.peak_memory_bytes is None else megabytes(row.peak_memory_bytes)
        speeds = (figure(row.tokens_per_s), figure(row.ms_per_token), f"{row.fraction_of_floor:.0%}")
        table.add_row(
            row.model, row.scheme, str(row.head_bits), row.engine, *speeds, figure(row.prefill_tokens_per_s), memory
        )
    Console().print(table)
