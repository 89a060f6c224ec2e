"""The command `abq`: one file per subcommand. Heavy imports live inside the commands, so that help is quick."""

from __future__ import annotations

import os

import typer

from abq_llm.cli.bench_decode import bench
from abq_llm.cli.common import CommandGroup
from abq_llm.cli.compare import compare
from abq_llm.cli.demo import demo
from abq_llm.cli.eval import evaluate
from abq_llm.cli.generate import generate
from abq_llm.cli.info import info
from abq_llm.cli.quantize import quantize
from abq_llm.cli.tune import tune

app = typer.Typer(
    name="abq",
    cls=CommandGroup,
    help="Quantize a language model to any WpAq, pack it, and run the packed integers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("info")(info)
app.add_typer(bench, name="bench")
app.command("tune")(tune)
app.command("demo")(demo)


def main() -> None:
    """Entry point of the console script."""
    # Torch's threads would look out for work for milliseconds, on the cores that the CPU backend's threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()
