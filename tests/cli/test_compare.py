"""`abq compare`: every cell once, failures beside results, one file of figures in three forms."""

import csv
import json
import re

import pytest

from abq_llm.cli.common import read_method
from abq_llm.cli.compare import _seeds
from abq_llm.errors import AbqError
from abq_llm.evaluation import comparison
from abq_llm.evaluation.comparison_plot import draw
from abq_llm.methods import Abq, Rtn
from tests.cli.test_cli import abq, assert_refused, model_directory, report  # noqa: F401
from tests.zero_shot import write_tasks


@pytest.fixture
def options(model_directory, tmp_path):  # noqa: F811
    comparison.open_base.cache_clear()
    comparison._reference.cache_clear()
    texts = model_directory.parent / "text.txt", model_directory.parent / "other.txt"
    data = ("--calib", texts[0], "--samples", 4, "--seqlen", 16, "--epochs", 1, "--ppl", texts[1], "--limit", 1)
    return (model_directory, "-o", tmp_path / "out", *data, "--json", tmp_path / "c.json")


def test_compare(options, tmp_path):
    files = ("--csv", tmp_path / "c.csv", "--plot", tmp_path / "c.png")
    schemes = ("-s", "W4A16", "-s", "W2*A8")
    result = abq("compare", *options, *schemes, "--methods", "rtn,awq,abq", "--seeds", "0,1", *files)
    values = report(result, tmp_path / "c.json")
    assert set(values) == {"model", "rows", "over_seeds", "failures"}
    assert values["model"] == "model" and values["failures"] == []
    runs = [(row["scheme"], row["method"], row["seed"]) for row in values["rows"]]
    each = [("rtn", 0), ("awq", 0), ("awq", 1), ("abq", 0), ("abq", 1)]
    assert runs == [("W16A16", "fp", 0), *((scheme, *run) for scheme in schemes[1::2] for run in each)]
    assert [len(row["seeds"]) for row in values["over_seeds"]] == [1, 1, 2, 2, 1, 2, 2]
    first = values["rows"][3]
    assert set(first["perplexity"]) == set(first["kl"]) == set(first["top1_agreement"]) == {"other.txt"}
    assert first["perplexity"] != values["rows"][2]["perplexity"]  # the seed matters
    lines = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [float(line["perplexity other.txt"]) for line in lines] == [
        row["perplexity"]["other.txt"] for row in values["rows"]
    ]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert result.stdout.count("rtn") == 2 * 2 and "±" in result.stdout  # figures, and what they cost


def test_only_what_is_missing_is_computed(options, tmp_path, monkeypatch):
    abq("compare", *options, "-s", "W4A16", "--methods", "rtn")
    before = report(abq("compare", *options, "-s", "W4A16", "--methods", "rtn"), tmp_path / "c.json")
    computed, compute = [], comparison.compute

    def counted(cell, *rest):
        computed.append((cell.scheme, cell.label))
        return compute(cell, *rest)

    monkeypatch.setattr(comparison, "compute", counted)
    again = report(abq("compare", *options, "-s", "W4A16", "--methods", "rtn"), tmp_path / "c.json")
    assert again == before and computed == []
    report(abq("compare", *options, "-s", "W4A16", "-s", "W3A16", "--methods", "rtn,gptq"), tmp_path / "c.json")
    assert computed == [("W4A16", "gptq"), ("W3A16", "gptq"), ("W3A16", "rtn")]  # the longest first


def test_one_method_in_two_words_is_one_row(options, tmp_path):
    abq("compare", *options, "-s", "W4A16", "--methods", "abq:epochs=1,abq")
    values = report(abq("compare", *options, "-s", "W4A16", "-s", "W4A16", "--methods", "abq"), tmp_path / "c.json")
    assert [row["method"] for row in values["rows"]] == ["fp", "abq"]
    assert len(list((tmp_path / "out").glob("*.json"))) == 2


def test_a_failure_does_not_stop_the_others(options, tmp_path, monkeypatch):
    quantize = comparison.quantize

    def failing(model, scheme, method, *rest, **options):
        if scheme == "W4A16" and method.name == "gptq":
            raise RuntimeError("out of\nmemory")
        return quantize(model, scheme, method, *rest, **options)

    arguments = ("compare", *options, "-s", "W4A16", "-s", "W3A16", "--methods", "gptq,rtn")
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "quantize", failing)
        result = abq(*arguments)
    values = report(result, tmp_path / "c.json")
    failure = {"scheme": "W4A16", "method": "gptq", "seed": 0, "error": "RuntimeError: out of memory"}
    assert values["failures"] == [failure]
    assert len(values["rows"]) == 4
    assert "W4A16 gptq seed 0: RuntimeError: out of memory" in result.stderr
    assert re.search(r"gptq .*failed", result.stdout)
    assert report(abq(*arguments), tmp_path / "c.json")["failures"] == []  # and it is tried again


