import json

import pytest

from abq_llm.errors import AbqError
from abq_llm.evaluation.local_tasks import TASKS, files, read
from tests.zero_shot import FILES, LINES, write_tasks

FIRST = {
    "arc_challenge": {
        "question": "What is wet?",
        "choices": {"text": ["Water", "Sand", "A stone"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    },
    "boolq": {"question": "is red a colour", "passage": "Red -- red is.", "label": 1},
    "hellaswag": {
        "activity_label": "Baking [title] cake",
        "ctx_a": "A man [step] bakes.",
        "ctx_b": "he",
        "endings": ["eats  it.", "runs away [substeps] now.", "is a cake.", "sings a rather long song."],
        "label": "0",
    },
    "piqa": {"goal": "Open a door.", "sol1": "Turn the knob.", "sol2": "Eat it.", "label": 0},
    "winogrande": {
        "sentence": "The cup fell off the table as _ was wet.",
        "option1": "cup",
        "option2": "the table",
        "answer": "2",
    },
}


@pytest.mark.parametrize("task", TASKS)
def test_every_line_becomes_an_example(task, tmp_path):
    examples = read(task, write_tasks(tmp_path))
    assert len(examples) == len(LINES[task])
    if task in FIRST:
        assert examples[0] == FIRST[task]
    assert all(file.is_file() for file in files(task, tmp_path))


def test_separators_inside_a_string_do_not_end_a_line(tmp_path):
    write_tasks(tmp_path)
    line = {**LINES["piqa"][0], "goal": "Open\u2028a door."}
    (tmp_path / FILES["piqa"]).write_text(json.dumps(line, ensure_ascii=False) + "\r\n" + json.dumps(line) + "\n")
    assert [example["goal"] for example in read("piqa", tmp_path)] == ["Open\u2028a door."] * 2


def changed(task, **fields):
    return json.dumps({**LINES[task][0], **fields})


def without(task, field):
    return json.dumps({key: value for key, value in LINES[task][0].items() if key != field})


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("piqa", without("piqa", "sol2"), r"jsonl:2: has no field 'sol2'"),
        ("arc_easy", without("arc_easy", "answerKey"), "has no field 'answerKey'"),
        ("arc_easy", changed("arc_easy", question="Wet?"), r"jsonl:2: string indices"),
        ("arc_easy", changed("arc_easy", answerKey="D"), "answerKey is 'D', expected one of '1', '2', '3'"),
        ("boolq", changed("boolq", answer="yes"), "answer is 'yes', expected one of False, True"),
        ("boolq", without("boolq", "title"), "has no field 'title'"),
        ("hellaswag", changed("hellaswag", label=4), "label is 4, expected one of 0, 1, 2, 3"),
        ("winogrande", changed("winogrande", answer="3"), "answer is '3', expected one of '1', '2'"),
        ("winogrande", changed("winogrande", sentence="none"), r"sentence has no blank \(_\): 'none'"),
        ("piqa", "[1]", "jsonl:2: not a JSON object"),
        ("piqa", "{'goal'}", "jsonl:2: not a line of JSON"),
    ],
)
def test_a_bad_line_is_named(task, line, message, tmp_path):
    path = write_tasks(tmp_path) / FILES[task]
    good = path.read_text().split("\n")[0]
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(AbqError, match=message) as error:
        read(task, tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [("0\n", r"lst: 1 labels for 2 examples"), ("0\n2\n", r"lst:2: label is '2', expected '0' or '1'")],
)
def test_bad_labels_are_named(labels, message, tmp_path):
    (write_tasks(tmp_path) / "piqa_valid-labels.lst").write_text(labels)
    with pytest.raises(AbqError, match=message):
        read("piqa", tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(AbqError, match=r"boolq_dev\.jsonl: no such file"):
        read("boolq", tmp_path)
    (tmp_path / "boolq_dev.jsonl").write_bytes(b"\xff")
    with pytest.raises(AbqError, match=r"boolq_dev\.jsonl: not UTF-8 text"):
        read("boolq", tmp_path)
    with pytest.raises(AbqError, match="task 'mmlu' cannot be read from local files; those that can: arc_challenge"):
        read("mmlu", tmp_path)
