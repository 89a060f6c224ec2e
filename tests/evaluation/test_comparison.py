import json
from dataclasses import replace

import pytest
import torch

from abq_llm import checkpoint
from abq_llm.data import TokenSet
from abq_llm.errors import AbqError
from abq_llm.evaluation import Evaluation, comparison, evaluate
from abq_llm.evaluation.comparison import Cell, Setup, accuracy, compute, file_of, hash_model, over_seeds, read
from abq_llm.locks import locked
from abq_llm.methods import method_by_name
from abq_llm.models import load_model
from abq_llm.quantize import quantize
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer


def tokens(rows, seqlen, seed=0):
    ids = torch.randint(3, VOCAB, (rows, seqlen), generator=torch.Generator().manual_seed(seed))
    return TokenSet(f"text{seed}", ids)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().to(torch.float16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def setup(directory):
    comparison.open_base.cache_clear()
    comparison._reference.cache_clear()
    digest = hash_model(load_model(directory)[0])
    texts = (tokens(2, 24, seed=1), tokens(3, 16, seed=2))
    return Setup(str(directory), digest, torch.device("cpu"), "reference", texts)


def a_cell(**options):
    return Cell("W4A8", "abq", method_by_name("abq", epochs=1, **options), 3, tokens(4, 16))


class FixedTasks:
    def score(self, model, tokenizer):
        return {"piqa": {"acc": 0.25, "acc_norm": 0.5, "stderr": 0.1}}

    def inputs(self):
        return {"names": ["piqa"]}


def test_a_record_is_of_the_packed_checkpoint(setup, directory, tmp_path):
    cell = a_cell()
    assert compute(cell, setup, tmp_path) is None
    record = read(file_of(tmp_path, cell, setup))

    network, _ = load_model(directory)
    report = quantize(network, "W4A8", cell.method, cell.calibration, device="cpu", seed=3)
    checkpoint.save(network, tmp_path / "packed")
    packed, _ = checkpoint.load(tmp_path / "packed", dtype=torch.float32)
    reference, _ = load_model(directory, dtype=torch.float32)
    for text in setup.texts:
        expected = evaluate(packed, text.tokens, reference)
        figures = {key: record[key][text.name] for key in ("perplexity", "kl", "top1_agreement")}
        assert figures == {key: getattr(expected, key) for key in figures}
    assert record["bits_per_weight"] == report.bits_per_weight
    assert record["size_bytes"] == checkpoint.packed_size(tmp_path / "packed").size_bytes
    assert record["inputs"]["calibration"] == {"name": "text0", "shape": [4, 16], "sha256": cell.calibration.sha256}
    assert (record["scheme"], record["method"], record["seed"], record["tasks"]) == ("W4A8", "abq", 3, {})
    assert record["seconds"] > 0 and record["peak_memory_bytes"] > 0


def test_the_unquantized_model_is_a_cell_too(setup, directory, tmp_path):
    cell = Cell("W16A16", comparison.UNQUANTIZED)
    assert compute(cell, setup, tmp_path) is None
    record = read(file_of(tmp_path, cell, setup))
    reference, _ = load_model(directory, dtype=torch.float32)
    text = setup.texts[0]
    assert record["perplexity"][text.name] == evaluate(reference, text.tokens).perplexity
    assert record["kl"] == {"text1": None, "text2": None}
    assert record["bits_per_weight"] == 16


def test_tasks_are_scored_and_named(setup, tmp_path):
    cell, setup = Cell("W4A8", "rtn", method_by_name("rtn")), replace(setup, tasks=FixedTasks())
    assert compute(cell, setup, tmp_path) is None
    record = read(file_of(tmp_path, cell, setup))
    assert record["tasks"]["piqa"]["acc_norm"] == 0.5 and record["inputs"]["tasks"] == {"names": ["piqa"]}


def test_nothing_but_the_record_is_left(setup, tmp_path):
    cell, notes = a_cell(), []
    compute(cell, setup, tmp_path, notes.append)
    assert list(tmp_path.iterdir()) == [file_of(tmp_path, cell, setup)]
    assert notes[0].startswith("block 1/2") and notes[-1] == "evaluating on text2"


def test_every_input_decides_the_file(setup, tmp_path):
    cell = a_cell()
    other = {
        "scheme": Cell("W4A4", "abq", cell.method, 3, cell.calibration),
        "option": a_cell(dlc=False),
        "seed": Cell("W4A8", "abq", cell.method, 4, cell.calibration),
        "calibration": Cell("W4A8", "abq", cell.method, 3, tokens(4, 16, seed=9)),
    }
    files = {file_of(tmp_path, cell, setup), *(file_of(tmp_path, each, setup) for each in other.values())}
    changes = {
        "model_sha256": "0",
        "backend": "cuda",
        "batch_size": 2,
        "texts": setup.texts[:1],
        "tasks": FixedTasks(),
        "device": torch.device("cuda"),
    }
    files |= {file_of(tmp_path, cell, replace(setup, **{name: value})) for name, value in changes.items()}
    assert len(files) == 1 + len(other) + len(changes)
    assert file_of(tmp_path, a_cell(), replace(setup, commit="abc")) in files


def test_the_hash_of_a_model_is_of_weights_and_configuration():
    model = tiny_model()
    digest = hash_model(model)
    model.config._name_or_path = model.name_or_path = "elsewhere"
    assert hash_model(model) == digest
    model.config.rms_norm_eps *= 2
    assert hash_model(model) != digest
    assert hash_model(tiny_model(seed=1)) != digest


def test_a_failure_is_one_line_and_leaves_no_record(setup, tmp_path):
    missing_calibration = Cell("W4A8", "abq", method_by_name("abq"))
    error = compute(missing_calibration, setup, tmp_path)
    assert error.startswith("AbqError: method 'abq' learns from data") and "\n" not in error
    assert list(tmp_path.glob("*.json")) == []


def test_an_interrupted_cell_goes_on_with_the_block_that_is_missing(setup, tmp_path):
    cell = a_cell()

    def stop(note):
        if note.startswith("block 2/2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(cell, setup, tmp_path, stop)
    notes = []
    assert compute(cell, setup, tmp_path, notes.append) is None
    assert not any(note.startswith("block 1/2 epoch") for note in notes)
    assert any(note.startswith("block 2/2 epoch") for note in notes)
    record = read(file_of(tmp_path, cell, setup))
    assert record["seconds"] is None  # it would be those of one block
    (tmp_path / "straight").mkdir()
    compute(cell, setup, tmp_path / "straight")
    straight = read(file_of(tmp_path / "straight", cell, setup))
    assert (record["perplexity"], record["kl"]) == (straight["perplexity"], straight["kl"])
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_cell_that_another_process_computes_is_left_to_it(setup, tmp_path):
    cell = a_cell()
    with locked(file_of(tmp_path, cell, setup).with_suffix(".partial")):
        assert "another process is at work" in compute(cell, setup, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_fails_its_cell_only(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_measure", lambda *_: {"seconds": float("nan")})
    assert compute(a_cell(), setup, tmp_path).startswith("ValueError: Out of range float values")
    assert list(tmp_path.iterdir()) == []


def test_an_infinite_perplexity_is_null(setup, tmp_path, monkeypatch):
    infinite = Evaluation(float("inf"), 9.0, 0.0, 10)
    monkeypatch.setattr(comparison, "evaluate", lambda *_: infinite)
    cell = Cell("W4A8", "rtn", method_by_name("rtn"))
    assert compute(cell, setup, tmp_path) is None
    assert read(file_of(tmp_path, cell, setup))["perplexity"] == {"text1": None, "text2": None}


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(AbqError, match=r"a\.json: not a record of a comparison"):
        read(tmp_path / "a.json")
    assert read(tmp_path / "b.json") is None


def a_record(seed, perplexity, acc, **changes):
    base = {"scheme": "W4A8", "method": "abq", "seed": seed, "bits_per_weight": 4.0, "size_bytes": 10}
    base |= {"seconds": 2.0 + seed, "peak_memory_bytes": None, "perplexity": {"t": perplexity}, "kl": {"t": 0.5}}
    tasks = {"piqa": {"acc": 0.1, "acc_norm": acc, "stderr": 0}, "boolq": {"acc": 0.5, "acc_norm": None, "stderr": 0}}
    return json.loads(json.dumps({**base, "top1_agreement": {"t": 0.9}, "tasks": tasks, **changes}))


def test_rows_are_means_over_the_seeds():
    records = [a_record(0, 10.0, 0.3), a_record(1, 12.0, 0.5), a_record(0, 7.0, 0.3, method="rtn")]
    abq, rtn = over_seeds(records)
    assert (abq["method"], abq["seeds"], rtn["method"]) == ("abq", [0, 1], "rtn")
    assert abq["perplexity"]["t"] == {"mean": 11.0, "std": pytest.approx(2**0.5)}
    assert abq["seconds"]["mean"] == 2.5 and abq["peak_memory_bytes"] is None
    assert abq["tasks"]["piqa"]["acc_norm"]["mean"] == 0.4 and abq["tasks"]["boolq"]["acc_norm"] is None
    assert abq["accuracy"]["mean"] == pytest.approx(0.45)  # of acc_norm, and of acc for boolq
    assert rtn["perplexity"]["t"] == {"mean": 7.0, "std": None}
    assert accuracy(a_record(0, 1.0, 0.3, tasks={})) is None


def test_a_figure_that_one_seed_lacks_is_missing():
    (row,) = over_seeds([a_record(0, 10.0, 0.3), a_record(1, None, 0.3)])
    assert row["perplexity"]["t"] is None
