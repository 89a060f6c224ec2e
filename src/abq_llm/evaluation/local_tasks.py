"""Zero-shot tasks from local files: the authors' formats, read into the fields that the hub's data sets have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from abq_llm.errors import AbqError

Document = dict[str, Any]

PIQA_LABELS = "piqa_valid-labels.lst"


class LocalTask(NamedTuple):
    """Where a task's examples are, and what makes the hub's fields of a line; see `read` for its errors."""

    file: str
    fields: Callable[[Document], Document]


def read(task: str, directory: Path) -> list[Document]:
    """The examples of `task`, a name in `TASKS`, with the fields of the data set on the hub that the harness reads.

    Raises:
        AbqError: the task has no local format, or a file or a field is missing or bad; names the file and the line.
    """
    if task not in TASKS:
        raise AbqError(f"task {task!r} cannot be read from local files; those that can: {', '.join(TASKS)}")
    path = directory / TASKS[task].file
    documents = []
    for number, line in enumerate(_lines(path), 1):
        try:
            documents.append(TASKS[task].fields(_json(line)))
        except KeyError as error:
            raise AbqError(f"{path}:{number}: has no field {error}") from error
        except (TypeError, ValueError) as error:
            raise AbqError(f"{path}:{number}: {error}") from error
    if task == "piqa":
        _add_labels(documents, directory / PIQA_LABELS)
    return documents


def files(task: str, directory: Path) -> list[Path]:
    """What `read` reads."""
    return [directory / TASKS[task].file, *([directory / PIQA_LABELS] if task == "piqa" else [])]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise AbqError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8").rstrip().split("\n")  # not splitlines(): JSON may hold U+2028
    except UnicodeDecodeError as error:
        raise AbqError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _json(line: str) -> Document:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a line of JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def _one_of(value: Any, known: list[Any], name: str) -> Any:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
    return value


# --- the fields of each task ---


def _arc(line: Document) -> Document:
    choices = line["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    return {
        "question": line["question"]["stem"],
        "choices": {"text": [choice["text"] for choice in choices], "label": labels},
        "answerKey": _one_of(line["answerKey"], labels, "answerKey"),
    }


def _boolq(line: Document) -> Document:
    """SuperGLUE, which the harness reads, puts the title before the passage."""
    return {
        "question": line["question"],
        "passage": f"{line['title']} -- {line['passage']}",
        "label": int(_one_of(line["answer"], [False, True], "answer")),
    }


def _hellaswag(line: Document) -> Document:
    endings = line["endings"]
    label = _one_of(line["label"], list(range(len(endings))), "label")
    return {**{key: line[key] for key in ("activity_label", "ctx_a", "ctx_b")}, "endings": endings, "label": str(label)}


def _piqa(line: Document) -> Document:
    return {key: line[key] for key in ("goal", "sol1", "sol2")}


def _winogrande(line: Document) -> Document:
    if "_" not in line["sentence"]:
        raise ValueError(f"sentence has no blank (_): {line['sentence']!r}")
    fields = {key: line[key] for key in ("sentence", "option1", "option2")}
    return {**fields, "answer": _one_of(line["answer"], ["1", "2"], "answer")}


def _add_labels(documents: list[Document], path: Path) -> None:
    """PIQA keeps its labels in a file of their own, a line for each example."""
    labels = _lines(path)
    if len(labels) != len(documents):
        raise AbqError(f"{path}: {len(labels)} labels for {len(documents)} examples")
    for number, (document, label) in enumerate(zip(documents, labels, strict=True), 1):
        if label not in ("0", "1"):
            raise AbqError(f"{path}:{number}: label is {label!r}, expected '0' or '1'")
        document["label"] = int(label)


TASKS = {
    "arc_challenge": LocalTask("ARC-Challenge-Test.jsonl", _arc),
    "arc_easy": LocalTask("ARC-Easy-Test.jsonl", _arc),
    "boolq": LocalTask("boolq_dev.jsonl", _boolq),
    "hellaswag": LocalTask("hellaswag_val.jsonl", _hellaswag),
    "piqa": LocalTask("piqa_valid.jsonl", _piqa),
    "winogrande": LocalTask("winogrande_xl_dev.jsonl", _winogrande),
}
