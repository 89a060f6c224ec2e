"""`abq eval`: perplexity, and divergence from a reference model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from abq_llm.cli.common import (
    JsonFile,
    check_json,
    open_model,
    progress_bar,
    quiet_libraries,
    write_json,
)
from abq_llm.errors import AbqError

SEQLEN = 2048  # what papers report on; less where the model takes less


def evaluate(
    model: Annotated[str, typer.Argument(help="Packed directory, hub id, local directory, or .gguf file.")],
    ppl: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="wikitext2 (the default), c4, self, or a file; repeatable.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also report KL and top-1 agreement with this model.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Windows of each text.")] = None,
    backend: Annotated[str, typer.Option(help="Kernels of a packed model: auto, reference, ...")] = "auto",
    integer_only: Annotated[
        bool, typer.Option("--integer-only", help="Run the blocks of a packed model on integers alone, on the CPU.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Report the perplexity of MODEL on each text. KL and top-1 agreement are over all texts together."""
    check_json(json_file)
    from abq_llm import checkpoint, kernels
    from abq_llm.data import evaluation_tokens
    from abq_llm.devices import pick_device
    from abq_llm.evaluation import evaluate as run
    from abq_llm.integer_only import integer_only as integers

    if integer_only and backend not in ("auto", "reference"):
        raise AbqError(f"--integer-only has no backend {backend!r}: it runs in plain torch")
    quiet_libraries()
    place = pick_device("cpu" if integer_only else "auto")
    network, tokenizer = open_model(model, device=place, backend=backend)
    expected = open_model(reference, device=place)[0] if reference else None
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", SEQLEN)
    seqlen, author = min(SEQLEN, longest), expected or network
    sources = ppl or ["wikitext2"]
    texts = [evaluation_tokens(name, tokenizer, seqlen=seqlen, limit=limit, model=author) for name in sources]
    if len({text.name for text in texts}) < len(texts):
        raise AbqError(f"two texts have one name: {', '.join(text.name for text in texts)}")

    results = {}
    with progress_bar(Console(stderr=True)) as bar, integers(network) if integer_only else nullcontext():
        for text in texts:
            task = bar.add_task(text.name, total=len(text.tokens), note="")

            def progress(done: int, windows: int, task: TaskID = task) -> None:
                bar.update(task, completed=done)

            results[text.name] = run(network, text.tokens, expected, progress=progress)
    tokens = sum(result.tokens for result in results.values())

    def mean(figure: str) -> float | None:
        """Of all tokens, whichever their text."""
        if expected is None:
            return None
        return sum(getattr(result, figure) * result.tokens for result in results.values()) / tokens

    backend = "integer-only" if integer_only else kernels.choose_backend(backend, place)
    values = {
        "perplexity": {name: result.perplexity for name, result in results.items()},
        "kl": mean("kl"),
        "top1_agreement": mean("top1_agreement"),
        "backend": backend if checkpoint.is_packed(model) else None,
        "tokens": tokens,
    }
    table = Table(title=model, caption=f"{seqlen} tokens a window" + (f", against {reference}" if reference else ""))
    for column in ("text", "tokens", "perplexity", *(("KL", "top-1") if expected else ())):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, result in results.items():
        row = [name, f"{result.tokens:,}", f"{result.perplexity:.4f}"]
        if result.kl is not None and result.top1_agreement is not None:
            row += [f"{result.kl:.5f}", f"{result.top1_agreement:.2%}"]
        table.add_row(*row)
    Console().print(table)
    write_json(json_file, values)
