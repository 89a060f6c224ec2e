"""Packed checkpoints: what was saved is what is loaded, and everything else is one clear error."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from abq_llm import checkpoint
from abq_llm.errors import AbqError
from abq_llm.linear import QuantLinear
from abq_llm.quantizers import choose_qparams, to_groups
from abq_llm.scheme import Scheme
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

LINEAR = "model.layers.1.mlp.up_proj"


def packed_model(
    scheme: str = "W4A8g32", *, scale_dtype: torch.dtype = torch.float16, symmetric: bool = False, **overrides: Any
) -> PreTrainedModel:
    """A tiny model whose linears, without the head, are packed by min-max rounding."""
    model = tiny_model(**overrides)
    parsed = Scheme.parse(scheme, weight_symmetric=symmetric, activation_symmetric=symmetric)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            groups = to_groups(module.weight.detach(), parsed.group_size)
            qparams = choose_qparams(groups, parsed.weight, scale_dtype=scale_dtype)
            model.set_submodule(name, QuantLinear.from_linear(module, qparams, parsed, scale_dtype))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint of four shards."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(packed_model(), directory, tokenizer=tiny_tokenizer(), max_shard_size="40KB")
    return directory


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("W4A8g32", {}),
        ("W2*A8g48", {}),  # 96 = 48 + 48, 64 = 48 + a short group
        ("W8A8", {"symmetric": True}),
        ("W3A16", {"scale_dtype": torch.float32}),
        ("W4A4KV4", {"model_type": "qwen2", "num_key_value_heads": 2}),  # biases
        ("W4A8g64", {"scale_dtype": torch.bfloat16, "tie_word_embeddings": True}),
    ],
)
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path: Path, scheme: str, options: dict[str, Any]) -> None:
    model = packed_model(scheme, **options)
    checkpoint.save(model, tmp_path / "out")
    loaded, _ = checkpoint.load(tmp_path / "out")
    assert_same_tensors(loaded, model)
    assert loaded.model.layers[0].mlp.up_proj.scheme == model.model.layers[0].mlp.up_proj.scheme
    assert not loaded.training and not any(tensor.is_meta for tensor in loaded.state_dict().values())
    ids = torch.randint(VOCAB, (2, 12))
    model.set_attn_implementation("abq")
    for theirs, ours in zip(attention(model), attention(loaded), strict=True):
        assert ours.kv_format == Scheme.parse(scheme, activation_symmetric=options.get("symmetric", False)).kv
        theirs.kv_format = ours.kv_format
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_tied_head_is_written_once_and_stays_tied(tmp_path: Path) -> None:
    checkpoint.save(packed_model(tie_word_embeddings=True), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded, _ = checkpoint.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_config_json_describes_the_checkpoint(tmp_path: Path) -> None:
    model = packed_model("W3A8KV4g32", symmetric=True, scale_dtype=torch.bfloat16)
    checkpoint.save(model, tmp_path / "out", provenance={"method": "rtn", "nested": [1, None]})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attn_implementation"] == "abq"
    assert config["quantization_config"] == {
        "quant_method": "abq",
        "format_version": 1,
        "scheme": "W3A8KV4g32",
        "weight_symmetric": True,
        "activation_symmetric": True,
        "scale_dtype": "bfloat16",
        "modules_to_not_convert": ["lm_head"],
        "provenance": {"method": "rtn", "nested": [1, None]},
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype_whatever_the_model_is_loaded_in(saved: Path, dtype: torch.dtype) -> None:
    loaded, _ = checkpoint.load(saved, dtype=dtype)
    stored = checkpoint.load(saved)[0].get_submodule(LINEAR)
    assert loaded.dtype == loaded.lm_head.weight.dtype == dtype
    assert loaded.get_submodule(LINEAR).weight_scale.dtype == torch.float16
    assert torch.equal(loaded.get_submodule(LINEAR).weight_scale, stored.weight_scale)


def test_loading_sets_the_backend(saved: Path) -> None:
    loaded, _ = checkpoint.load(saved, backend="reference")
    assert loaded.get_submodule(LINEAR).backend == "reference"
    with pytest.raises(AbqError, match="unknown backend 'abacus'"):
        checkpoint.load(saved, backend="abacus")


def test_the_tokenizer_comes_along_or_is_none(saved: Path, tmp_path: Path) -> None:
    tokenizer = checkpoint.load(saved)[1]
    assert tokenizer is not None and tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    checkpoint.save(packed_model(), tmp_path / "out")
    assert checkpoint.load(tmp_path / "out")[1] is None


def test_a_loaded_model_keeps_its_provenance_when_saved_again(tmp_path: Path) -> None:
    checkpoint.save(packed_model(), tmp_path / "a", provenance={"seed": 1})
    checkpoint.save(checkpoint.load(tmp_path / "a")[0], tmp_path / "b")
    assert checkpoint.read_config(tmp_path / "b") == checkpoint.read_config(tmp_path / "a")


def test_validate_returns_the_model_on_meta(saved: Path) -> None:
    model = checkpoint.validate(saved)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert isinstance(model.get_submodule(LINEAR), QuantLinear)


def test_packed_size_counts_bits_by_hand(saved: Path) -> None:
    """W4 in groups of 32, 64 and 96 columns: 4 bits, and 16 + 8 for every 32 weights."""
    size = checkpoint.packed_size(saved)
    assert size.bits_per_weight == 4 + 24 / 32
    assert size.linears == 14
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert size.size_bytes == weights * 4.75 / 8 + 4 * (2 * VOCAB * 64 + 5 * 64)
    assert checkpoint.packed_size(checkpoint.load(saved)[0]) == size


def test_packed_size_counts_a_tied_embedding_once() -> None:
    apart, tied = (checkpoint.packed_size(packed_model(tie_word_embeddings=tie)) for tie in (False, True))
    assert apart.size_bytes - tied.size_bytes == 4 * VOCAB * 64


# Saving: all or nothing


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(AbqError, match="already exists"):
        checkpoint.save(packed_model(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AbqError, match="no quantized linear"):
        checkpoint.save(tiny_model(), tmp_path / "out")


def test_mixed_schemes_are_refused(tmp_path: Path) -> None:
    model = packed_model("W4A8")
    model.set_submodule(LINEAR, QuantLinear(64, 96, Scheme.parse("W3A8")))
    with pytest.raises(AbqError, match=f"has 2: .*W4A8.*{LINEAR} W3A8"):
        checkpoint.save(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), AbqError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk-full", "disk-full-in-safetensors", "ctrl-c"],
)
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, expected: type[BaseException]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        assert any(tmp_path.iterdir()), "the failure is meant to hit a half-written folder"
        raise failure

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(expected):
        checkpoint.save(packed_model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a tiny disk")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        with pytest.raises((AbqError, OSError), match="No space left on device"):
            checkpoint.save(packed_model(), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Loading: every defect is one clear error


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_quantization(**values: object) -> Callable[[Path], None]:
    return lambda directory: edit_config(directory, lambda config: config["quantization_config"].update(values))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Rewrite the shard that holds the linear `LINEAR`."""

    def edit(directory: Path) -> None:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        shard = directory / index["weight_map"][f"{LINEAR}.weight_packed"]
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})

    return edit


