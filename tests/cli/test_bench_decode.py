"""`abq bench decode` on a tiny model."""

from pathlib import Path

import pytest
import torch

from abq_llm.evaluation import decode_speed, kernel_speed
from abq_llm.quantize import quantize
from tests.cli.test_cli import abq, assert_refused, model_directory, packed_directory, report
from tests.tiny import tiny_model

__all__ = ["model_directory", "packed_directory"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernel_speed, "BANDWIDTH_BYTES", {"cpu": 2**16})
    kernel_speed.read_bandwidth.cache_clear()
    yield
    kernel_speed.read_bandwidth.cache_clear()


def test_decode(packed_directory: Path, model_directory: Path, tmp_path: Path) -> None:
    options = ("--tokens", 5, "--prompt", 7, "--device", "cpu", "--json", tmp_path / "d.json")
    result = abq("bench", "decode", packed_directory, model_directory, *options)
    values = report(result, tmp_path / "d.json")
    assert {"device", "bandwidth_gb_per_s", "versions", "commit", "rows"} == set(values)
    rows = values["rows"]
    assert [(row["model"], row["engine"]) for row in rows] == [
        (str(packed_directory), "cpu"),
        (str(packed_directory), "transformers"),
        (str(model_directory), "transformers"),
    ]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["ms_per_token"])
        assert row["ms_range"][0] <= row["ms_per_token"] <= row["ms_range"][1]
        assert row["fraction_of_floor"] == pytest.approx(row["floor_ms"] / row["ms_per_token"])
        assert (row["prompt_tokens"], row["tokens"]) == (7, 5) and row["prefill_tokens_per_s"] > 0
    assert rows[2]["scheme"] == "float32"
    assert f"{model_directory}: engine cpu cannot run it: its linears are not packed" in result.stderr
    only = abq("bench", "decode", packed_directory, "--engine", "cpu", *options)
    assert [row["engine"] for row in report(only, tmp_path / "d.json")["rows"]] == ["cpu"]


def test_a_mistake_is_one_line(model_directory: Path) -> None:
    assert_refused(abq("bench", "decode", "x", "--engine", "gpu"), "--engine gpu: is not one of cpu, transformers")
    refused = abq("bench", "decode", model_directory, "--engine", "cpu", "--tokens", 1, "--device", "cpu")
    assert refused.exit_code == 2
    assert refused.stderr.endswith("abq: error: nothing could be measured: no engine can run the models\n")


def test_bytes_of_a_token() -> None:
    """Hidden 64, 4 heads of 16, MLP 96, vocabulary 128, two blocks."""
    model = tiny_model()
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    head, cache = 2 * 64 * 128, 2 * 2 * 4 * 16  # bytes; numbers a token
    assert decode_speed.bytes_per_token(model, 10) == 2 * weights + head + 2 * 10 * cache
    quantize(model, "W4A8KV4", "rtn", device="cpu")
    rows = 2 * (4 * 64 + 2 * 96 + 64)
    assert decode_speed.bytes_per_token(model, 10) == weights / 2 + 3 * rows + head + 10 * cache / 2


def test_both_engines_are_asked_for_the_same_tokens(monkeypatch) -> None:
    model = tiny_model()
    quantize(model, "W8A16", "rtn", device="cpu")
    seen: dict[str, list[int]] = {}

    def spy(step, tokens):
        token, seconds = timed(step, tokens)
        seen.setdefault(type(step).__name__, []).extend([*tokens.tolist(), *token.tolist()])
        return token, seconds

    timed = decode_speed._timed
    monkeypatch.setattr(decode_speed, "_timed", spy)
    for engine in decode_speed.ENGINES:
        decode_speed.measure(model, engine, name="tiny", prompt=6, tokens=8, bandwidth=1e9)
    assert seen["CpuEngine"] == seen["_Transformers"]
    assert torch.tensor(seen["CpuEngine"]).numel() == 6 + 1 + 2 * 8
