import copy
import math

import pytest
import torch

from abq_llm.architectures import NormPair
from abq_llm.calibration.block import input_statistics
from abq_llm.calibration.transforms import block_parameters
from abq_llm.errors import AbqError
from abq_llm.evaluation import evaluate
from abq_llm.methods import method_by_name
from abq_llm.methods.smoothquant import SmoothQuant
from abq_llm.quantize import quantize
from tests.blocks import calibration, first_block, random_tokens
from tests.tiny import VARIANTS, tiny_model


def pairs_of(task):
    return [pair for pair in task.architecture.pairs if isinstance(pair, NormPair)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_columns_are_multiplied_by_the_papers_formula(variant, alpha):
    model_type, overrides = VARIANTS[variant]
    task = first_block(tiny_model(model_type, **overrides))
    before = {name: tensor.clone() for name, tensor in block_parameters(task.block).items()}
    peaks = input_statistics(task, task.fp_stream).peak
    SmoothQuant(alpha).quantize_block(task)
    after = block_parameters(task.block)
    assert pairs_of(task)
    for pair in pairs_of(task):
        X = torch.stack([peaks[name] for name in pair.linears]).amax(0)
        W = torch.cat([before[f"{name}.weight"] for name in pair.linears])  # [outputs, inputs]
        s = X**alpha / W.abs().amax(0) ** (1 - alpha)
        s = s / s.log().mean().exp()  # a common factor that no quantizer notices
        norm = f"{pair.norm}.weight"
        torch.testing.assert_close(after[norm] + pair.offset, (before[norm] + pair.offset) / s, rtol=1e-4, atol=1e-6)
        for name in (*pair.linears, *pair.kept):
            torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] * s, rtol=1e-4, atol=1e-6)
    moved = {name for pair in pairs_of(task) for name in (pair.norm, *pair.linears, *pair.kept)}
    untouched = [name for name in before if name.rpartition(".")[0] not in moved]
    assert untouched and all(torch.equal(before[name], after[name]) for name in untouched)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_without_quantizers_the_block_computes_the_same(dtype):
    model = tiny_model("qwen2", num_key_value_heads=2)
    task = first_block(model.to(dtype).float(), storage_dtype=dtype)
    expected = task.fp_output.clone()
    SmoothQuant().quantize_block(task)
    output = task.forward_stream(task.fp_stream, quantized=False)
    assert (output - expected).norm() < 2e-6 * expected.norm()
    for pair in pairs_of(task):  # nor does storing the norm change anything
        weight = task.block.get_submodule(pair.norm).weight.detach()
        torch.testing.assert_close(weight.to(dtype).float(), weight, rtol=1e-6, atol=0)


def divergence(method, scheme):
    original = tiny_model()
    model = copy.deepcopy(original)
    quantize(model, scheme, method, calibration(), device="cpu", batch_size=4)
    return evaluate(model, random_tokens(16, 32, seed=99), original, batch_size=8).kl


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_it_beats_round_to_nearest_on_outlier_channels(scheme):
    assert divergence("smoothquant", scheme) < 0.6 * divergence("rtn", scheme)


def test_dead_channels_and_inputs_that_are_not_finite_leave_finite_weights():
    task = first_block(tiny_model())
    with torch.no_grad():
        task.block.input_layernorm.weight[3] = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            task.block.self_attn.get_submodule(name).weight[:, [3, 5]] = 0
    grids = SmoothQuant().quantize_block(task)
    assert all(parameter.isfinite().all() for parameter in task.block.parameters())
    assert all(grid.scale.isfinite().all() for grid in grids.values()) and math.isfinite(task.block_loss)

    messages = []
    task = first_block(tiny_model(), report=lambda message, loss: messages.append(message))
    task.fp_stream[0, 0, 0] = math.inf
    before = block_parameters(copy.deepcopy(task.block))
    SmoothQuant().quantize_block(task)
    after = block_parameters(task.block)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
    assert messages and all("not finite" in message for message in messages)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(AbqError, match=r"alpha must be in 0\.\.1"):
        method_by_name("smoothquant", alpha=alpha)
