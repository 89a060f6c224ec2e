import json

import pytest
import torch

from abq_llm.errors import AbqError
from abq_llm.models import load_model
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def directory(tmp_path):
    tiny_model(num_key_value_heads=2, tie_word_embeddings=True).half().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_directory(directory, capfd):
    model, tokenizer = load_model(str(directory))
    expected = tiny_model(num_key_value_heads=2, tie_word_embeddings=True).half().state_dict()
    assert model.dtype == torch.float16
    assert not model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert tokenizer("ab\n")["input_ids"] == tiny_tokenizer()("ab\n")["input_ids"]
    assert capfd.readouterr() == ("", "")


def test_dtype(directory):
    assert load_model(directory, dtype=torch.float32)[0].dtype == torch.float32


def test_weights_that_are_missing_are_not_random(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(AbqError, match=r"9 weights are missing .* 'model\.layers\.2\.") as error:
        load_model(directory)
    assert str(directory) in str(error.value)


def test_truncated_weights(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AbqError, match="cannot be loaded as a model") as error:
        load_model(directory)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def gguf_file(path, layers=2):
    """Write a float16 LLaMA .gguf with random weights and a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("a name that would end up in config.json")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(128)
    writer.add_tokenizer_model("gpt2")
    characters = [chr(33 + n) for n in range(94)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *characters, "ab", "cd", *(f"<{n}>" for n in range(29))])
    writer.add_token_types([3, 3, 3, *[1] * 125])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    torch.manual_seed(0)
    shapes = {"token_embd": (128, 64), "output": (128, 64), "output_norm": (64,)}
    for n in range(layers):
        shapes |= {f"blk.{n}.attn_{name}": (rows, 64) for name, rows in (("q", 64), ("k", 32), ("v", 32))}
        shapes |= {f"blk.{n}.attn_output": (64, 64), f"blk.{n}.attn_norm": (64,), f"blk.{n}.ffn_norm": (64,)}
        shapes |= {f"blk.{n}.ffn_gate": (96, 64), f"blk.{n}.ffn_up": (96, 64), f"blk.{n}.ffn_down": (64, 96)}
    for name, shape in shapes.items():
        dtype = torch.float16 if len(shape) == 2 else torch.float32
        writer.add_tensor(f"{name}.weight", torch.randn(shape, dtype=dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_a_plain_model(tmp_path, capfd):
    gguf_file(tmp_path / "m.gguf")
    model, tokenizer = load_model(tmp_path / "m.gguf")
    assert capfd.readouterr() == ("", "")
    assert model.dtype == torch.float16
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == ["ab", "c"]

    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    config = (plain / "config.json").read_text()
    assert "a name that" not in config
    assert "quantization_config" not in config
    again, _ = load_model(plain)
    assert again.dtype == torch.float16
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_gguf_dtype(tmp_path):
    gguf_file(tmp_path / "m.gguf", layers=1)
    assert load_model(tmp_path / "m.gguf", dtype=torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF\x03\x00\x00\x00"])
def test_unreadable_gguf(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(AbqError, match=r"bad\.gguf: cannot be loaded"):
        load_model(tmp_path / "bad.gguf")


def test_truncated_gguf(tmp_path):
    gguf_file(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(AbqError, match=r"m\.gguf: cannot be loaded"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "no such file"),
        ("missing", "no such file or directory"),
        ("folder", "no config.json"),
        ("notes.txt", "not a model"),
        ("bert", "cannot be loaded as a model"),
    ],
)
def test_not_a_model(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(AbqError, match=message) as error:
        load_model(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_hub_id_offline():
    with pytest.raises(AbqError, match="no-one/no-model: cannot be loaded as a model"):
        load_model("no-one/no-model")
