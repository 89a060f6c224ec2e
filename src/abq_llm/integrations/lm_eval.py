"""lm-evaluation-harness: its tasks, prompts and metrics, on a model in memory.

From local files, only the data set of a task is replaced; everything else is what the harness says about it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abq_llm.errors import AbqError
from abq_llm.evaluation import local_tasks
from abq_llm.evaluation.likelihood import log_likelihoods

FEWSHOT_SEED = 1234  # the harness's own


@dataclass(frozen=True)
class TaskScore:
    """Shares of the examples that were answered right.

    Attributes:
        acc: by the likelihood of the answers.
        acc_norm: by the likelihood divided by the length of an answer; None for a task without it.
        stderr: standard error of `acc`; None for a single example.
    """

    acc: float
    acc_norm: float | None
    stderr: float | None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's log and its progress bars, which have no switch, from the terminal; errors still raise."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def check_installed() -> None:
    """Refuse before the work, not in its middle.

    Raises:
        AbqError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise AbqError("zero-shot tasks need lm-evaluation-harness: pip install 'abq-llm[eval]'")


@_quiet()
def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_path: Path | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TaskScore]:
    """Scores by task, with the examples that the harness's task has unless it says otherwise: none ("zero-shot").

    Args:
        tasks: names that the harness knows; groups and tags stand for their tasks.
        task_path: folder with local files, see `local_tasks`; None downloads from the hub.
        limit: the first so many examples of each task.
        progress: called after each batch with (requests done, requests in total); a request is one answer.

    Raises:
        AbqError: the harness is not installed, or a task is unknown, cannot be read or has no accuracy.
    """
    loaded = load_tasks(tasks, task_path)
    import lm_eval

    harness_model = _harness_model(model, tokenizer, progress or (lambda *_: None))
    with _templates_compiled_once():
        results = lm_eval.evaluate(harness_model, loaded, limit=limit, log_samples=False)["results"]
    return {name: _score(figures) for name, figures in results.items() if "acc,none" in figures}


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks as `evaluation.comparison` wants them; see `evaluate_tasks` for the fields."""

    names: tuple[str, ...]
    path: Path | None
    limit: int | None

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        scores = evaluate_tasks(model, tokenizer, self.names, task_path=self.path, limit=self.limit)
        return {name: asdict(score) for name, score in scores.items()}

    def inputs(self) -> dict[str, Any]:
        files = [file for name in self.names for file in (local_tasks.files(name, self.path) if self.path else [])]
        digests = {file.name: _sha256(file) for file in files}
        return {"names": self.names, "files": digests, "limit": self.limit, "lm_eval": version("lm_eval")}


@functools.cache  # each cell asks
def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _score(figures: dict[str, Any]) -> TaskScore:
    stderr = figures.get("acc_stderr,none")
    return TaskScore(figures["acc,none"], figures.get("acc_norm,none"), stderr if isinstance(stderr, float) else None)


@_quiet()
def load_tasks(tasks: Sequence[str], task_path: Path | None) -> dict[str, Any]:
    """What `TaskManager.load` of the harness returns, with the examples of local files if there is a `task_path`.

    Raises:
        AbqError: see `evaluate_tasks`.
    """
    check_installed()
    manager = _task_manager()
    for name in tasks:
        if name not in manager.all_tasks:
            raise AbqError(f"unknown task {name!r}; `lm-eval ls tasks` lists those of lm-evaluation-harness")
    if task_path is not None:
        local = [{"task": name, **_from_files(name, task_path)} for name in tasks]
        # An inline group is how the harness lets a task that it knows be changed in part.
        loaded: dict[str, Any] = {"tasks": manager.load([{"group": "local", "task": local}])["tasks"]}
    else:
        try:
            loaded = manager.load(list(tasks))
        except (OSError, ValueError, RuntimeError) as error:  # offline, not cached, or changed on the hub
            raise AbqError(
                f"{', '.join(tasks)}: cannot be downloaded ({error}): pass --task-path, a folder with local files"
            ) from error
    for name, task in loaded["tasks"].items():
        if "acc" not in task.aggregation():
            raise AbqError(f"task {name!r} measures {', '.join(task.aggregation())}; only acc is reported here")
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


@functools.cache  # it reads all of the harness's task files: seconds
def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _from_files(name: str, task_path: Path) -> dict[str, Any]:
    """The part of a task's configuration that says where its examples are."""
    import datasets

    examples = datasets.Dataset.from_list(local_tasks.read(name, task_path))
    split = "local"
    return {
        "custom_dataset": lambda **_: {split: examples},
        "training_split": None,
        "validation_split": None,
        "test_split": split,
    }


def _harness_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Callable[[int, int], None]
) -> Any:
    """The harness's own Hugging Face model, so that it tokenizes in its way, but with our `log_likelihoods`."""
    from lm_eval.models.huggingface import HFLM

    class Batched(HFLM):
        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                progress(done, len(requests))

            pairs = [(context, continuation) for _, context, continuation in requests]
            return log_likelihoods(self.model, pairs, max_length=self.max_length, progress=advance)

    adapter = Batched(model, backend="causal", tokenizer=copy.deepcopy(tokenizer))  # a copy, since it is given padding
    adapter.tok_encode = functools.cache(adapter.tok_encode)  # the answers of an example share its context
    return adapter


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """The harness compiles a task's templates anew for every example: most of its own time."""
    from lm_eval.utils import env

    env.from_string = functools.cache(env.from_string)
    try:
        yield
    finally:
        del env.from_string  # what hid the method
