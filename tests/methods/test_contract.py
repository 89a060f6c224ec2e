"""What every method owes: one test per promise, over all methods and tiny models."""

import copy
from functools import cache

import pytest
import torch
from torch import nn

from abq_llm import checkpoint
from abq_llm.architectures import architecture_of
from abq_llm.attention import attention_modules, set_kv_format
from abq_llm.calibration.transforms import block_parameters
from abq_llm.evaluation import evaluate
from abq_llm.linear import QuantLinear
from abq_llm.methods import METHODS, method_by_name
from abq_llm.quantize import quantize
from abq_llm.quantizers import fake_quantize_dynamic
from abq_llm.scheme import Scheme
from tests.blocks import Watched, calibration, random_tokens
from tests.tiny import VARIANTS, tiny_model

# Options that keep a method quick on tiny models: few steps, so long ones.
QUICK = {"epochs": 4, "lr_lwc": 0.2, "lr_let": 0.05}
FAST = {"abq": {"epochs": 2}, "affinequant": QUICK, "i_llm": {"epochs": 2}, "omniquant": QUICK}
# Those with which it only moves scales: the function stays.
EXACT = FAST | {"abq": {"epochs": 2, "compensation": False, "rounding": False}}

HELD_OUT = random_tokens(16, 32, seed=99)

# Moves scales along norms only and rounds to nearest; not meant for two bits: no worse there, not a tenth better.
MODEST = {("smoothquant", "W2*A8g32")}

ROUNDS = {"gptq"}  # rounds the weights itself: without quantizers its block is another function

CORE = ["llama", "llama-gqa-tied", "qwen3", "opt"]  # the variants on which every scheme and detail is tried
SCHEMES = {
    variant: ["W4A4", "W2*A8g32", "W4A4KV4", "W3A16"] if variant in CORE else ["W4A4KV4"] for variant in VARIANTS
}

methods = pytest.mark.parametrize("method", METHODS)
core = pytest.mark.parametrize("variant", CORE)
families = pytest.mark.parametrize("variant", VARIANTS)
schemes = pytest.mark.parametrize(
    ("variant", "scheme"), [(v, scheme) for v, tried in SCHEMES.items() for scheme in tried]
)


def original(variant):
    model_type, overrides = VARIANTS[variant]
    return tiny_model(model_type, **overrides)


@cache
def quantized(method, variant, scheme, run=0, seed=0):
    """A model that no test may change; `run` tells repetitions apart."""
    model = original(variant)
    quantize(
        model,
        scheme,
        method_by_name(method, **FAST.get(method, {})),
        calibration(),
        device="cpu",
        seed=seed,
        batch_size=4,
    )
    return model


@torch.no_grad()
def logits(model, tokens=HELD_OUT):
    return model(tokens, use_cache=False).logits


def divergence(model, variant):
    return evaluate(model, HELD_OUT, original(variant), batch_size=8).kl


@schemes
@methods
def test_no_worse_than_round_to_nearest(method, variant, scheme):
    kl, reference = (divergence(quantized(name, variant, scheme), variant) for name in (method, "rtn"))
    assert reference > 0.05  # there is something to lose
    learns = METHODS[method].needs_data and (method, scheme) not in MODEST
    assert kl < 0.9 * reference if learns else kl <= reference


@core
@methods
def test_the_seed_decides(method, variant):
    first, second = (quantized(method, variant, "W4A4", run).state_dict() for run in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any(name.endswith("weight_packed") for name in first)


@families
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ROUNDS])
def test_without_quantizers_the_blocks_compute_the_same(method, variant):
    """Each block as the method leaves it, before it is packed, on the stream of the original model."""
    changes = []

    def look(task, grids):
        output = task.forward_stream(task.fp_stream, quantized=False)
        changes.append(float((output - task.fp_output).norm() / task.fp_output.norm()))
        assert grids.keys() == task.linears.keys()
        assert all(parameter.isfinite().all() for parameter in block_parameters(task.block).values())

    watched = Watched(method_by_name(method, **EXACT.get(method, {})), look)
    quantize(original(variant), "W4A4KV4", watched, calibration(), device="cpu", batch_size=4)
    assert len(changes) == 2 and max(changes) < 5e-6