def test_nothing_but_failures_is_an_error(options, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(comparison, "evaluate", failing)
    result = abq("compare", *options, "-s", "W4A16", "--methods", "rtn")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "abq: error: nothing could be computed: RuntimeError: broken"


def test_an_interrupted_comparison_goes_on(options, tmp_path, monkeypatch):
    arguments = ("compare", *options, "-s", "W4A16", "--methods", "rtn,gptq")
    quantize = comparison.quantize

    def interrupted(model, scheme, method, *rest, **options):
        if method.name == "rtn":
            raise KeyboardInterrupt
        return quantize(model, scheme, method, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "quantize", interrupted)
        result = abq(*arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("abq: error: interrupted; finished results are in ")
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    assert len(report(abq(*arguments), tmp_path / "c.json")["rows"]) == 3


def test_jobs_give_the_same_figures(options, tmp_path):
    arguments = ("compare", *options, "-s", "W4A16", "--methods", "rtn,abq")
    one = report(abq(*arguments), tmp_path / "c.json")
    two = report(abq(*arguments, "-o", tmp_path / "parallel", "--jobs", 2), tmp_path / "c.json")
    assert [row["perplexity"] for row in one["rows"]] == [row["perplexity"] for row in two["rows"]]
    assert [row["inputs"] for row in one["rows"]] == [row["inputs"] for row in two["rows"]]


def test_tasks_are_part_of_the_table(options, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    tasks = ("--tasks", "piqa,boolq", "--task-path", write_tasks(tmp_path / "tasks"))
    result = abq("compare", *options, "-s", "W4A16", "--methods", "rtn", *tasks, "--csv", tmp_path / "c.csv")
    values = report(result, tmp_path / "c.json")
    assert all(set(row["tasks"]) == {"piqa", "boolq"} for row in values["rows"])
    assert all(0 <= row["accuracy"]["mean"] <= 1 for row in values["over_seeds"])
    assert "acc_norm piqa" in (tmp_path / "c.csv").read_text()
    inputs = values["rows"][0]["inputs"]["tasks"]
    assert set(inputs["files"]) == {"piqa_valid.jsonl", "piqa_valid-labels.lst", "boolq_dev.jsonl"}
    assert str(tmp_path) not in json.dumps(values)


def test_methods_may_have_options():
    assert read_method("rtn", 7) == Rtn()
    assert read_method("abq", 7) == Abq(epochs=7)
    assert read_method("abq:dlc=False:epochs=2", 7) == Abq(dlc=False, epochs=2)
    assert read_method("abq:alphas=(0.5,)", 7) == Abq(alphas=(0.5,), epochs=7)
    assert read_method("abq:lr_rounding=2", 7) == Abq(lr_rounding=2, epochs=7)
    for label, message in (
        ("abq:dlc", "'dlc' is not OPTION=VALUE"),
        ("abq:x=1", "'x'"),
        ("magic", "'magic'"),
        ("abq:epochs=1:epochs=2", "epochs is given twice"),
        ("abq:epochs=2.5", r"epochs is 2.5, expected a value like 20"),
        ("abq:rounding=0", "rounding is 0, expected a value like True"),
        ("abq:lr_balance=-1", "lr_balance is -1, expected a finite number"),
        ("abq:lr_rounding=1e999", "lr_rounding is inf"),
        ("abq:alphas=3", "alphas is 3"),
        ("abq:alphas=(0.5,'x')", "alphas is"),
        ("gptq:act_order='no'", "act_order is 'no'"),
    ):
        with pytest.raises(AbqError, match=message):
            read_method(label, 7)


def test_seeds_are_a_list_of_integers():
    assert _seeds("2,0,2") == [2, 0]
    with pytest.raises(AbqError, match="--seeds '0,x'"):
        _seeds("0,x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-s", "W9A8"), ("bad scheme 'W9A8'",)),
        (("-s", "W16A8"), ("W16 leaves nothing to pack",)),
        (("-s", "W4A8", "--methods", "magic"), ("unknown method 'magic'",)),
        (("-s", "W4A8", "--task-path", "/nowhere"), ("--task-path /nowhere: needs --tasks",)),
        (("-s", "W4A8", "--tasks", "piqa", "--task-path", "/nowhere"), ("--task-path /nowhere: no such folder",)),
        (("-s", "W4A8", "--csv", "/nowhere/c.csv"), ("--csv /nowhere/c.csv",)),
        (("-s", "W4A8", "--device", "cpu,cuda:77"), ("'cuda:77'",)),
        (("-s", "W4A8", "--device", "cpu,meta"), ("two types",)),
        (("-s", "W4A8", "--backend", "abacus"), ("unknown backend 'abacus'",)),
    ],
)
def test_mistakes_are_found_before_any_work(options, tmp_path, arguments, words):
    assert_refused(abq("compare", *options, *arguments), *words)
    assert not (tmp_path / "out").exists()


def test_a_plot_leaves_out_what_is_missing(tmp_path):
    def row(scheme, method, bits, perplexity, accuracy=None):
        spread = perplexity and {"mean": perplexity, "std": None}
        figures = {"perplexity": {"t": spread}, "accuracy": accuracy and {"mean": accuracy, "std": 0.01}}
        return {"scheme": scheme, "method": method, "bits_per_weight": {"mean": bits, "std": 0.0}, **figures}

    rows = [row("W16A16", "fp", 16, 10.0), row("W4A16", "rtn", 4, None), row("W3A16g64", "rtn", 3.4, 40.0, 0.5)]
    rows += [row("W2*A8KV4", "abq", 3.1, 12_345.0), row("W3A8", "abq", 3.11, 20.0)]
    draw(rows, tmp_path / "a.png", title="all")
    draw(rows[:1], tmp_path / "b.png", title="one")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 0
