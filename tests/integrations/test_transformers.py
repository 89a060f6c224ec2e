"""Transformers loads, runs and saves packed checkpoints by itself, and stops if abq_llm is not there."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from abq_llm import checkpoint
from abq_llm.errors import AbqError
from abq_llm.integrations import transformers as integration
from abq_llm.integrations.transformers import AbqConfig
from abq_llm.linear import QuantLinear
from abq_llm.scheme import IntFormat
from tests.test_checkpoint import assert_same_tensors, attention, packed_model
from tests.tiny import VOCAB


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model"
    checkpoint.save(packed_model("W4A8KV4g32"), path, provenance={"seed": 3}, max_shard_size="40KB")
    return path


def test_from_pretrained_loads_bit_for_bit(directory: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert_same_tensors(model, packed_model("W4A8KV4g32"))
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)
    assert not isinstance(model.lm_head, QuantLinear)


def test_the_cache_is_quantized(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config._attn_implementation == "abq"
    assert [module.kv_format for module in attention(model)] == [IntFormat(4), IntFormat(4)]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        quantized = model(ids).logits
        for module in attention(model):
            module.kv_format = None
        assert not torch.equal(model(ids).logits, quantized)


def test_a_cache_scheme_refuses_another_attention(directory: Path) -> None:
    with pytest.raises(AbqError, match="W4A8KV4g32 needs attn_implementation='abq', not 'eager'"):
        AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


def test_save_pretrained_round_trips(directory: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "a", max_shard_size="30KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file()
    configs = [json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "a")]
    assert configs[0] == configs[1]
    assert configs[1]["quantization_config"]["provenance"] == {"seed": 3}
    assert_same_tensors(checkpoint.load(tmp_path / "a")[0], packed_model("W4A8KV4g32"))


def test_save_pretrained_of_a_saved_model_in_memory(tmp_path: Path) -> None:
    """`checkpoint.save` leaves a model that Transformers can save too."""
    model = packed_model("W3A8")
    checkpoint.save(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert_same_tensors(checkpoint.load(tmp_path / "b")[0], model)


def test_defects_are_found_without_our_loader(tmp_path: Path) -> None:
    """Transformers alone would fill a missing tensor with zeros or noise, and warn."""
    checkpoint.save(packed_model(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(AbqError, match=r"tensor 'model.layers.2.* is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(AbqError, match="format_version 2 is newer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_transformers_alone_stops(directory: Path) -> None:
    """It does not know our quant_method, which only makes it warn, nor our attention, which makes it stop."""
    script = "import sys; from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(directory)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode != 0
    assert 'ValueError: Specified `attn_implementation="abq"` is not supported' in ran.stderr


BLOOM = {"model_type": "bloom", "n_layer": 2, "n_head": 4}


def test_models_with_their_own_attention_keep_it(tmp_path: Path) -> None:
    model = packed_model("W4A8g32", **BLOOM)
    checkpoint.save(model, tmp_path / "out")
    loaded, _ = checkpoint.load(tmp_path / "out")
    ids = torch.randint(VOCAB, (1, 12))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_cache_scheme_is_refused_for_models_with_their_own_attention(tmp_path: Path) -> None:
    checkpoint.save(packed_model("W4A8KV4", **BLOOM), tmp_path / "out")
    with pytest.raises(AbqError, match="W4A8KV4 needs attn_implementation='abq'"):
        checkpoint.load(tmp_path / "out")


def test_importing_again_is_harmless(directory: Path) -> None:
    importlib.reload(integration)
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["abq"] is integration.AbqConfig
    assert AUTO_QUANTIZER_MAPPING["abq"] is integration.AbqQuantizer
    AutoModelForCausalLM.from_pretrained(directory)


def test_the_config_class_holds_the_keys_of_config_json(directory: Path) -> None:
    values = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert AbqConfig.from_dict(values).to_dict() == dict(AbqConfig(**values)) == values
    with pytest.raises(AbqError, match="unknown key 'schema', the nearest right one is 'scheme'"):
        AbqConfig(**values, schema="W4A8")
