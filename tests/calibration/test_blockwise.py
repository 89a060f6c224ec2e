import multiprocessing
import os
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from abq_llm import checkpoint
from abq_llm.architectures import architecture_of
from abq_llm.calibration import blockwise
from abq_llm.calibration.blockwise import Calibration, _to, capture
from abq_llm.errors import AbqError
from abq_llm.linear import QuantLinear
from abq_llm.methods import method_by_name
from abq_llm.quantize import quantize
from abq_llm.scheme import Scheme
from tests.blocks import Watched, calibration, random_tokens
from tests.tiny import VARIANTS, tiny_model

EPOCHS = 3


def run(work_dir, scheme="W3A6KV6", *, method="abq", progress=None, seed=0, weights=0, tokens=None, **overrides):
    """A bf16 model of three blocks, quantized -> (model, report)."""
    sizes = {"num_key_value_heads": 2, "num_hidden_layers": 3}
    model = tiny_model("qwen2", seed=weights, **(sizes | overrides))
    report = quantize(
        model.bfloat16(),
        scheme,
        method_by_name(method, **({"epochs": EPOCHS} if method == "abq" else {})),
        tokens or calibration(8, 16),
        device="cpu",
        seed=seed,
        batch_size=2,
        work_dir=work_dir,
        progress=progress,
    )
    return model, report


