import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import abq_llm
from abq_llm import architectures, checkpoint
from abq_llm.architectures import TABLES, LinearPair, NormPair, QueryKeyPair, Rows, ValueOutputPair, architecture_of
from abq_llm.errors import AbqError
from abq_llm.methods import METHODS
from abq_llm.modules import adapt
from abq_llm.quantize import quantize
from tests.blocks import calibration, name_of, random_tokens, rows_of
from tests.tiny import VARIANTS, tiny_model

TRIED = {model_type for model_type, _ in VARIANTS.values()}
MODELS = {**VARIANTS, **{name: (name, {}) for name in TABLES if name not in TRIED}}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def family(request):
    """(table, model)."""
    model_type, overrides = request.param
    model = tiny_model(model_type, **overrides)
    adapt(model)
    return architecture_of(model.config), model


def blocks(table, model):
    found = model.get_submodule(table.blocks)
    assert isinstance(found, nn.ModuleList) and len(found) == model.config.num_hidden_layers
    return found


def test_every_linear_of_a_block_is_in_the_table_once(family):
    for block in blocks(*family):
        linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        assert sorted(family[0].linears) == sorted(linears)


def test_the_names_exist_and_the_channels_of_a_pair_meet(family):
    table, model = family
    for block in blocks(table, model):
        d = block.get_submodule(table.attention).head_dim
        assert set(table.compensated) <= set(table.linears)
        for pair in table.pairs:
            if isinstance(pair, NormPair):
                (channels,) = block.get_submodule(pair.norm).weight.shape
                readers = [block.get_submodule(name) for name in (*pair.linears, *pair.kept)]
                assert {module.weight.shape[1] for module in readers} == {channels}
                assert set(pair.linears) <= set(table.linears) and not set(pair.kept) & set(table.linears)
                continue
            parts = [part for part in vars(pair).values() if isinstance(part, str | Rows)]
            if isinstance(pair, QueryKeyPair) and not {*map(name_of, parts)} & set(table.linears):  # norms per head
                assert all(block.get_submodule(name).weight.shape == (d,) for name in parts)
                continue
            assert {*map(name_of, parts)} <= set(table.linears)
            first, second = (len(rows_of(block, part)) for part in parts)
            columns = block.get_submodule(name_of(parts[1])).in_features
            if isinstance(pair, LinearPair):
                assert first == columns
            elif isinstance(pair, ValueOutputPair):
                assert columns % first == 0 and first % d == 0
            else:
                assert isinstance(pair, QueryKeyPair)
                assert first % second == 0 and second % d == 0


def test_a_linear_has_one_source_of_scales(family):
    """Two pairs on the input of one linear would divide two producers for one product. All have one but what comes
    behind an activation, which no scale passes.
    """
    fed = []
    for pair in family[0].pairs:
        fed += (
            pair.linears if isinstance(pair, NormPair) else [getattr(pair, "consumer", getattr(pair, "output", None))]
        )
    fed = [name for name in fed if name]
    assert sorted(fed) == sorted(set(fed))
    assert set(family[0].linears) - set(fed) == {"mlp.dense_4h_to_h"} & set(family[0].linears)


def test_an_unknown_type_is_named_with_the_known_ones():
    with pytest.raises(AbqError, match="'gpt9'") as error:
        architecture_of(SimpleNamespace(model_type="gpt9"))
    assert all(name in str(error.value) for name in TABLES) and "\n" not in str(error.value)
    assert "needs blocks, attention, linears, pairs, compensated: docs/" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("do_layer_norm_before", False, "'opt': do_layer_norm_before is False, supported is True"),  # OPT-350m
        ("activation_function", "gelu", "'opt': activation_function is 'gelu', supported is 'relu'"),  # Galactica
        ("layer_norm_elementwise_affine", False, "'opt': layer_norm_elementwise_affine is False"),
    ],
)
def test_a_variant_for_which_the_table_is_wrong_is_refused(name, value, message):
    model_type, overrides = VARIANTS["opt"]
    model = AutoModelForCausalLM.from_config(tiny_model(model_type, **overrides).config)
    setattr(model.config, name, value)
    with pytest.raises(AbqError, match=message):
        quantize(model, "W4A8", "rtn", device="cpu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_family_goes_the_whole_way(method, variant, tmp_path):
    """Quantize, save, load by both loaders, generate."""
    model_type, overrides = VARIANTS[variant]
    model = tiny_model(model_type, **overrides)
    for parameter in model.parameters():  # `model.bfloat16()` would round the frequencies of RoPE too
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    quantize(model, "W4A8KV4g32", method, calibration(8, 16), device="cpu", batch_size=4, epochs=1)
    checkpoint.save(model, tmp_path / "out")
    prompt, settings = random_tokens(1, 8), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt, pad_token_id=0, **settings)
    ours, theirs = abq_llm.load(tmp_path / "out")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(prompt).logits
        assert torch.equal(ours(prompt).logits, logits) and torch.equal(theirs(prompt).logits, logits)
    assert expected.shape == (1, 14) and torch.equal(theirs.generate(prompt, pad_token_id=0, **settings), expected)


RECIPE = Path(__file__).parents[1] / "docs" / "adding-a-model.md"


def test_the_recipe_followed_word_by_word(tmp_path, monkeypatch):
    """A package without Qwen3 refuses it; after the recipe's blocks, run in their order, it does all that is said."""
    table, imported, entry, variant, check, fused = re.findall(r"```python\n(.*?)```", RECIPE.read_text(), re.DOTALL)
    package = Path(architectures.__file__).parent
    assert (package / "qwen3.py").read_text().partition("\n\n")[2] == table  # after the docstring
    assert imported in (package / "__init__.py").read_text()
    assert f"    {entry.strip()}\n" in (package / "__init__.py").read_text()
    assert fused in (package / "phi3.py").read_text()
    assert f"    {variant.strip()}\n" in (Path(__file__).parent / "tiny.py").read_text()

    monkeypatch.delitem(TABLES, "qwen3")
    (variants,) = [eval(f"{{{variant}}}")]
    model_type, overrides = variants["qwen3"]
    with pytest.raises(AbqError, match=r"'qwen3'.*docs/adding-a-model.md"):
        quantize(tiny_model(model_type, **overrides), "W4A8", "rtn", device="cpu")
    names = {}
    exec(table, names)
    monkeypatch.setitem(sys.modules, "abq_llm.architectures.qwen3", SimpleNamespace(QWEN3=names.pop("QWEN3")))
    exec(imported, names)
    (entries,) = [eval(f"{{{entry}}}", names)]
    monkeypatch.setitem(TABLES, "qwen3", entries["qwen3"])
    monkeypatch.chdir(tmp_path)
    exec(check, {"model": tiny_model(model_type, **overrides)})
    assert (tmp_path / "out" / "model.safetensors").is_file()
