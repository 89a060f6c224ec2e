"""A packed output head: in memory, in a checkpoint, and in both engines."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from abq_llm import checkpoint
from abq_llm.data import calibration_tokens
from abq_llm.engine.cpu import CpuEngine
from abq_llm.errors import AbqError
from abq_llm.evaluation import evaluate
from abq_llm.head import head_bits, head_name
from abq_llm.linear import QuantLinear
from abq_llm.quantize import quantize
from abq_llm.quantizers import choose_qparams, fake_quantize
from tests.tiny import VARIANTS, VOCAB, tiny_model, tiny_tokenizer


def packed(variant="llama-gqa-tied", bits=8, scheme="W4A16g32"):
    model_type, overrides = VARIANTS[variant]
    model = tiny_model(model_type, **overrides)
    quantize(model, scheme, "rtn", device="cpu", head_bits=bits)
    return model


def tokens(count=12):
    return torch.randint(0, VOCAB, (1, count), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", ["llama", "llama-gqa-tied", "qwen3", "opt"])
def test_the_head_is_rounded_and_the_embedding_is_not(variant):
    model, plain = packed(variant, 4), packed(variant, 16)
    assert (head_bits(model), head_bits(plain), head_name(model)) == (4, 16, "lm_head")
    head = plain.get_output_embeddings().weight.detach()
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    scheme = model.lm_head.scheme
    assert str(scheme) == "W4A16g64"
    grid = choose_qparams(head, scheme.weight, scale_dtype=torch.float16)
    assert torch.equal(model.lm_head.dequantize(), fake_quantize(head, grid, scheme.weight))


@pytest.mark.parametrize("variant", ["llama", "llama-gqa-tied", "opt"])
@pytest.mark.parametrize("bits", [3, 8])
@torch.no_grad()
def test_a_checkpoint_keeps_it(tmp_path, variant, bits):
    model = packed(variant, bits)
    expected = model(tokens()).logits
    checkpoint.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["head_bits"] == bits
    for loaded in (checkpoint.load(tmp_path / "a")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "a")):
        assert isinstance(loaded.lm_head, QuantLinear) and head_bits(loaded) == bits
        assert torch.equal(loaded(tokens()).logits, expected)
    loaded, _ = checkpoint.load(tmp_path / "a")
    checkpoint.save(loaded, tmp_path / "b")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    assert checkpoint.packed_size(tmp_path / "a") == checkpoint.packed_size(model)


def test_a_head_of_16_bits_is_not_mentioned(tmp_path):
    checkpoint.save(packed(bits=16), tmp_path / "a")
    assert "head_bits" not in json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]


@torch.no_grad()
def test_both_engines_use_it():
    model = packed(bits=4)
    expected = model(tokens(20)).logits[0]
    torch.testing.assert_close(CpuEngine(model, 20)(tokens(20)[0], every=True), expected, rtol=0, atol=0.02)
    assert calibration_tokens("self", tiny_tokenizer(), samples=1, seqlen=8, seed=0, model=model).tokens.shape == (1, 8)
    assert evaluate(model, tokens(20)).perplexity == pytest.approx(
        evaluate(packed(bits=16), tokens(20)).perplexity, rel=0.5
    )


@pytest.mark.parametrize("bits", [0, 9, 15, 32])
def test_bits_that_do_not_exist_are_refused(tmp_path, bits):
    with pytest.raises(AbqError, match=rf"^{bits} bits of the head are not in 1..8 or 16$"):
        packed(bits=bits)
    checkpoint.save(packed(bits=8), tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["head_bits"] = bits
    path.write_text(json.dumps(values))
    with pytest.raises(AbqError, match=f"head_bits is {bits}, expected 1..8 or 16"):
        checkpoint.load(tmp_path / "a")