def run_until_killed(work_dir: Path, moment: str) -> None:
    """In a process of its own: `run`, killed for good either between two epochs of block 1 or while writing it."""
    torch.set_num_threads(1)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(block, blocks, loss, message):
        if moment == "epoch" and block == 1 and message == f"epoch 2/{EPOCHS}":
            die()

    write = blockwise.save_file

    def half_a_file(tensors, file, metadata):
        write(tensors, file, metadata)
        if moment == "write" and "0001" in file.name:
            os.truncate(file, file.stat().st_size // 2)
            die()

    blockwise.save_file = half_a_file
    run(work_dir, progress=progress)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder of finished blocks, checkpoint folder, report, messages)."""
    folder, messages = tmp_path_factory.mktemp("uninterrupted"), []
    model, report = run(folder / "work", progress=lambda *message: messages.append(message))
    checkpoint.save(model, folder / "saved", provenance=report.provenance)
    return folder / "work", folder / "saved", report, messages


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_block_reports_its_epochs_and_its_end(uninterrupted):
    *_, report, messages = uninterrupted
    expected = [*(f"epoch {n + 1}/{EPOCHS}" for n in range(EPOCHS)), "done"]
    assert [(block, blocks, message) for block, blocks, _, message in messages] == [
        (block, 3, message) for block in range(3) for message in expected
    ]
    assert [loss for _, _, loss, message in messages if message == "done"] == report.block_losses
    assert all(loss > 0 for loss in report.block_losses)


@pytest.mark.parametrize("moment", ["epoch", "write"])
def test_a_killed_run_resumes_to_the_same_bytes(moment, uninterrupted, tmp_path):
    work, saved, report, _ = uninterrupted
    process = multiprocessing.get_context("spawn").Process(target=run_until_killed, args=(tmp_path / "work", moment))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = contents(tmp_path / "work")
    finished = {"run.json", "block_0000.safetensors"}
    assert left.keys() == finished | ({"block_0001.tmp"} if moment == "write" else set())
    assert all(left[name] == (work / name).read_bytes() for name in finished)

    messages = []
    model, resumed = run(tmp_path / "work", progress=lambda *message: messages.append(message))
    assert [message[0] for message in messages if message[3] == "resumed"] == [0]
    assert not [message for message in messages if message[0] == 0 and message[3].startswith("epoch")]
    assert contents(tmp_path / "work") == contents(work)
    checkpoint.save(model, tmp_path / "saved", provenance=resumed.provenance)
    assert contents(tmp_path / "saved") == contents(saved)
    assert resumed.block_losses == report.block_losses


def test_a_finished_run_is_read_back(uninterrupted, tmp_path):
    work, saved, report, _ = uninterrupted
    messages = []
    model, again = run(work, progress=lambda *message: messages.append(message[3]))
    assert messages == ["resumed", "done"] * 3 and again.block_losses == report.block_losses
    checkpoint.save(model, tmp_path / "saved", provenance=again.provenance)
    assert contents(tmp_path / "saved") == contents(saved)


def test_without_a_work_dir_the_result_is_the_same(uninterrupted, tmp_path):
    model, report = run(None)
    checkpoint.save(model, tmp_path / "saved", provenance=report.provenance)
    assert contents(tmp_path / "saved") == contents(uninterrupted[1])


@pytest.fixture
def finished(tmp_path):
    run(tmp_path, method="rtn")
    return tmp_path


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def empty(file):
    file.write_bytes(b"")


def scramble(file):
    file.write_bytes(b"\xff" * 1000)


def header_only(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    file.write_bytes(data[: 8 + length])


def without(name):
    def change(file):
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, {"loss": "null"})

    change.__name__ = f"without_{name}"
    return change


def with_a_stranger(file):
    save_file({**load_file(file), "mlp.extra.weight": torch.zeros(3)}, file, {"loss": "null"})


def reshaped(file):
    tensors = load_file(file)
    tensors["mlp.up_proj.weight_scale"] = tensors["mlp.up_proj.weight_scale"][:-1].clone()
    save_file(tensors, file, {"loss": "null"})


def without_metadata(file):
    save_file(load_file(file), file)


DAMAGES = [
    cut,
    empty,
    scramble,
    header_only,
    without("mlp.up_proj.weight_packed"),
    without("self_attn.q_proj.bias"),
    without("input_layernorm.weight"),
    with_a_stranger,
    reshaped,
    without_metadata,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named(damage, finished):
    file = finished / "block_0001.safetensors"
    damage(file)
    with pytest.raises(AbqError) as error:
        run(finished, method="rtn")
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    file.unlink()
    run(finished, method="rtn")  # as the message says
    assert file.exists()


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"scheme": "W4A6KV6"},
        {"scheme": Scheme.parse("W3A6KV6", weight_symmetric=True)},
        {"method": "abq"},
        {"tokens": calibration(8, 16, seed=2)},
        {"intermediate_size": 128},
        {"weights": 1},
    ],
    ids=str,
)
def test_results_of_another_run_are_refused(other, finished):
    before = contents(finished)
    with pytest.raises(AbqError) as error:
        run(finished, **{"method": "rtn", **other})
    assert str(finished) in str(error.value) and "\n" not in str(error.value)
    assert contents(finished) == before


def streams(model, scheme, **options):
    """Quantize `model` and keep both streams as they enter each block -> [(fp, quantized)]."""
    seen = []
    watched = Watched(method_by_name("rtn"), lambda task, _: seen.append((task.fp_stream, task.quantized_stream)))
    quantize(model, scheme, watched, calibration(4, 16), device="cpu", **options)
    return seen


@torch.no_grad()
def hidden_states(model):
    """What enters each block of a model that runs as a whole."""
    return [x.float() for x in model(random_tokens(4, 16), use_cache=False, output_hidden_states=True).hidden_states]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_streams_are_those_of_the_whole_models(variant):
    model_type, overrides = variant
    original, model = (tiny_model(model_type, num_hidden_layers=3, **overrides) for _ in range(2))
    seen = streams(model, "W3A8KV8")
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    fp, packed = hidden_states(original), hidden_states(model)
    assert len(seen) == 3 and all(torch.equal(stream, seen[0][0]) for stream in seen[0])
    for index in range(3):
        torch.testing.assert_close(seen[index][0], fp[index], rtol=1e-4, atol=1e-4)
    ours, theirs = seen[1][1], packed[1]
    # The quantized stream: packed block 0 on what enters it. A rounding of a key or value that falls the other way for
    # a last bit makes a step of one in 255, in this token and those after it, which the next block carries on.
    assert (ours - theirs).abs().amax(-1).median() < 1e-4
    assert (ours - theirs).norm() < 0.005 * theirs.norm()
    assert (ours - fp[1]).norm() > 0.05 * fp[1].norm()
    assert (seen[2][1] - packed[2]).norm() < 0.01 * packed[2].norm()


@torch.no_grad()
def test_the_stream_comes_from_what_is_stored():
    """A method may leave in fp32 what bf16 does not hold: the next block must see it rounded, as it will be read."""
    model = tiny_model("qwen2", num_key_value_heads=2).bfloat16()
    block = model.model.layers[0]
    _, (call, _) = capture(model, model.model.layers, random_tokens(4, 16), Calibration(torch.device("cpu")))
    streams, wanted = [], []

    def look(task, grids):
        streams.append(task.quantized_stream)
        for name in ("input_layernorm.weight", "self_attn.q_proj.bias"):
            parameter = task.block.get_parameter(name)
            parameter.mul_(1.003)
            wanted.append(parameter.clone())

    quantize(model, "W4A16", Watched(method_by_name("rtn"), look), calibration(4, 16), device="cpu")
    stored = [block.input_layernorm.weight, block.self_attn.q_proj.bias]
    for tensor, parameter in zip(stored, wanted[:2], strict=True):
        assert torch.equal(tensor, parameter.bfloat16()) and not torch.equal(tensor.float(), parameter)
    torch.testing.assert_close(streams[1], block.float()(streams[0], **call), rtol=1e-4, atol=1e-4)


def test_all_arguments_of_a_block_move_to_its_device():
    cpu = torch.zeros(2)
    moved = _to({"mask": cpu, "rope": (cpu, [cpu]), "cache": None, "flag": True}, torch.device("meta"))
    assert moved["mask"].is_meta and moved["rope"][0].is_meta and moved["rope"][1][0].is_meta
    assert moved["cache"] is None and moved["flag"] is True


def test_capture_takes_what_enters_the_first_block():
    model = tiny_model()
    tokens = random_tokens(3, 16)
    stream, (call, _) = capture(model, model.model.layers, tokens, Calibration(torch.device("cpu")))
    assert stream.dtype == torch.float32 and torch.equal(stream, model.get_input_embeddings()(tokens))
    with torch.no_grad():
        expected = model(tokens, use_cache=False, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(model.model.layers[0](stream, **call), expected, rtol=1e-5, atol=1e-5)
    assert not model.model.layers[0]._forward_pre_hooks


QWEN2_MIXED = ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1})


@pytest.mark.parametrize(
    ("variant", "windows"),
    [
        (VARIANTS["gemma3"], [8, None, 8]),
        (QWEN2_MIXED, [None, 8, 8]),
        (VARIANTS["mistral"], [8, 8, 8]),
        (VARIANTS["falcon-rw"], [16, 16, 16]),  # ALiBi is in the mask
    ],
    ids=["gemma3", "qwen2", "mistral", "falcon-rw"],
)
@torch.no_grad()
def test_each_block_is_called_as_in_the_model(variant, windows):
    """Layers of one model differ in their windows and their RoPE."""
    model_type, overrides = variant
    model = tiny_model(model_type, num_hidden_layers=3, **overrides)
    blocks = model.get_submodule(architecture_of(model.config).blocks)
    _, calls = capture(model, blocks, random_tokens(2, 16), Calibration(torch.device("cpu")))
    assert not any(block._forward_pre_hooks or "forward" in vars(block) for block in blocks)
    expected = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args, kwargs: expected.append(kwargs), with_kwargs=True)
    model(random_tokens(1, 16), use_cache=False)
    for call, kwargs, window in zip(calls, expected, windows, strict=True):
        assert call.keys() == kwargs.keys()
        mask = call["attention_mask"]
        torch.testing.assert_close(mask, kwargs["attention_mask"], rtol=0, atol=0)
        torch.testing.assert_close(call["position_embeddings"], kwargs["position_embeddings"], rtol=0, atol=0)
        assert (mask is None) == (window is None)  # None: causal
        if mask is not None:
            seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] >= 0
            assert seen.sum(1).tolist() == [min(row + 1, window) for row in range(16)]


def test_the_model_keeps_its_dtype_and_everything_outside_the_blocks():
    model, report = run(None)
    original = tiny_model("qwen2", num_key_value_heads=2, num_hidden_layers=3).bfloat16()
    assert len(report.block_losses) == 3
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    linears = {name for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    assert quantized == linears - {"lm_head"}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in quantized:
            assert tensor.dtype == torch.bfloat16
            assert "layers" in name or torch.equal(tensor, original.state_dict()[name])