@torch.no_grad()
def in_floats(model):
    """The same model in floating point: dequantized weights, and inputs that are quantized and dequantized."""

    def hook(module, args):
        return (fake_quantize_dynamic(args[0], module.format),)

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.copy_(module.dequantize())
            if module.bias is not None:
                linear.bias.copy_(module.bias)
            linear.format = module.scheme.activation
            linear.register_forward_pre_hook(hook)
            model.set_submodule(name, linear)
    return model


@schemes
@methods
def test_integers_compute_what_floats_would(method, variant, scheme):
    model = quantized(method, variant, scheme)
    ours, theirs = logits(model), logits(in_floats(model))
    # Both round what they get to the nearest code: a last bit of noise turns a few roundings, each by one step of the
    # grid, which is large at A4. Where none turned, the logits are equal to float noise.
    assert (ours - theirs).abs().amax(-1).median() < 1e-4
    # Tokens that follow a turned one differ too: for smoothquant, early in one more sequence of qwen3 than elsewhere.
    assert (ours - theirs).norm() < (0.1 if method == "smoothquant" else 0.05) * theirs.norm()


@pytest.mark.parametrize("scheme", ["W4A4KV4", "W2*A8g32"])
@core
@methods
def test_save_and_load_give_the_same_bits(method, variant, scheme, tmp_path):
    model = quantized(method, variant, scheme)
    checkpoint.save(copy.deepcopy(model), tmp_path / "saved")
    loaded, _ = checkpoint.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))


@core
@methods
def test_the_cache_is_quantized_if_the_scheme_says_so(method, variant):
    model = copy.deepcopy(quantized(method, variant, "W8A8KV2"))
    scheme = Scheme.parse("W8A8KV2")
    assert [module.kv_format for module in attention_modules(model)] == [scheme.kv] * 2
    with_kv = logits(model)
    set_kv_format(model, None)
    assert (logits(model) - with_kv).norm() > 0.05 * with_kv.norm()
    assert all(module.kv_format is None for module in attention_modules(quantized(method, variant, "W4A4")))


@core
@methods
def test_symmetric_grids(method, variant):
    scheme = Scheme.parse("W4A6KV6", weight_symmetric=True, activation_symmetric=True)
    model = quantized(method, variant, scheme)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 2 * len(architecture_of(model.config).linears)
    assert all(module.weight_zero_point is None and module.scheme == scheme for module in linears)
    assert not torch.equal(logits(model), logits(quantized(method, variant, "W4A6KV6")))
    assert (logits(model) - logits(in_floats(model))).norm() < 0.05 * logits(model).norm()
    assert divergence(model, variant) <= divergence(quantized("rtn", variant, scheme), variant) < 0.7


@core
@methods
def test_it_reports_what_it_did(method, variant):
    model, messages = original(variant), []
    report = quantize(
        model,
        "W4A8g32",
        method_by_name(method, **FAST.get(method, {})),
        calibration(),
        device="cpu",
        batch_size=4,
        progress=lambda *message: messages.append(message),
    )
    learns = METHODS[method].needs_data
    assert report.method == report.provenance["method"] == method and report.scheme == "W4A8g32"
    assert [message[0] for message in messages if message[3] == "done"] == [0, 1]
    assert len(report.block_losses) == 2 and all((loss is not None) == learns for loss in report.block_losses)
    # 4 bits a weight, 16 + 8 for every group of 32, in rows that are multiples of 32
    assert report.bits_per_weight == 4.75 and report.seconds > 0 and report.peak_memory_bytes > 2**20
