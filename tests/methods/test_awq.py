import copy
import math

import pytest
import torch

from abq_llm.calibration.block import input_statistics
from abq_llm.calibration.transforms import block_parameters, consumers, spread
from abq_llm.errors import AbqError
from abq_llm.evaluation import evaluate
from abq_llm.methods import awq, method_by_name
from abq_llm.methods.awq import Awq, activation_log_scale, inputs, scaled_error, search_clip
from abq_llm.quantize import quantize
from abq_llm.quantizers import choose_qparams, fake_quantize, from_groups, to_groups
from tests.blocks import calibration, first_block, random_tokens
from tests.tiny import VARIANTS, tiny_model

SCHEMES = ["W3A16g32", "W4A8", "W2*A4g48"]


@pytest.fixture(params=VARIANTS)
def task(request):
    model_type, overrides = VARIANTS[request.param]
    return first_block(tiny_model(model_type, **overrides), "W3A16g32")


def scaling_pairs(task):
    return [pair for pair in task.architecture.pairs if consumers(pair)]


@torch.no_grad()
def test_the_inputs_are_those_of_the_linears(task):
    X, s_X = inputs(task, 10**6)
    energy = input_statistics(task, task.fp_stream).energy
    experts = [name for name in X if "experts" in name]  # each gets some of the tokens, and each token goes to two
    for name, linear in task.linears.items():
        assert X[name].shape[1] == linear.in_features and (len(X[name]) == 128 or name in experts)
        torch.testing.assert_close(X[name].square().mean(0), energy[name])
        torch.testing.assert_close(X[name].abs().sum(0) / 128, s_X[name])
    assert sum(len(X[name]) for name in experts) == (3 * 256 if experts else 0)
    few, mean = inputs(task, 7)
    assert all(len(few[name]) <= 7 if name in experts else len(few[name]) == 7 for name in few)
    assert all(torch.equal(mean[name], s_X[name]) for name in mean)


@torch.no_grad()
def test_scales_follow_the_formula(task):
    _, s_X = inputs(task, 8)
    for pair in scaling_pairs(task):
        log_s = activation_log_scale(task, pair, s_X, 0.5)
        act = sum(s_X[name] for name in consumers(pair))
        assert abs(float(log_s.mean())) < 1e-6
        if len(log_s) != len(act):  # neighbouring heads share a value head: 0, 1 the first, 2, 3 the second, or all one
            heads = act.view(4, task.head_dim)
            act = torch.cat([sum(group) for group in heads.split(len(act) // len(log_s))])
        expected = act.sqrt()
        torch.testing.assert_close(log_s.exp(), expected / expected.log().mean().exp(), rtol=1e-4, atol=1e-6)
        assert not activation_log_scale(task, pair, s_X, 0.0).any()


@torch.no_grad()
def test_the_error_is_that_of_the_outputs(task):
    X, s_X = inputs(task, 64)
    parameters = block_parameters(task.block)
    for pair in scaling_pairs(task):
        log_s, expected = activation_log_scale(task, pair, s_X, 0.4), 0.0
        for name in consumers(pair):
            W = parameters[f"{name}.weight"]
            s = spread(log_s, W.shape[1], task.head_dim).exp()
            groups = to_groups(W * s, 32)
            grid = choose_qparams(groups, task.scheme.weight, scale_dtype=torch.float16)
            Q = from_groups(fake_quantize(groups, grid, task.scheme.weight), W.shape[1])
            expected += float(((X[name] @ (Q / s - W).T).norm() / (X[name] @ W.T).norm()) ** 2)
        assert scaled_error(task, pair, parameters, X, log_s) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_search_is_never_worse_than_no_scale(scheme):
    task = first_block(tiny_model(num_key_value_heads=2), scheme)
    X, s_X = inputs(task, 128)
    parameters, gains = block_parameters(task.block), []
    for pair in scaling_pairs(task):
        found = Awq().search_scale(task, pair, parameters, X, s_X)
        none = activation_log_scale(task, pair, s_X, 0.0)
        error = [scaled_error(task, pair, parameters, X, log_s) for log_s in (found, none)]
        assert error[0] <= error[1]
        gains.append(error[0] < error[1])
    assert any(gains)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_clip_is_never_worse_than_none(scheme):
    task = first_block(tiny_model(), scheme)
    X, fmt, size = inputs(task, 64)[0], task.scheme.weight, task.scheme.group_size
    gain = 0.0
    for name, linear in task.linears.items():
        W, x = linear.weight.detach(), to_groups(X[name], size)
        w, errors = to_groups(W, size), []
        for ratios in ([1.0], [1 - step / 20 for step in range(11)]):
            gap = fake_quantize(w, search_clip(task, W, X[name], ratios), fmt) - w
            errors.append(torch.einsum("tgi,ngi->tng", x, gap).square().sum(0))
        plain = choose_qparams(w, fmt, scale_dtype=torch.float16)
        assert all(map(torch.equal, search_clip(task, W, X[name], [1.0]), plain))
        if task.scheme.activation is None:
            assert (errors[1] <= errors[0] * (1 + 1e-3) + 1e-6).all()
        gain += float(errors[0].sum() - errors[1].sum())
    assert gain > 0


def test_with_both_searches_off_it_is_round_to_nearest():
    models = [tiny_model(), tiny_model()]
    for model, method in zip(models, (Awq(scaling=False, clipping=False), "rtn"), strict=True):
        quantize(model, "W3A8g32", method, calibration(), device="cpu", batch_size=4)
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_quantizers_the_block_computes_the_same(task):
    expected = task.fp_output.clone()
    before = block_parameters(copy.deepcopy(task.block))
    Awq().quantize_block(task)
    assert (task.forward_stream(task.fp_stream, quantized=False) - expected).norm() < 5e-6 * expected.norm()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in block_parameters(task.block).items())


def divergence(method, scheme):
    original = tiny_model()
    model = copy.deepcopy(original)
    quantize(model, scheme, method, calibration(), device="cpu", batch_size=4)
    return evaluate(model, random_tokens(16, 32, seed=99), original, batch_size=8).kl


def test_it_beats_round_to_nearest_on_outlier_channels():
    full, scales, clips, rtn = (
        divergence(method, "W3A16g32") for method in ("awq", Awq(clipping=False), Awq(scaling=False), "rtn")
    )
    assert full < 0.75 * rtn and scales < rtn and clips < rtn


def test_errors_that_are_not_finite_leave_the_block_unscaled(monkeypatch):
    monkeypatch.setattr(awq, "scaled_error", lambda *args: torch.tensor(math.nan))
    task = first_block(tiny_model(), "W3A16g32")
    before = block_parameters(copy.deepcopy(task.block))
    Awq().quantize_block(task)
    torch.testing.assert_close(block_parameters(task.block), before, rtol=1e-6, atol=1e-7)


def test_inputs_that_are_not_finite_leave_finite_weights():
    messages = []
    task = first_block(tiny_model(), "W3A16g32", report=lambda message, loss: messages.append(message))
    task.fp_stream[0, 0, 0] = math.inf
    grids = Awq().quantize_block(task)
    assert all(parameter.isfinite().all() for parameter in task.block.parameters())
    assert all(grid.scale.isfinite().all() for grid in grids.values())
    assert len(messages) == 4 and all("not finite" in message for message in messages)


@pytest.mark.parametrize("options", [{"grid": 0}, {"tokens": 0}, {"max_shrink": 1.0}, {"max_shrink": math.nan}])
def test_impossible_options_are_refused(options):
    with pytest.raises(AbqError, match="grid and tokens"):
        method_by_name("awq", **options)
