import copy
import math

import pytest
import torch
from torch.nn import functional as F

from abq_llm.architectures import LinearPair, NormPair, QueryKeyPair
from abq_llm.calibration.block import input_statistics
from abq_llm.calibration.learned import LearnedWeights
from abq_llm.calibration.transforms import block_parameters, consumers
from abq_llm.errors import AbqError
from abq_llm.evaluation import evaluate
from abq_llm.methods import method_by_name
from abq_llm.methods.omniquant import OmniQuant, initial_transformation
from abq_llm.quantize import quantize
from abq_llm.quantizers import choose_qparams, fake_quantize, to_groups
from tests.blocks import calibration, first_block, folded, random_tokens
from tests.tiny import VARIANTS, tiny_model

QUICK = {"epochs": 4, "lr_lwc": 0.2, "lr_let": 0.05}


def opt_block(scheme="W4A4", **changes):
    return first_block(tiny_model("opt", **VARIANTS["opt"][1]), scheme, **changes)


def start(task, alpha=0.5):
    return initial_transformation(task, LearnedWeights(task), alpha)


def changed(task, method):
    """Names of the block's parameters that the method changes."""
    before = block_parameters(copy.deepcopy(task.block))
    method.quantize_block(task)
    return {name for name, tensor in block_parameters(task.block).items() if not torch.equal(tensor, before[name])}


def min_max(task):
    return {
        name: choose_qparams(
            to_groups(linear.weight.detach(), task.scheme.group_size), task.scheme.weight, scale_dtype=torch.float16
        )
        for name, linear in task.linears.items()
    }


def same_grids(ours, theirs):
    return all(torch.equal(x, y) for name in theirs for x, y in zip(ours[name], theirs[name], strict=True))


def test_everything_but_up_to_down_is_scaled():
    for model_type in ("llama", "opt"):
        task = first_block(tiny_model(model_type), "W4A4KV4")
        moved = [pair for pair in task.architecture.pairs if not isinstance(pair, LinearPair)]
        assert list(start(task).balance) == moved and len(moved) == len(task.architecture.pairs) - 1
        task.scheme = first_block(tiny_model(model_type), "W4A4").scheme
        assert list(start(task).balance) == [pair for pair in moved if not isinstance(pair, QueryKeyPair)]


def test_scales_start_at_smoothquants_formula():
    task = first_block(tiny_model(), "W4A4")
    vectors, parameters = start(task, 0.3), block_parameters(task.block)
    peaks = input_statistics(task, task.fp_stream).peak
    for pair in vectors.balance:
        if isinstance(pair, NormPair):
            W = torch.cat([parameters[f"{name}.weight"] for name in pair.linears])
            s = peaks[pair.linears[0]] ** 0.3 / W.abs().amax(0) ** 0.7
            torch.testing.assert_close(vectors.balance[pair].exp(), s / s.log().mean().exp(), rtol=1e-4, atol=1e-6)
    assert not vectors.shift


def test_shifts_are_learned_where_there_are_biases_and_quantized_activations():
    assert not start(opt_block("W4A16KV4")).shift
    task = opt_block()
    vectors, parameters = start(task), block_parameters(task.block)
    statistics = input_statistics(task, task.fp_stream)
    assert list(vectors.shift) == list(vectors.balance) and len(vectors.shift) == 3
    for pair, delta in vectors.shift.items():
        name = consumers(pair)[0]
        high, low = statistics.high[name], statistics.low[name]
        torch.testing.assert_close(delta, (high + low) / 2)
        W = torch.cat([parameters[f"{linear}.weight"] for linear in consumers(pair)])
        s = ((high - low) / 2 / W.abs().amax(0)).sqrt()  # of what is left after the shift
        torch.testing.assert_close(vectors.balance[pair].exp(), s / s.log().mean().exp(), rtol=1e-3, atol=1e-5)
    assert changed(opt_block(), OmniQuant(epochs=0)) == {
        *(f"{name}.{part}" for name in ("self_attn_layer_norm", "final_layer_norm") for part in ("weight", "bias")),
        *(f"self_attn.{name}.{part}" for name in ("q_proj", "k_proj", "v_proj") for part in ("weight", "bias")),
        *(f"{name}.{part}" for name in ("self_attn.out_proj", "fc1") for part in ("weight", "bias")),
    }


def test_shifts_lower_the_error_of_activations_that_are_off_centre():
    losses = {}
    for shifted in (True, False):
        task = opt_block()
        with torch.no_grad():  # as OPT's channels are: far from zero
            task.block.self_attn_layer_norm.bias += 5 * torch.randn(64, generator=torch.Generator().manual_seed(0))
        weights = LearnedWeights(task)
        vectors = start(task)
        if not shifted:
            vectors.shift = {}
        with torch.no_grad():
            output = task.forward(task.quantized_stream, weights.quantized(vectors), quantized=True)
        losses[shifted] = float(F.mse_loss(output, task.fp_output))
    assert losses[True] < 0.7 * losses[False]


