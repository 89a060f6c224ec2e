"""The harness on a tiny model: scores from local files are what its own model class computes."""

import logging
import sys
from dataclasses import asdict

import pytest
import torch

from abq_llm.errors import AbqError
from abq_llm.integrations import lm_eval as integration
from tests.tiny import tiny_model, tiny_tokenizer
from tests.zero_shot import FILES, LINES, write_tasks

TASKS = list(FILES)


@pytest.fixture(scope="module")
def task_path(tmp_path_factory):
    pytest.importorskip("lm_eval")
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_scores_equal_those_of_the_harness(model, task_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    ours = integration.evaluate_tasks(model, tiny_tokenizer(), TASKS, task_path=task_path)
    own_model = HFLM(model, backend="causal", tokenizer=tiny_tokenizer(), batch_size=2)
    loaded = integration.load_tasks(TASKS, task_path)
    results = lm_eval.evaluate(own_model, loaded, log_samples=False)["results"]
    assert list(ours) == TASKS
    for task, score in ours.items():
        expected = [results[task].get(f"{key},none") for key in ("acc", "acc_norm", "acc_stderr")]
        assert list(asdict(score).values()) == expected
    assert len({score.acc for score in ours.values()}) > 1  # else equality would say little
    assert ours["boolq"].acc_norm is None and ours["winogrande"].acc_norm is None


@torch.no_grad()
def test_a_score_is_the_share_of_right_answers(model, task_path):
    """PIQA from its definition, without the harness."""
    tokenizer, right, right_norm = tiny_tokenizer(), [], []
    for line, label in zip(LINES["piqa"], (0, 1), strict=True):
        values = []
        for answer in (line["sol1"], line["sol2"]):
            context = tokenizer(f"Question: {line['goal']}\nAnswer:")["input_ids"]
            tokens = context + tokenizer(f" {answer}")["input_ids"]
            log_p = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            values.append(sum(log_p[i - 1, tokens[i]].item() for i in range(len(context), len(tokens))))
        normed = [value / len(line[key]) for value, key in zip(values, ("sol1", "sol2"), strict=True)]
        right.append(values.index(max(values)) == label)
        right_norm.append(normed.index(max(normed)) == label)
    score = integration.evaluate_tasks(model, tokenizer, ["piqa"], task_path=task_path)["piqa"]
    assert (score.acc, score.acc_norm) == (sum(right) / 2, sum(right_norm) / 2)


def test_prompts_are_the_harness_s_own(task_path):
    """What the harness's templates make of the authors' lines, written out."""
    tasks = integration.load_tasks(["boolq", "hellaswag", "winogrande"], task_path)["tasks"]
    prompts = {}
    for name, task in tasks.items():
        task.build_all_requests(limit=1)
        prompts[name] = [instance.args for instance in task.instances]
    assert prompts["boolq"][1] == ("Red -- red is.\nQuestion: is red a colour?\nAnswer:", " yes")
    assert prompts["hellaswag"][1] == ("Baking. cake: A man bakes. He", " runs away now.")
    assert prompts["winogrande"] == [
        ("The cup fell off the table as cup", " was wet."),
        ("The cup fell off the table as the table", " was wet."),
    ]


def test_limit_and_progress(model, task_path):
    calls = []
    scores = integration.evaluate_tasks(
        model,
        tiny_tokenizer(),
        ["hellaswag", "boolq"],
        task_path=task_path,
        limit=1,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (6, 6)  # four endings, yes and no
    assert scores["hellaswag"].acc in (0, 1) and scores["hellaswag"].stderr is None


def test_the_tokenizer_is_left_alone(model, task_path):
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token is None
    integration.evaluate_tasks(model, tokenizer, ["piqa"], task_path=task_path, limit=1)
    assert tokenizer.pad_token is None


def test_the_harness_is_silent(model, task_path, capfd, caplog):
    integration.evaluate_tasks(model, tiny_tokenizer(), TASKS, task_path=task_path, limit=1)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_the_harness_is_left_as_it_was(model, task_path):
    import lm_eval.utils

    before, level = dict(vars(lm_eval.utils.env)), logging.getLogger("lm_eval").level
    integration.evaluate_tasks(model, tiny_tokenizer(), ["piqa"], task_path=task_path, limit=1)
    assert vars(lm_eval.utils.env) == before and logging.getLogger("lm_eval").level == level


@pytest.mark.parametrize(
    ("task", "local", "message"),
    [
        ("no_such", True, "unknown task 'no_such'"),
        ("mmlu", True, "task 'mmlu' cannot be read from local files"),
        ("piqa", False, "piqa: cannot be downloaded .*: pass --task-path"),
    ],
)
def test_tasks_that_cannot_be_had(model, task_path, task, local, message):
    with pytest.raises(AbqError, match=message):
        integration.evaluate_tasks(model, tiny_tokenizer(), [task], task_path=task_path if local else None)


def test_a_task_without_accuracy_is_refused(model, task_path, monkeypatch):
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.aggregation", lambda task: {"f1": None})
    with pytest.raises(AbqError, match="task 'piqa' measures f1; only acc is reported here"):
        integration.load_tasks(["piqa"], task_path)


def test_a_missing_harness_is_named_with_its_extra(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AbqError, match=r"pip install 'abq-llm\[eval\]'"):
        integration.evaluate_tasks(model, tiny_tokenizer(), ["piqa"])
    assert "abq_llm.integrations.lm_eval" in sys.modules  # which imports without it
