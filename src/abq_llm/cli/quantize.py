"""`abq quantize`: calibrate, pack and save."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from abq_llm.cli.common import (
    JsonFile,
    check_json,
    megabytes,
    progress_bar,
    quiet_libraries,
    read_method,
    write_json,
)
from abq_llm.errors import AbqError


def quantize(
    model: Annotated[str, typer.Argument(help="Hub id, local directory, or .gguf file.")],
    scheme: Annotated[str, typer.Option("-s", "--scheme", help=r"W<p>[*]A<q>[KV<r>]\[g<size>], for example W4A8g128.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="New directory for the checkpoint.")],
    method: Annotated[
        str,
        typer.Option(
            help="abq, affinequant, awq, gptq, i_llm, omniquant, rtn, smoothquant; options after colons: abq:akl=False"
        ),
    ] = "abq",
    calib: Annotated[
        str, typer.Option(metavar="NAME", help="wikitext2, c4, self (text that the model writes), or a file.")
    ] = "wikitext2",
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens in each of them.")] = 2048,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them, per block.")] = 20,
    head_bits: Annotated[
        int, typer.Option(metavar="1..8|16", help="Of the output head, rounded to nearest; 16 leaves it.")
    ] = 16,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda, cuda:1 ...")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from DIR.partial, which a stopped run left.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Quantize MODEL and write a packed checkpoint. A run that is stopped can go on with --resume."""
    work_dir = output.with_name(output.name + ".partial")
    if output.exists():
        raise AbqError(f"{output}: already exists")
    if work_dir.exists() and not resume:
        raise AbqError(f"{work_dir}: a stopped run left this; pass --resume to go on, or delete it to start anew")
    check_json(json_file)

    from abq_llm import checkpoint
    from abq_llm.data import calibration_tokens
    from abq_llm.devices import pick_device
    from abq_llm.locks import locked
    from abq_llm.models import load_model
    from abq_llm.quantize import check_model
    from abq_llm.quantize import quantize as run
    from abq_llm.scheme import Scheme

    parsed, chosen, place = Scheme.parse(scheme), read_method(method, epochs), pick_device(device)
    quiet_libraries()
    network, tokenizer = load_model(model)
    check_model(network, parsed)
    calibration = None
    if chosen.needs_data:
        if calib == "self":
            network.to(place)  # type: ignore[arg-type]  # it writes the text: where that is fast
        calibration = calibration_tokens(calib, tokenizer, samples=samples, seqlen=seqlen, seed=seed, model=network)
        network.to("cpu")  # type: ignore[arg-type]

    console = Console(stderr=True)
    with progress_bar(console) as bar:
        task = bar.add_task(f"{parsed} {method}", total=None, note="")

        def progress(block: int, blocks: int, loss: float | None, message: str) -> None:
            done = message == "done"
            if "not finite" in message or "shown all tokens" in message:
                console.print(message)
            note = message if loss is None else f"{message}, loss {loss:.3g}"
            bar.update(task, total=blocks, completed=block + done, note="" if done else note)
            if done:
                console.print(f"block {block + 1}/{blocks}" + ("" if loss is None else f"  loss {loss:.4g}"))

        with locked(work_dir):
            try:
                report = run(
                    network,
                    parsed,
                    chosen,
                    calibration,
                    device=place,
                    seed=seed,
                    head_bits=head_bits,
                    work_dir=work_dir,
                    progress=progress,
                )
            except KeyboardInterrupt as stop:
                raise AbqError(f"interrupted; {work_dir} has the finished blocks, pass --resume to go on") from stop
            checkpoint.save(network, output, tokenizer=tokenizer, provenance={"model": model, **report.provenance})
            shutil.rmtree(work_dir, ignore_errors=True)

    size = checkpoint.packed_size(output).size_bytes
    table = Table(title=str(output))
    for column in ("scheme", "method", "bits per weight", "size", "seconds", "peak memory"):
        table.add_column(column, justify="right")
    bits, seconds, peak = report.bits_per_weight, report.seconds, report.peak_memory_bytes
    table.add_row(report.scheme, report.method, f"{bits:.3f}", megabytes(size), f"{seconds:.1f}", megabytes(peak))
    Console().print(table)
    values = {
        "scheme": report.scheme,
        "method": report.method,
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "size_bytes": size,
        "bits_per_weight": report.bits_per_weight,
        "block_losses": report.block_losses,
    }
    write_json(json_file, values)