@pytest.mark.parametrize("scheme", ["W3A16", "W3A8", "W3A16KV4"])
def test_only_the_transformation_moves_weights(scheme):
    everything = block_parameters(tiny_model().model.layers[0]).keys()
    assert changed(first_block(tiny_model(), scheme), OmniQuant(**QUICK)) == everything - {"mlp.down_proj.weight"}
    assert changed(first_block(tiny_model(), scheme), OmniQuant(**QUICK, let=False)) == set()


@pytest.mark.parametrize("scheme", ["W3A16", "W4A4g48", "W2*A8g32"])
def test_clips_start_at_exactly_one_and_are_learned(scheme):
    for options, moved in ({"epochs": 0}, False), ({"lwc": False}, False), ({}, True):
        task = first_block(tiny_model(), scheme)
        grids = OmniQuant(**{**QUICK, **options}).quantize_block(task)
        assert same_grids(grids, min_max(task)) != moved


def test_with_both_parts_off_it_is_round_to_nearest():
    models = [tiny_model(), tiny_model()]
    for model, method in zip(models, (OmniQuant(let=False, lwc=False), "rtn"), strict=True):
        quantize(model, "W3A8g32", method, calibration(), device="cpu", batch_size=4)
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("aug_loss", [False, True])
@torch.no_grad()
def test_the_loss_is_the_mean_squared_error_of_the_blocks_output(aug_loss):
    """Of the block that rounds to nearest, on a quantized stream that has strayed."""
    task = first_block(tiny_model(), "W3A6")
    task.quantized_stream += 0.1 * torch.randn(task.fp_stream.shape, generator=torch.Generator().manual_seed(0))
    targets = [task.fp_output, task.forward(task.quantized_stream, quantized=False)][: 1 + aug_loss]
    grids = OmniQuant(epochs=0, let=False, aug_loss=aug_loss).quantize_block(task)
    for name, linear in task.linears.items():
        linear.weight.copy_(fake_quantize(to_groups(linear.weight, None), grids[name], task.scheme.weight)[:, 0])
    output = task.forward(task.quantized_stream, quantized=True)
    assert task.block_loss == pytest.approx(sum(float((output - x).square().mean()) for x in targets), rel=1e-4)


@pytest.mark.parametrize(("variant", "scheme"), [("llama-gqa-tied", "W4A4KV4"), ("opt", "W4A4KV4"), ("llama", "W3A16")])
def test_training_lowers_the_loss(variant, scheme):
    model_type, overrides = VARIANTS[variant]
    losses = []
    for epochs in (0, 8):
        task = first_block(tiny_model(model_type, **overrides), scheme, samples=16)
        OmniQuant(**{**QUICK, "epochs": epochs}).quantize_block(task)
        losses.append(task.block_loss)
    assert losses[1] < 0.9 * losses[0]


def test_every_vector_is_trained():
    first, last = (
        folded(opt_block("W4A4KV4", samples=16), OmniQuant(**{**QUICK, "epochs": epochs})) for epochs in (0, 4)
    )
    for part, count in (("balance", 4), ("shift", 3), ("clip", 2)):
        before, after = getattr(first, part), getattr(last, part)
        assert before.keys() == after.keys() and len(before) == count
        assert all((after[key] - before[key]).abs().max() > 1e-3 for key in before)


def divergence(method, scheme):
    original = tiny_model()
    model = copy.deepcopy(original)
    quantize(model, scheme, method, calibration(), device="cpu", batch_size=4)
    return evaluate(model, random_tokens(16, 32, seed=99), original, batch_size=8).kl


def test_each_part_is_worth_something_on_outlier_channels():
    full, let, lwc, rtn = (
        divergence(method, "W3A6")
        for method in (OmniQuant(**QUICK), OmniQuant(**QUICK, lwc=False), OmniQuant(**QUICK, let=False), "rtn")
    )
    assert full < 0.7 * rtn and let < 0.8 * rtn and lwc < rtn


def test_inputs_that_are_not_finite_leave_finite_weights():
    for task in (first_block(tiny_model(), "W4A4"), opt_block()):
        messages = []
        task.report = lambda message, loss, messages=messages: messages.append(message)
        task.fp_stream[0, 0, 0] = math.inf
        grids = OmniQuant().quantize_block(task)
        assert all(parameter.isfinite().all() for parameter in task.block.parameters())
        assert all(grid.scale.isfinite().all() for grid in grids.values())
        assert sum("not finite" in message for message in messages) == 4  # three pairs and the loss


@pytest.mark.parametrize("options", [{"epochs": -1}, {"alpha": 1.1}, {"alpha": math.nan}])
def test_impossible_options_are_refused(options):
    with pytest.raises(AbqError, match="epochs must be >= 0"):
        method_by_name("omniquant", **options)
