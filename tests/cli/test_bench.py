"""`abq bench`: its options, its JSON and its picture, on a CPU with tiny shapes."""

import pytest

from abq_llm.cli.bench import _shapes
from abq_llm.cli.common import commit_of_code
from abq_llm.evaluation import kernel_speed
from tests.cli.test_cli import abq, assert_refused, report

TINY = ("--shape", "24x40", "--backend", "reference", "--device", "cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernel_speed, "CALLS", (3, 6))
    monkeypatch.setattr(kernel_speed, "BANDWIDTH_BYTES", {"cpu": 2**16})
    kernel_speed.read_bandwidth.cache_clear()
    yield
    kernel_speed.read_bandwidth.cache_clear()


def test_kernels(tmp_path):
    result = abq("bench", "kernels", *TINY, "-s", "W2*A8", "-s", "W4A16g32", "-m", 1, "-m", 3, "--json", tmp_path / "b")
    values = report(result, tmp_path / "b")
    assert {"device", "backend", "bandwidth_gb_per_s", "versions", "commit", "rows", "failures"} == set(values)
    assert values["versions"].keys() >= {"abq_llm", "python", "torch"} and values["failures"] == []
    documented = {"kernel", "scheme", "m", "n", "k", "us", "gb_per_s", "tops", "ratio_to_fp16", "bit_exact"}
    assert all(row.keys() >= documented for row in values["rows"])
    assert [(row["kernel"], row["scheme"], row["m"], row["bit_exact"]) for row in values["rows"]] == [
        ("torch-fp16", "W16A16", 1, None),
        ("torch-fp16", "W16A16", 3, None),
        ("torch-fp32", "W32A32", 1, None),
        ("torch-fp32", "W32A32", 3, None),
        ("torch-bf16", "W16A16", 1, None),
        ("torch-bf16", "W16A16", 3, None),
        ("torch-int8", "W8A8", 1, None),
        ("torch-int8", "W8A8", 3, None),
        ("abq-reference", "W2*A8", 1, True),
        ("abq-reference", "W2*A8", 3, True),
        ("abq-reference", "W4A16g32", 1, None),
        ("abq-reference", "W4A16g32", 3, None),
    ]


def test_the_cpu_backend_is_exact(tmp_path):
    options = ("--shape", "24x40", "--device", "cpu", "-s", "W2*A8", "-s", "W4A8g8", "-m", 1, "-m", 3, "--no-rivals")
    values = report(abq("bench", "kernels", *options, "--json", tmp_path / "b"), tmp_path / "b")
    assert [(row["kernel"], row["bit_exact"], row["max_relative_error"]) for row in values["rows"]] == [
        *[("abq-cpu", True, 0)] * 2,
        *[("abq-cpu", None, 0)] * 2,
    ]
    assert values["device"].endswith(", 1 thread")


@pytest.mark.parametrize("tokens", [("-m", "1"), ("-m", "1", "-m", "3")], ids=["bits", "tokens"])
def test_plot(tmp_path, tokens):
    pytest.importorskip("matplotlib")
    schemes = ("-s", "W2A8", "-s", "W4A8", "--shape", "16x8")
    assert abq("bench", "kernels", *TINY, *schemes, *tokens, "--plot", tmp_path / "b.png").exit_code == 0
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_row_is_one_line(tmp_path, monkeypatch):
    def refuse(x, weight, bias, scheme):
        if scheme.activation.bits == 4:
            raise RuntimeError("not today")
        return linear(x, weight, bias, scheme)

    linear = kernel_speed.reference.linear
    monkeypatch.setattr(kernel_speed.reference, "linear", refuse)
    options = ("--no-rivals", "-s", "W4A4", "-s", "W4A8", "-m", 1, "--json", tmp_path / "b.json")
    result = abq("bench", "kernels", *TINY, *options)
    values = report(result, tmp_path / "b.json")
    assert result.stderr == "failed: abq-reference W4A4 24x40 M=1: RuntimeError: not today\n"
    assert [row["scheme"] for row in values["rows"]] == ["W4A8"] and values["rows"][0]["ratio_to_fp16"] is None
    assert values["failures"][0]["error"] == "RuntimeError: not today"
    assert_refused_after(abq("bench", "kernels", *TINY, "--no-rivals", "-s", "W4A4", "-m", 1), "nothing could be")


def assert_refused_after(result, words):
    assert result.exit_code == 2 and words in result.stderr.splitlines()[-1]


def test_an_interrupted_run_leaves_no_file(tmp_path, monkeypatch):
    measure = kernel_speed.measure

    def stop(*args, **options):
        yield next(measure(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_speed, "measure", stop)
    assert_refused(abq("bench", "kernels", *TINY, "--json", tmp_path / "b.json"), "interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-s", "W9A8"), "bad scheme 'W9A8'"),
        (("-s", "W16A16"), "W16A16: its weights stay floating point"),
        (("--shape", "4096"), "--shape 4096: is not NxK"),
        (("--model-shapes", "8b"), "--model-shapes 8b: is not one of 7b, 13b, 30b"),
        (("--rival", "abacus"), "--rival abacus: is not one of torch, cutlass, humming, gemlite"),
        (("--backend", "abacus"), "unknown backend 'abacus'"),
        (("--device", "abacus"), "device 'abacus' is no device"),
        (("--plot", "/nowhere/b.png"), "--plot /nowhere/b.png: its folder cannot be written to"),
        (("--json", "/nowhere/b.json"), "--json /nowhere/b.json: its folder cannot be written to"),
    ],
    ids=lambda value: value[0] + value[1] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(options, words):
    assert_refused(abq("bench", "kernels", *options), words)


def test_a_plot_needs_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(abq("bench", "kernels", "--plot", tmp_path / "b.png"), "pip install 'abq-llm[plot]'")


def test_the_linears_of_a_model():
    seven = [(4096, 4096), (11008, 4096), (4096, 11008)]
    assert _shapes([], []) == _shapes([], ["7b"]) == seven
    assert _shapes(["4096x4096", "8x16"], ["7b"]) == [(4096, 4096), (8, 16), *seven[1:]]
    assert _shapes(["8x16"], []) == [(8, 16)]


def test_the_commit_is_of_this_code_or_none():
    commit = commit_of_code()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


def test_help():
    assert "kernels" in abq("bench", "--help").stdout
    assert abq("bench", "kernels", "--help").exit_code == 0
