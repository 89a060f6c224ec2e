"""`abq eval`: perplexity, divergence from a reference model, and zero-shot accuracy."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from abq_llm.cli.common import (
    JsonFile,
    TaskPath,
    Tasks,
    check_json,
    counter,
    open_model,
    progress_bar,
    quiet_libraries,
    read_tasks,
    write_json,
)
from abq_llm.errors import AbqError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from abq_llm.data import TokenSet
    from abq_llm.evaluation import Evaluation
    from abq_llm.integrations.lm_eval import TaskScore

SEQLEN = 2048  # what papers report on; less where the model takes less


def evaluate(
    model: Annotated[str, typer.Argument(help="Packed directory, hub id, local directory, or .gguf file.")],
    ppl: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="wikitext2 (the default without --tasks), c4, c4-legacy, self, or a file; repeatable.",
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also report KL and top-1 agreement with this model.")
    ] = None,
    tasks: Tasks = None,
    task_path: TaskPath = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Windows of each text, examples of each task.")] = None,
    backend: Annotated[str, typer.Option(help="Kernels of a packed model: auto, reference, ...")] = "auto",
    integer_only: Annotated[
        bool, typer.Option("--integer-only", help="Run the blocks of a packed model on integers alone, on the CPU.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Report the perplexity of MODEL on each text, and its accuracy on zero-shot tasks.

    KL and top-1 agreement are over all texts together.
    """
    check_json(json_file)
    names = read_tasks(tasks, task_path)
    from abq_llm import checkpoint, kernels
    from abq_llm.devices import pick_device
    from abq_llm.evaluation import evaluate as run
    from abq_llm.integer_only import integer_only as integers
    from abq_llm.integrations import lm_eval

    if names:
        lm_eval.check_installed()
    if integer_only and backend not in ("auto", "reference"):
        raise AbqError(f"--integer-only has no backend {backend!r}: it runs in plain torch")
    quiet_libraries()
    place = pick_device("cpu" if integer_only else "auto")
    network, tokenizer = open_model(model, device=place, backend=backend)
    expected = open_model(reference, device=place)[0] if reference else None
    texts = read_texts(ppl or ([] if names else ["wikitext2"]), tokenizer, expected or network, limit)

    results: dict[str, Evaluation] = {}
    scores: dict[str, TaskScore] = {}
    with progress_bar(Console(file=sys.stderr)) as bar, integers(network) if integer_only else nullcontext():
        for text in texts:
            results[text.name] = run(network, text.tokens, expected, progress=counter(bar, text.name))
        if names:
            progress = counter(bar, "tasks")
            scores = lm_eval.evaluate_tasks(
                network, tokenizer, names, task_path=task_path, limit=limit, progress=progress
            )
    tokens = sum(result.tokens for result in results.values())

    def mean(figure: str) -> float | None:
        """Of all tokens, whichever their text."""
        if expected is None or not results:
            return None
        return sum(getattr(result, figure) * result.tokens for result in results.values()) / tokens

    backend = "integer-only" if integer_only else kernels.choose_backend(backend, place)
    values = {
        "perplexity": {name: result.perplexity for name, result in results.items()},
        "kl": mean("kl"),
        "top1_agreement": mean("top1_agreement"),
        "tasks": {name: asdict(score) for name, score in scores.items()},
        "backend": backend if checkpoint.is_packed(model) else None,
        "tokens": tokens,
    }
    if results:
        caption = f"{texts[0].tokens.shape[1]} tokens a window" + (f", against {reference}" if reference else "")
        _print_texts(results, model, caption)
    if scores:
        _print_tasks(scores, model)
    write_json(json_file, values)


def read_texts(
    sources: list[str], tokenizer: PreTrainedTokenizerBase, author: PreTrainedModel, limit: int | None
) -> list[TokenSet]:
    """Windows of each source, no longer than the model `author` takes; it also writes the text "self".

    Raises:
        AbqError: a source cannot be read, or two of them have one name.
    """
    from abq_llm.data import evaluation_tokens

    longest = getattr(author.config.get_text_config(), "max_position_embeddings", SEQLEN)
    seqlen = min(SEQLEN, longest)
    texts = [evaluation_tokens(name, tokenizer, seqlen=seqlen, limit=limit, model=author) for name in sources]
    if len({text.name for text in texts}) < len(texts):
        raise AbqError(f"two texts have one name: {', '.join(text.name for text in texts)}")
    return texts


def _print_texts(results: dict[str, Evaluation], title: str, caption: str) -> None:
    table = Table(title=title, caption=caption)
    compared = any(result.kl is not None for result in results.values())
    for column in ("text", "tokens", "perplexity", *(("KL", "top-1") if compared else ())):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, result in results.items():
        row = [name, f"{result.tokens:,}", f"{result.perplexity:.4f}"]
        if result.kl is not None and result.top1_agreement is not None:
            row += [f"{result.kl:.5f}", f"{result.top1_agreement:.2%}"]
        table.add_row(*row)
    Console().print(table)


def _print_tasks(scores: dict[str, TaskScore], title: str) -> None:
    table = Table(title=title)
    for column in ("task", "acc", "acc_norm", "stderr"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, score in scores.items():
        figures = (score.acc, score.acc_norm, score.stderr)
        table.add_row(name, *("" if figure is None else f"{figure:.4f}" for figure in figures))
    Console().print(table)
