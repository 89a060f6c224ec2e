import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from abq_llm import integer_only as module
from abq_llm.errors import AbqError
from abq_llm.evaluation import evaluate
from abq_llm.integer_only import integer_only, smoothing
from abq_llm.kernels import integer
from abq_llm.linear import QuantLinear
from abq_llm.quantize import quantize
from abq_llm.scheme import IntFormat, Scheme
from tests.blocks import random_tokens
from tests.integers import IntegersOnly
from tests.tiny import VARIANTS, tiny_model

TOKENS = random_tokens(4, 24, seed=7)
variants = pytest.mark.parametrize(
    "variant", [variant for variant, (kind, _) in VARIANTS.items() if kind in module.ACTIVATIONS]
)


def original(variant="llama", **overrides):
    model_type, fixed = VARIANTS[variant]
    return tiny_model(model_type, **(fixed | overrides))


@cache
def packed(variant="llama", scheme="W8A8"):
    """A model that no test may change."""
    model = original(variant)
    quantize(model, scheme, "rtn", device="cpu")
    return model


@torch.no_grad()
def logits(model, tokens=TOKENS, **inputs):
    return model(tokens, use_cache=False, **inputs).logits


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def exact_exp(x):
    return torch.ldexp((x.codes * x.m).double(), -x.k).exp().mul(1 << integer.FRACTION).round().long()


