import numpy as np
import pytest
import torch

from abq_llm import attention
from abq_llm.architectures import ValueOutputPair, architecture_of
from abq_llm.modules import adapt
from abq_llm.quantizers import fake_quantize_dynamic
from abq_llm.scheme import IntFormat, Scheme
from tests import oracle
from tests.blocks import name_of, random_tokens, rows_of
from tests.tiny import VARIANTS, tiny_model

KV4 = Scheme.parse("W4A4KV4").kv
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def model_of(variant):
    attention.register()
    model_type, overrides = variant
    model = tiny_model(model_type, **overrides)
    adapt(model)
    model.set_attn_implementation(attention.NAME)
    return model


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model(tokens, **kwargs).logits


@variants
def test_without_a_format_it_is_the_models_own(variant):
    """Which is SDPA, bit by bit, but for Falcon (of other shapes) and Gemma 2 (eager)."""
    model_type, overrides = variant
    tokens = random_tokens(3, 20)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0  # left padding
    for kwargs in ({"use_cache": False}, {"attention_mask": mask}):
        expected = logits(tiny_model(model_type, **overrides), tokens, **kwargs)
        ours = logits(model_of(variant), tokens, **kwargs)
        if model_type in ("falcon", "gemma2", "mixtral"):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "falcon-rw"])  # eager Falcon adds ALiBi twice
@torch.no_grad()
def test_the_scores_are_the_logarithms_of_the_models_own_map(name):
    """With its windows and caps, in every layer."""
    variant = VARIANTS[name]
    model_type, overrides = variant
    tokens = random_tokens(2, 12)
    eager = tiny_model(model_type, **overrides)
    eager.config._attn_implementation = "eager"
    expected = eager(tokens, use_cache=False, output_attentions=True).attentions
    model = model_of(variant)
    for module, attention_map in zip(attention.attention_modules(model), expected, strict=True):
        with attention.record_attention(module) as records:
            model(tokens, use_cache=False)
        rows = torch.tensor([11, 4, 0])
        ours = attention.attention_scores(*records[0], rows=rows).softmax(-1)
        torch.testing.assert_close(ours, attention_map[:, :, rows], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def observe(model, tokens):
    """Of the first attention module: (query and key as they meet, values, what enters the output projection)."""
    module = attention.attention_modules(model)[0]
    table = architecture_of(model.config)
    block = model.get_submodule(table.blocks)[0]
    (pair,) = (pair for pair in table.pairs if isinstance(pair, ValueOutputPair))
    value, output = block.get_submodule(name_of(pair.value)), block.get_submodule(pair.output)
    rows, seen = rows_of(block, pair.value), {}
    hooks = [
        value.register_forward_hook(lambda _, args, output: seen.update(value=output[..., rows])),
        output.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0])),
    ]
    with attention.record_attention(module) as records:
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    ((query, key, _, _),) = records
    assert not hasattr(module, "attention_records")
    return query, key, seen["value"], seen["mixed"]


def explicitly_quantized(x, fmt):
    """[..., d], each row of d on a grid of its own, by the test suite's own quantizer."""
    scale, zero, codes = oracle.contract(x.reshape(-1, x.shape[-1]).numpy(), fmt)
    return torch.from_numpy(np.asarray((codes - zero) * scale, np.float32)).view(x.shape)


@pytest.mark.parametrize("fmt", [KV4, IntFormat(4, symmetric=True), IntFormat(8)], ids=str)
@variants
def test_keys_and_values_are_quantized_per_token_and_head_after_rope(variant, fmt):
    model, tokens = model_of(variant), random_tokens(2, 12)
    query, key, value, _ = observe(model, tokens)
    attention.set_kv_format(model, fmt)
    query_again, quantized_key, _, mixed = observe(model, tokens)
    assert torch.equal(query_again, query)
    assert torch.equal(quantized_key, explicitly_quantized(key, fmt)) and not torch.equal(quantized_key, key)
    quantized_value = explicitly_quantized(value.unflatten(-1, (-1, key.shape[-1])).transpose(1, 2), fmt)
    repeats = query.shape[1] // key.shape[1]
    scores = query @ quantized_key.repeat_interleave(repeats, 1).transpose(-1, -2) / key.shape[-1] ** 0.5
    if (cap := getattr(model.config, "attn_logit_softcapping", None)) is not None:
        scores = cap * torch.tanh(scores / cap)
    if getattr(model.config, "alibi", False):
        scores += alibi(12)
    window = getattr(model.config, "sliding_window", None) or 12
    unseen = torch.ones(12, 12).triu(1) + torch.ones(12, 12).tril(-window)
    weights = scores.masked_fill(unseen.bool(), -torch.inf).softmax(-1)
    expected = (weights @ quantized_value.repeat_interleave(repeats, 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


def alibi(tokens):
    """[4 heads, tokens, tokens]: 2^-2, 2^-4, 2^-6, 2^-8 for each step ahead, over sqrt(d) as Falcon has it."""
    slopes = 2.0 ** -torch.tensor([2.0, 4, 6, 8])
    return slopes[:, None, None] * torch.arange(tokens) / 4


@torch.no_grad()
def with_cache(model, tokens, prompt):
    """Logits of all positions: the prompt at once, then one token at a time."""
    out = model(tokens[:, :prompt], use_cache=True)
    parts = [out.logits]
    for position in range(prompt, tokens.shape[1]):
        out = model(tokens[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)


@variants
def test_with_a_cache_the_logits_are_those_without(variant):
    model, tokens = model_of(variant), random_tokens(2, 16)
    unquantized = logits(model, tokens, use_cache=False)
    attention.set_kv_format(model, KV4)
    whole = logits(model, tokens, use_cache=False)
    assert (whole - unquantized).abs().max() > 0.05
    torch.testing.assert_close(with_cache(model, tokens, 8), whole, rtol=1e-4, atol=1e-4)


def test_generate_agrees_with_and_without_a_cache():
    model = model_of(VARIANTS["llama-gqa-tied"])
    attention.set_kv_format(model, KV4)
    prompt = random_tokens(1, 8)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (1, 20) and torch.equal(cached, uncached)


def test_quantizing_again_changes_nothing():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    for fmt in (KV4, IntFormat(2), IntFormat(8), IntFormat(4, symmetric=True)):
        once = fake_quantize_dynamic(x, fmt)
        torch.testing.assert_close(fake_quantize_dynamic(once, fmt), once, rtol=1e-6, atol=1e-6)


def test_set_kv_format_reaches_every_layer_and_is_undone():
    model, tokens = model_of(("llama", {"num_hidden_layers": 3})), random_tokens(1, 8)
    modules = attention.attention_modules(model)
    assert [module.layer_idx for module in modules] == [0, 1, 2]
    before = logits(model, tokens)
    attention.set_kv_format(model, KV4)
    assert [module.kv_format for module in modules] == [KV4] * 3
    quantized = logits(model, tokens)
    assert not torch.equal(quantized, before)
    modules[2].kv_format = None
    assert not torch.equal(logits(model, tokens), quantized)
    attention.set_kv_format(model, None)
    assert torch.equal(logits(model, tokens), before)