def replace(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({f"{LINEAR}.{name}": tensor}))


def shard(directory: Path) -> Path:
    return next(directory.glob("model-00002-of-*.safetensors"))


def truncate(keep: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda directory: os.truncate(shard(directory), keep(shard(directory).stat().st_size))


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "model: no such directory"),
    "no config": (lambda d: (d / "config.json").unlink(), "model: not a checkpoint, it has no config.json"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), r"config.json: not JSON"),
    "config not UTF-8": (lambda d: (d / "config.json").write_bytes(b"\xff"), r"config.json: not JSON"),
    "config not an object": (lambda d: (d / "config.json").write_text("[]"), r"config.json: not a JSON object"),
    "not quantized": (
        lambda d: edit_config(d, lambda config: config.pop("quantization_config")),
        "config.json: not a packed checkpoint, it has no quantization_config",
    ),
    "unknown model": (
        lambda d: edit_config(d, lambda config: config.update(model_type="abacus")),
        "config.json: cannot be built as a causal language model: .*abacus",
    ),
    "foreign method": (edit_quantization(quant_method="gptq"), "quant_method is 'gptq', expected 'abq'"),
    "newer format": (edit_quantization(format_version=2), "format_version 2 is newer than 1"),
    "unknown format": (edit_quantization(format_version="1"), "format_version is '1', expected 1"),
    "unknown key": (
        edit_quantization(modules_to_not_covert=[]),
        "unknown key 'modules_to_not_covert', the nearest right one is 'modules_to_not_convert'",
    ),
    "bad scheme": (edit_quantization(scheme="W9A8"), "bad scheme 'W9A8' at position 1"),
    "no scheme": (edit_quantization(scheme=None), "scheme is None, expected str"),
    "W16": (edit_quantization(scheme="W16A8"), "'W16A8' has no quantized weights"),
    "head bits": (edit_quantization(head_bits=9), "head_bits is 9, expected 1..8 or 16"),
    "flag not bool": (edit_quantization(weight_symmetric="no"), "weight_symmetric is 'no', expected bool"),
    "scale dtype": (edit_quantization(scale_dtype="int8"), "scale_dtype is 'int8', expected one of float16"),
    "module names": (edit_quantization(modules_to_not_convert=[1]), "modules_to_not_convert holds something"),
    "no such module": (edit_quantization(modules_to_not_convert=["head"]), "names 'head', which is no linear of Llama"),
    "head not packed": (edit_quantization(modules_to_not_convert=[]), "tensor 'lm_head.weight_packed' is missing"),
    "other scheme": (
        edit_quantization(scheme="W3A8g32"),
        r"safetensors: tensor '.*weight_packed' has shape \[4, 64, 2\], expected \[3, 64, 2\]",
    ),
    "other groups": (
        edit_quantization(scheme="W4A8g64"),
        r"tensor '.*weight_scale' has shape \[64, 2\], expected \[64, 1\]",
    ),
    "other scales": (edit_quantization(scale_dtype="float32"), r"weight_scale' \[64, 2\] has dtype F16, expected F32"),
    "no weights": (
        lambda d: [file.unlink() for file in d.glob("*.safetensors*")],
        "model: has neither model.safetensors nor model.safetensors.index.json",
    ),
    "only pickles": (
        lambda d: [file.rename(file.with_suffix(".bin")) for file in d.glob("*.safetensors*")],
        "model: has neither model.safetensors nor",
    ),
    "index not JSON": (lambda d: (d / "model.safetensors.index.json").write_text("x"), "index.json: not JSON"),
    "index empty": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "index.json: has no weight_map"),
    "missing shard": (lambda d: shard(d).unlink(), r"model-00002-of-\d+.safetensors: this shard is missing"),
    "truncated tensors": (
        truncate(lambda size: size - 1),
        r"00002-of-\d+.safetensors: truncated, its header describes (\d+) bytes and the file has \d+",
    ),
    "truncated header": (truncate(lambda size: 20), r"00002-of-\d+.safetensors: truncated, its header has"),
    "truncated to nothing": (truncate(lambda size: 0), r"00002-of-\d+.safetensors: not a safetensors file"),
    "longer than its header": (truncate(lambda size: size + 1), r"00002-of-\d+.safetensors: not a safetensors file"),
    "a pickle renamed": (lambda d: torch.save({}, shard(d)), r"00002-of-\d+.safetensors: not a safetensors file"),
    "header not JSON": (
        lambda d: shard(d).write_bytes((8).to_bytes(8, "little") + b"notjson!"),
        "not a safetensors file, its header cannot be read",
    ),
    "header of nonsense": (
        lambda d: shard(d).write_bytes((8).to_bytes(8, "little") + b'{"a": 1}'),
        "not a safetensors file, its header cannot be read",
    ),
    "missing tensor": (
        edit_tensors(lambda tensors: tensors.pop(f"{LINEAR}.weight_zero_point")),
        rf"model: tensor '{LINEAR}.weight_zero_point' is missing, expected torch.uint8 \[96, 2\]",
    ),
    "missing norm": (
        edit_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if "norm" in name]),
        r"model: tensor '.*norm.weight' is missing, expected torch.float32 \[64\]",
    ),
    "packed shape": (
        replace("weight_packed", torch.zeros(4, 96, 3, dtype=torch.int32)),
        rf"safetensors: tensor '{LINEAR}.weight_packed' has shape \[4, 96, 3\], expected \[4, 96, 2\]",
    ),
    "packed dtype": (
        replace("weight_packed", torch.zeros(4, 96, 2)),
        rf"safetensors: tensor '{LINEAR}.weight_packed' \[4, 96, 2\] has dtype F32, expected I32",
    ),
    "scale shape": (
        replace("weight_scale", torch.zeros(96, 1, dtype=torch.float16)),
        rf"'{LINEAR}.weight_scale' has shape \[96, 1\], expected \[96, 2\]",
    ),
    "zero point dtype": (
        replace("weight_zero_point", torch.zeros(96, 2, dtype=torch.int8)),
        rf"'{LINEAR}.weight_zero_point' \[96, 2\] has dtype I8, expected U8",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_one_clear_error(broken: Path, defect: str) -> None:
    break_it, message = DEFECTS[defect]
    break_it(broken)
    with pytest.raises(AbqError, match=message) as caught:
        checkpoint.load(broken)
    assert "\n" not in str(caught.value)
    with pytest.raises(AbqError, match=message):
        checkpoint.validate(broken)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(AbqError, match="model: not a directory"):
        checkpoint.validate(tmp_path / "model")


def test_pickles_beside_the_weights_are_never_read(broken: Path) -> None:
    """Unpickling these bytes would raise."""
    (broken / "pytorch_model.bin").write_bytes(b"\x80not a pickle")
    assert_same_tensors(checkpoint.load(broken)[0], packed_model())


def test_is_packed(saved: Path, tmp_path: Path) -> None:
    assert checkpoint.is_packed(saved)
    tiny_model().save_pretrained(tmp_path)
    assert not checkpoint.is_packed(tmp_path)
    assert not checkpoint.is_packed("meta-llama/Llama-2-7b")


PEAK_OF_LOADING = """
import sys, torch
from abq_llm import checkpoint
def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key + ":")).split()[1])
checkpoint.load(sys.argv[1])
before = kilobytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
model, _ = checkpoint.load(sys.argv[2])
for tensor in model.state_dict().values():
    tensor.flatten().view(torch.uint8)[::4096].any()  # touches every page
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_loading_peaks_at_the_packed_size_and_one_layer(saved: Path, tmp_path: Path) -> None:
    """32 MB of packed weights; in fp16 they would be 128 MB. One layer is 8 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = checkpoint.validate(saved)
    config = type(model.config)(**{**model.config.to_dict(), **sizes, "num_key_value_heads": 8, "head_dim": 128})
    del config.quantization_config
    with torch.device("meta"):
        model = type(model)(config)
    checkpoint.replace_linears(
        model, checkpoint.QuantizationConfig(Scheme.parse("W4A8"), modules_to_not_convert=("lm_head",))
    )
    model.to_empty(device="cpu")
    checkpoint.save(model, tmp_path / "out")
    size = checkpoint.packed_size(model).size_bytes
    layer = sum(tensor.nbytes for tensor in model.model.layers[0].state_dict().values())
    script = [sys.executable, "-c", PEAK_OF_LOADING, str(saved), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(script, capture_output=True, text=True, check=True, env=environment)
    assert int(ran.stdout) * 1024 <= size + layer


def assert_same_tensors(actual: nn.Module, expected: nn.Module) -> None:
    theirs, ours = expected.state_dict(), actual.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def attention(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]