@variants
def test_with_sixteen_bits_and_an_exact_exponential_it_is_the_float_model(variant, monkeypatch):
    monkeypatch.setattr(integer, "exp", exact_exp)
    model = copy.deepcopy(packed(variant, "W8A8g32"))
    floats = original(variant)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            floats.get_submodule(name).weight.data = layer.dequantize()
            layer.scheme = replace(layer.scheme, activation=IntFormat(16))
    with integer_only(model, bits=16):
        ours = logits(model)
    assert distance(ours, logits(floats)) < 2e-3


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4KV4g32", "W2*A8"])
@variants
def test_blocks_see_integers_only(variant, scheme, monkeypatch):
    seen = []
    call = module._Block.__call__

    def watched(self, hidden, *args, **kwargs):
        hidden = module.from_float(hidden) if isinstance(hidden, Tensor) else hidden
        with IntegersOnly():
            seen.append(call(self, hidden, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(module._Block, "__call__", watched)
    with integer_only(packed(variant, scheme)):
        logits(packed(variant, scheme))
    assert len(seen) == 2 and all(part.dtype == torch.int64 for x in seen for part in x)


@pytest.mark.parametrize("scheme", ["W8A8", "W6A6", "W4A8KV4g32", "W2*A8"])
@variants
def test_it_costs_little_beside_the_scheme(variant, scheme):
    """Roundings turn, so that the logits differ; the divergence from the original hardly does."""
    model, reference = packed(variant, scheme), original(variant)
    before = evaluate(model, TOKENS, reference).kl
    with integer_only(model):
        after = evaluate(model, TOKENS, reference).kl
    assert after != before and abs(after - before) < 0.2 * before + 0.004


def test_symmetric_grids():
    model = original()
    scheme = Scheme.parse("W8A8KV8", weight_symmetric=True, activation_symmetric=True)
    quantize(model, scheme, "rtn", device="cpu")
    normal = logits(model)
    with integer_only(model):
        assert distance(logits(model), normal) < 0.15


def test_the_model_is_left_as_it_was():
    model = packed()
    before = logits(model)
    with integer_only(model):
        assert not torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError), integer_only(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_not_packed_may_have_any_dtype(dtype):
    model = original().to(dtype)
    quantize(model, "W8A8", "rtn", device="cpu")
    normal = logits(copy.deepcopy(model).float())
    with integer_only(model):
        ours = logits(model)
    assert ours.dtype == dtype and distance(ours.float(), normal) < 0.15


def test_a_sequence_does_not_depend_on_its_batch():
    with integer_only(packed()):
        together = logits(packed())
        alone = torch.cat([logits(packed(), tokens[None]) for tokens in TOKENS])
    assert torch.equal(together, alone)


def test_rows_at_a_time_change_nothing(monkeypatch):
    results = []
    for rows in (module.ROWS, 7):
        monkeypatch.setattr(module, "ROWS", rows)
        with integer_only(packed("mistral")):
            mask = torch.ones_like(TOKENS).index_fill_(1, torch.arange(3), 0)
            results += [logits(packed("mistral")), logits(packed("mistral"), attention_mask=mask)]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_no_token_sees_what_comes_after_it():
    changed = TOKENS.clone()
    changed[:, 16:] = 5
    with integer_only(packed()):
        before, after = logits(packed()), logits(packed(), changed)
    # a key of another token may change the last bit of the scale that all keys share
    assert distance(after[:, :16], before[:, :16]) < 0.02 < 0.5 < distance(after[:, 16:], before[:, 16:])


def test_padding_and_sliding_windows_are_masked():
    padded = torch.cat([torch.full((4, 8), 9), TOKENS], 1)
    mask = torch.ones_like(padded).index_fill_(1, torch.arange(8), 0)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with integer_only(packed()):
        ours = logits(packed(), padded, attention_mask=mask, position_ids=positions)[:, 8:]
        assert distance(ours, logits(packed())) < 0.02
    model, near, far = (original("mistral", sliding_window=window) for window in (4, 4, None))
    quantize(model, "W8A8", "rtn", device="cpu")
    with integer_only(model):
        assert distance(logits(model), logits(near)) < 0.1 < distance(logits(near), logits(far))


def test_it_generates_without_a_cache():
    model, prompt = packed(), TOKENS[:1, :4]
    with integer_only(model):
        text = model.generate(prompt, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=2)
        for length in range(4, text.shape[1]):
            assert text[0, length] == logits(model, text[:, :length])[0, -1].argmax()
        with pytest.raises(AbqError, match="use_cache=False"):
            model(prompt)


def test_smoothing_makes_the_rows_of_gate_and_up_equally_long():
    mlp = packed().model.layers[0].mlp
    s = smoothing(mlp.gate_proj, mlp.up_proj)
    gate, up = mlp.gate_proj.dequantize() * s[:, None], mlp.up_proj.dequantize() / s[:, None]
    ratio = gate.norm(dim=1) / up.norm(dim=1)
    assert (ratio / ratio[0] - 1).abs().max() < 1e-4 and s.log().mean().abs() < 1e-5 and s.std() > 0.01


def test_smoothing_helps_where_a_gate_has_outliers():
    """At 5 bits between the linears. The up projection shrinks in turn: the original is as good as it was."""
    model, reference = original(), original()
    for network in (model, reference):
        for block in network.model.layers:
            block.mlp.gate_proj.weight.data[::9] *= 12
            block.mlp.up_proj.weight.data[::9] /= 12
    quantize(model, "W8A8", "rtn", device="cpu")
    errors = []
    for smooth in (True, False):
        with integer_only(model, bits=5, smooth=smooth):
            errors.append(evaluate(model, TOKENS, reference).kl)
    assert errors[0] < 0.7 * errors[1]


def test_a_dead_row_is_harmless():
    model = original()
    model.model.layers[0].mlp.gate_proj.weight.data[3] = 0
    model.model.layers[1].mlp.up_proj.weight.data[5] = 0
    quantize(model, "W8A8", "rtn", device="cpu")
    normal = logits(model)
    with integer_only(model):
        assert distance(logits(model), normal) < 0.15


def refused(model, words):
    with pytest.raises(AbqError, match=words), integer_only(model):
        raise AssertionError


def test_what_it_cannot_run_is_named():
    refused(original(), r"packed model, self_attn.q_proj is a Linear")
    refused(packed("llama", "W4A16"), r"quantized activations, the scheme is W4A16")
    refused(tiny_model("gemma2", head_dim=16), r"'gemma2' is not supported; supported: llama")
    model = copy.deepcopy(packed())
    model.config.hidden_act = "gelu"
    refused(model, r"'llama' has 'silu', not 'gelu'")
    refused(copy.deepcopy(packed()).to("meta"), r"runs on a CPU, the model is on meta")
