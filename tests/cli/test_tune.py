"""`abq tune` without a GPU: what it refuses, what it lists, and its tables over a search that is a fake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from abq_llm import checkpoint, kernels
from abq_llm.cli.tune import _problems, _what
from abq_llm.errors import AbqError
from abq_llm.kernels import cuda
from abq_llm.kernels.cuda import jit, plan, tune
from abq_llm.kernels.cuda.gpus import Gpu
from abq_llm.kernels.cuda.problem import Problem
from abq_llm.scheme import Scheme
from tests.cli.test_cli import abq, assert_refused, report
from tests.test_checkpoint import packed_model
from tests.tiny import tiny_model

H100 = Gpu(90, 132, 227 * 1024)
SHAPE = ("24x40", "-s", "W4A8")


@pytest.fixture(autouse=True)
def _no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("ABQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tune.read.cache_clear()
    yield
    tune.read.cache_clear()


# --- refusals ---


def test_without_a_gpu():
    assert_refused(abq("tune", *SHAPE), "backend 'cuda' cannot run on cpu: it needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("NxK", "--list")),
        (("24x", "-s", "W4A8"), ("24x: is neither one packed directory nor NxK",)),
        (("0x8", "-s", "W4A8"), ("0x8: is neither",)),
        (("24x40", "40", "-s", "W4A8"), ("40: is neither",)),
        (("no-such-folder",), ("no-such-folder: is neither",)),
        (("24x40",), ("--scheme is required",)),
        (("24x40", "-s", "W4"), ("bad scheme 'W4'",)),
        (("24x40", "-s", "W16A16"), ("--scheme W16A16", "no kernel")),
        (("--list", "24x40"), ("--list",)),
        (("--list", "-m", "4"), ("--list",)),
        ((*SHAPE, "--json", "no-such-folder/t.json"), ("--json no-such-folder/t.json",)),
    ],
)
def test_refused(arguments, words):
    assert_refused(abq("tune", *arguments), *words)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(abq("tune", tmp_path / "empty"), "empty: not a checkpoint, it has no config.json")
    tiny_model().save_pretrained(tmp_path / "plain")
    assert_refused(abq("tune", tmp_path / "plain"), "not a packed checkpoint, it has no quantization_config")


# --- what to tune ---


def test_a_checkpoint_says_its_scheme_and_shapes(tmp_path):
    model = packed_model("W2*A8g32")
    checkpoint.save(model, tmp_path / "model")
    (scheme,), shapes = _what([str(tmp_path / "model")], [])
    config = model.config
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads
    kv_size = kv * hidden // config.num_attention_heads
    assert scheme == Scheme.parse("W2*A8g32")
    assert set(shapes) == {(hidden, hidden), (kv_size, hidden), (inner, hidden), (hidden, inner)}
    assert len(shapes) == len(set(shapes))
    with pytest.raises(AbqError, match="scheme of its own"):
        _what([str(tmp_path / "model")], ["W4A8"])


def test_every_product_is_tuned_once():
    schemes = [Scheme.parse(text) for text in ("W3A8", "W2*A8", "W4A8KV4", "W4A8")]
    work = _problems(schemes, [(24, 40), (24, 40), (40, 24)], [1, 100, 128, 1])
    found = [(problem.planes, problem.n, problem.m, list(map(str, sharing))) for problem, sharing in work.items()]
    assert found == [
        (planes, n, m, names)
        for planes, names in ((3, ["W3A8", "W2*A8"]), (4, ["W4A8KV4", "W4A8"]))
        for n in (24, 40)
        for m in (1, 128)
    ]


# --- list ---


def stored(scheme: str, m: int, device: str, us: float, path: str) -> Path:
    problem = Problem.of(m, 512, 1024, Scheme.parse(scheme))
    best = next(one for one in tune.plans(tune.bucket(problem), H100) if one.path == path)
    return tune.keep({problem: (us, best)}, device)


def test_list_of_nothing(tmp_path):
    result = abq("tune", "--list", "--json", tmp_path / "t.json")
    assert report(result, tmp_path / "t.json") == {"rows": []}
    assert result.stdout == f"nothing is stored in {tmp_path / 'cache' / 'tuned'}\n"


def test_list(tmp_path, monkeypatch):
    stored("W4A8g128", 100, "NVIDIA H100 80GB HBM3", 12.345, "wgmma")
    stored("W4A16", 16, "NVIDIA H100 80GB HBM3", 5.0, "dequantize")
    stored("W2A8", 1, "NVIDIA H200", 1.5, "decode")
    result = abq("tune", "--list", "--json", tmp_path / "t.json")
    rows = report(result, tmp_path / "t.json")["rows"]
    wgmma, dequantize, decode = rows
    tile = wgmma.pop("tile")
    assert wgmma == {
        "device": "NVIDIA-H100-80GB-HBM3",
        "m": 128,
        "n": 512,
        "k": 1024,
        "planes": 4,
        "bits": 8,
        "symmetric": False,
        "group_size": 128,
        "us": 12.345,
        "path": "wgmma",
    }
    assert (dequantize["path"], dequantize["tile"], dequantize["bits"]) == ("dequantize", None, 16)
    assert (decode["device"], decode["m"], decode["planes"]) == ("NVIDIA-H200", 1, 2)
    for word in ("NVIDIA-H200", "512x1024", "65..128", "12.3", f"wgmma tokens={tile['tokens']} consumers="):
        assert word in result.stdout

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    here = report(abq("tune", "--list", "--json", tmp_path / "t.json"), tmp_path / "t.json")["rows"]
    assert here == [decode]


def test_list_says_that_a_file_is_damaged():
    stored("W2A8", 1, "NVIDIA H200", 1.5, "decode").write_text("{")
    tune.read.cache_clear()
    tune._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"NVIDIA-H200.json cannot be read"):
        assert "nothing is stored" in abq("tune", "--list").stdout


# --- a search ---


@pytest.fixture
def searched(monkeypatch):
    """The problems that were searched; all of the GPU is a fake: the last candidate is twice as fast as the others."""
    problems = []

    def search(problem, run, gpu, x, weights):
        assert x.shape == (problem.m, problem.k) and weights[0][-1].shape[0] == problem.n
        problems.append((problem, x.dtype))
        *others, last = tune.plans(problem, gpu)
        return [(5.0, last), *((10.0, other) for other in others)]

    def precompile(problems, gpu, dtype, arch, pool, progress):
        progress(0, 2)
        progress(2, 2)

    monkeypatch.setattr(kernels, "choose_backend", lambda name, device: name)
    monkeypatch.setattr(cuda, "gpu", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(jit, "arch_of", lambda device: "sm_90a")
    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(tune, "precompile", precompile)
    monkeypatch.setattr(tune, "COLD_BYTES", 1)
    return problems


def test_tune(tmp_path, searched):
    options = ("-s", "W4A8", "-s", "W3A8", "-s", "W2*A8", "-m", 1, "-m", 20, "--dtype", "bfloat16", "--jobs", 1)
    result = abq("tune", "512x512", "64x512", *options, "--json", tmp_path / "t.json")
    rows = report(result, tmp_path / "t.json")["rows"]
    assert len(rows) == 8 and [dtype for _, dtype in searched] == [torch.bfloat16] * 8
    assert [row["schemes"] for row in rows] == [["W4A8"]] * 4 + [["W3A8", "W2*A8"]] * 4
    assert [(row["n"], row["m"]) for row in rows] == [(512, 1), (512, 32), (64, 1), (64, 32)] * 2
    assert {(row["us"], row["heuristic_us"], row["gain"], row["device"]) for row in rows} == {
        (5.0, 10.0, 2.0, "NVIDIA-H200")
    }
    for word in ("W3A8, W2*A8", "64x512", "17..32", "5.00", "2.00x", "NVIDIA H200"):
        assert word in result.stdout
    for problem, _ in searched:
        found = tune.lookup(problem, "NVIDIA H200", H100)
        assert found == tune.plans(problem, H100)[-1] != plan.choose(problem, H100)
    assert len(json.loads(tune.file_of("NVIDIA H200").read_text())) == 8


def test_an_interrupted_search_keeps_what_is_done(tmp_path, searched, monkeypatch):
    search = tune.search

    def stop(problem, *rest):
        if problem.m == 2:
            raise KeyboardInterrupt
        return search(problem, *rest)

    monkeypatch.setattr(tune, "search", stop)
    result = abq("tune", *SHAPE, "-m", 1, "-m", 2, "-m", 4, "--json", tmp_path / "t.json")
    assert_refused(result, "interrupted; the plans of 1 of 3 products are in", "NVIDIA-H200.json")
    assert [problem.m for problem in tune.read(tune.file_of("NVIDIA H200"))] == [1]
    assert not (tmp_path / "t.json").exists()


def test_a_product_that_no_kernel_runs_is_one_line(searched, monkeypatch):
    search = tune.search

    def fail(problem, *rest):
        if problem.m == 2:
            raise AbqError("no kernel runs: not today")
        return search(problem, *rest)

    monkeypatch.setattr(tune, "search", fail)
    result = abq("tune", *SHAPE, "-m", 1, "-m", 2)
    assert result.exit_code == 0 and result.stderr == "failed: W4A8 24x40 M=2: no kernel runs: not today\n"
    result = abq("tune", *SHAPE, "-m", 2)
    assert result.exit_code == 2 and "nothing could be measured" in result.stderr.splitlines()[-1]


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(tmp_path, searched):
    (tmp_path / "cache").write_text("a file")
    assert_refused(abq("tune", *SHAPE), "cache")
    assert searched == []
