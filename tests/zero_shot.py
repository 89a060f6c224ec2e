"""Six tiny tasks in the authors' formats."""

import json
from pathlib import Path

ARC = {
    "id": "1",
    "question": {
        "stem": "What is wet?",
        "choices": [{"text": "Water", "label": "1"}, {"text": "Sand", "label": "2"}, {"text": "A stone", "label": "3"}],
    },
    "answerKey": "1",
}
LINES = {
    "arc_challenge": [{**ARC, "answerKey": key} for key in ("3", "1", "2")],
    "arc_easy": [ARC, {**ARC, "answerKey": "2"}],
    "boolq": [
        {"question": f"is {word} a colour", "title": word.title(), "passage": f"{word} is.", "answer": answer}
        for word, answer in (("red", True), ("dog", False), ("blue", True))
    ],
    "hellaswag": [
        {
            "ind": number,
            "activity_label": "Baking [title] cake",
            "ctx_a": "A man [step] bakes.",
            "ctx_b": "he",
            "ctx": "A man bakes. he",
            "endings": ["eats  it.", "runs away [substeps] now.", "is a cake.", "sings a rather long song."],
            "label": number,
        }
        for number in range(3)
    ],
    "piqa": [
        {"goal": "Open a door.", "sol1": "Turn the knob.", "sol2": "Eat it."},
        {"goal": "Dry hair.", "sol1": "Use water.", "sol2": "Use a towel, and then some time."},
    ],
    "winogrande": [
        {
            "sentence": "The cup fell off the table as _ was wet.",
            "option1": "cup",
            "option2": "the table",
            "answer": "2",
        },
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
}
FILES = {
    "arc_challenge": "ARC-Challenge-Test.jsonl",
    "arc_easy": "ARC-Easy-Test.jsonl",
    "boolq": "boolq_dev.jsonl",
    "hellaswag": "hellaswag_val.jsonl",
    "piqa": "piqa_valid.jsonl",
    "winogrande": "winogrande_xl_dev.jsonl",
}
PIQA_LABELS = "0\n1\n"


def write_tasks(directory: Path) -> Path:
    for task, lines in LINES.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (directory / FILES[task]).write_text(text, encoding="utf-8")
    (directory / "piqa_valid-labels.lst").write_text(PIQA_LABELS)
    return directory
