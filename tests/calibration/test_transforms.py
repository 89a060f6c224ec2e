import math

import pytest
import torch

from abq_llm.architectures import LinearPair, NormPair, QueryKeyPair, ValueOutputPair
from abq_llm.calibration.block import input_statistics
from abq_llm.calibration.transforms import (
    LOG_LIMIT,
    apply,
    block_parameters,
    consumers,
    initial_log_scale,
    storable_log_scale,
)
from tests.blocks import first_block
from tests.tiny import VARIANTS, tiny_model

KINDS = [NormPair, LinearPair, ValueOutputPair, QueryKeyPair]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def task(request):
    model_type, overrides = request.param
    return first_block(tiny_model(model_type, **overrides))


def random_log_scale(task, pair, std=0.5, seed=0):
    d = task.head_dim
    linears = {name: linear.weight.shape for name, linear in task.linears.items()}
    if isinstance(pair, QueryKeyPair):
        shape = (task.block.get_submodule(pair.key).weight.shape[0] // d, d // 2 if pair.rotary else d)
    elif isinstance(pair, ValueOutputPair):
        shape = (linears[pair.value][0],)
    else:
        shape = (linears[consumers(pair)[0]][1],)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


@torch.no_grad()
def change(task, parameters):
    """How far the block's output moves with other parameters, relative to its size."""
    output = task.forward(task.fp_stream, parameters, quantized=False)
    return float((output - task.fp_output).norm() / task.fp_output.norm())


def pairs_of(task, kind):
    found = [pair for pair in task.architecture.pairs if isinstance(pair, kind)]
    assert found
    return found


@kinds
def test_the_block_computes_the_same(task, kind):
    for pair in pairs_of(task, kind):
        before = block_parameters(task.block)
        kept = {name: tensor.clone() for name, tensor in before.items()}
        after = apply(pair, before, random_log_scale(task, pair), task.head_dim)
        assert change(task, after) < 2e-6
        touched = {name.rpartition(".")[0] for name in after if not torch.equal(after[name], kept[name])}
        producers = {NormPair: "norm", LinearPair: "producer", ValueOutputPair: "value", QueryKeyPair: "key"}
        expected = {getattr(pair, producers[kind]), *consumers(pair), *([pair.query] if kind is QueryKeyPair else [])}
        assert touched == expected
        assert all(torch.equal(before[name], kept[name]) for name in kept)  # nothing was written in place
        assert kind is NormPair or all(
            after[f"{name}.bias"].ne(kept[f"{name}.bias"]).any() for name in biased(task, pair)
        )


def biased(task, pair):
    """The linears whose rows the pair scales and which have a bias: it is scaled with them."""
    rows = [getattr(pair, name, None) for name in ("producer", "value", "key", "query")]
    return [name for name in rows if name and getattr(task.block.get_submodule(name), "bias", None) is not None]


def test_all_pairs_together_compute_the_same(task):
    parameters = block_parameters(task.block)
    for seed, pair in enumerate(task.architecture.pairs):
        parameters = apply(pair, parameters, random_log_scale(task, pair, seed=seed), task.head_dim)
    assert change(task, parameters) < 5e-6


@kinds
def test_a_scale_left_out_on_one_side_would_change_it(task, kind):
    """The block is not blind to what the tests above call unchanged."""
    for pair in pairs_of(task, kind):
        before = block_parameters(task.block)
        after = apply(pair, before, random_log_scale(task, pair), task.head_dim)
        side = f"{consumers(pair)[-1] if consumers(pair) else pair.query}.weight"
        assert change(task, {**after, side: before[side]}) > 1e-3


def scale_queries_and_keys(task, pair, scale):
    """Rows of the queries * scale, of the keys / scale; scale [kv_heads, d], one for each channel."""
    parameters = block_parameters(task.block)
    repeats = parameters[f"{pair.query}.weight"].shape[0] // scale.numel()
    for name, factor in ((pair.key, 1 / scale), (pair.query, scale.repeat_interleave(repeats, 0))):
        for part in ("weight", "bias"):
            if f"{name}.{part}" in parameters:
                old = parameters[f"{name}.{part}"]
                parameters[f"{name}.{part}"] = (old.view(factor.numel(), -1) * factor.view(-1, 1)).view(old.shape)
    return parameters


def test_under_rope_the_scales_of_a_rotated_pair_must_be_equal(task):
    (pair,) = pairs_of(task, QueryKeyPair)
    if not pair.rotary:
        assert change(task, scale_queries_and_keys(task, pair, random_log_scale(task, pair).exp())) < 2e-6
        return
    half = random_log_scale(task, pair).exp()
    assert change(task, scale_queries_and_keys(task, pair, torch.cat([half, half], 1))) < 2e-6
    other = random_log_scale(task, pair, seed=1).exp()
    assert change(task, scale_queries_and_keys(task, pair, torch.cat([half, other], 1))) > 1e-2
    neighbours = half.repeat_interleave(2, 1)  # (0, 1), (2, 3), ... turn together in other models, not in these
    assert change(task, scale_queries_and_keys(task, pair, neighbours)) > 1e-2
    applied = apply(pair, block_parameters(task.block), half.log(), task.head_dim)
    expected = scale_queries_and_keys(task, pair, torch.cat([half, half], 1))
    torch.testing.assert_close(applied, expected)


@kinds
def test_apply_is_differentiable_and_limited(task, kind):
    pair = pairs_of(task, kind)[0]
    log_scale = random_log_scale(task, pair).requires_grad_()
    output = task.forward(
        task.fp_stream, apply(pair, block_parameters(task.block), log_scale, task.head_dim), quantized=True
    )
    output.square().sum().backward()
    assert log_scale.grad.isfinite().all() and log_scale.grad.abs().max() > 0
    far = apply(pair, block_parameters(task.block), torch.full_like(log_scale, 1e30), task.head_dim)
    limit = apply(pair, block_parameters(task.block), torch.full_like(log_scale, LOG_LIMIT), task.head_dim)
    torch.testing.assert_close(far, limit, rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in far.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_storable_scale_leaves_a_norm_weight_that_the_dtype_holds(task, dtype):
    for pair in pairs_of(task, NormPair):
        before = block_parameters(task.block)
        name = f"{pair.norm}.weight"
        before[name] = before[name] * torch.linspace(-1.3, 1.7, len(before[name])).to(dtype)  # either sign
        before[name][5] = 0
        log_scale = random_log_scale(task, pair)
        wanted = before[name] / log_scale.exp()
        storable = storable_log_scale(pair, before, log_scale, dtype)
        after = apply(pair, before, storable, task.head_dim)
        stored = after[name].to(dtype).float()
        assert torch.equal(stored, wanted.to(dtype).float())  # the nearest to what was wanted
        torch.testing.assert_close(after[name], stored, rtol=5e-7, atol=0)
        assert (wanted - stored).abs().max() > 1e-5 and (storable - log_scale).abs().max() < 2**-7
        with torch.no_grad():
            original, ours, rounded = (
                task.forward(task.fp_stream, parameters, quantized=False)
                for parameters in (
                    before,
                    {**after, name: stored},
                    {**apply(pair, before, log_scale, task.head_dim), name: stored},
                )
            )
        noise, loss = ((x - original).norm() / original.norm() for x in (ours, rounded))
        assert noise < 2e-6 and loss > 2e-5


def test_storable_scales_are_finite_where_a_weight_vanishes(task):
    pair = pairs_of(task, NormPair)[0]
    before = block_parameters(task.block)
    name = f"{pair.norm}.weight"
    before[name] = torch.full_like(before[name], 2.0**-20)
    before[name][:8] = 0
    log_scale = torch.full_like(before[name], 9.0)  # 2^-20 / e^9 rounds to 0 in fp16
    storable = storable_log_scale(pair, before, log_scale, torch.float16)
    after = apply(pair, before, storable, task.head_dim)
    assert torch.equal(after[name].half().float(), before[name]) and after[name].ne(0).sum() == len(storable) - 8


def test_scales_of_other_pairs_are_storable_as_they_are(task):
    for pair in task.architecture.pairs:
        if set(vars(pair).values()) & set(task.linears):
            log_scale = random_log_scale(task, pair)
            assert storable_log_scale(pair, block_parameters(task.block), log_scale, torch.float16) is log_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_scales_between_norms_of_queries_and_keys_are_stored_exactly(dtype):
    model_type, overrides = VARIANTS["qwen3"]
    task = first_block(tiny_model(model_type, **overrides))
    (pair,) = pairs_of(task, QueryKeyPair)
    names = [f"{pair.query}.weight", f"{pair.key}.weight"]
    before = block_parameters(task.block)
    before |= {name: before[name].to(dtype).float() for name in names}
    log_scale = random_log_scale(task, pair, std=2)
    assert storable_log_scale(pair, before, log_scale, torch.float32) is log_scale
    storable = storable_log_scale(pair, before, log_scale, dtype)
    assert (storable - log_scale).abs().max() <= math.log(2) / 2 + 1e-6 and storable.abs().max() > 1
    after = apply(pair, before, storable, task.head_dim)
    stored = {name: after[name].to(dtype).float() for name in names}
    assert torch.equal(stored[names[0]] * stored[names[1]], before[names[0]] * before[names[1]])
    original, ours = (task.forward(task.fp_stream, p, quantized=False) for p in (before, {**after, **stored}))
    assert (ours - original).norm() < 2e-6 * original.norm()


def naive_log_scale(pair, parameters, peaks, d, alpha):
    """One channel at a time, in Python numbers."""

    def column(name, k):
        return max(abs(w) for w in parameters[f"{name}.weight"][:, k].tolist())

    acts, weights = [], []
    if isinstance(pair, QueryKeyPair):
        queries, keys = (peaks[f"{name}.output"].tolist() for name in (pair.query, pair.key))
        shared = len(parameters[f"{pair.key}.weight"]) // d  # scales of one head each, or of all heads behind norms
        for head in range(shared):
            for i in range(d // 2 if pair.rotary else d):
                together = (i, i + d // 2) if pair.rotary else (i,)
                for channels, peak in ((acts, keys), (weights, queries)):
                    served = len(peak) // d // shared
                    heads = range(head * served, (head + 1) * served)
                    channels.append(max(peak[h * d + j] for h in heads for j in together))
    elif isinstance(pair, ValueOutputPair):
        peak, size = peaks[pair.output].tolist(), parameters[f"{pair.value}.weight"].shape[0]
        group = len(peak) // size
        for channel in range(size):
            served = [((channel // d) * group + h) * d + channel % d for h in range(group)]
            acts.append(max(peak[k] for k in served))
            weights.append(max(column(pair.output, k) for k in served))
    else:
        names = consumers(pair)
        acts = peaks[names[0]].tolist()
        weights = [max(column(name, k) for name in names) for k in range(len(acts))]
    logs = [math.log(act**alpha / weight ** (1 - alpha)) for act, weight in zip(acts, weights, strict=True)]
    return [log - sum(logs) / len(logs) for log in logs]


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
@kinds
def test_the_start_is_smoothquants_formula(task, kind, alpha):
    parameters = block_parameters(task.block)
    peaks = input_statistics(task, task.fp_stream).peak
    for pair in pairs_of(task, kind):
        start = initial_log_scale(pair, parameters, peaks, task.head_dim, alpha)
        assert start.shape == random_log_scale(task, pair).shape
        expected = naive_log_scale(pair, parameters, peaks, task.head_dim, alpha)
        torch.testing.assert_close(start.flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert change(task, apply(pair, parameters, start, task.head_dim)) < 2e-6


def test_a_dead_channel_has_a_finite_start(task):
    pair = pairs_of(task, NormPair)[0]
    parameters = block_parameters(task.block)
    for name in pair.linears:
        parameters[f"{name}.weight"] = parameters[f"{name}.weight"].clone()
        parameters[f"{name}.weight"][:, 3] = 0
    peaks = {name: torch.zeros(64) for name in pair.linears}
    for alpha in (0.0, 0.5, 1.0):
        assert initial_log_scale(pair, parameters, peaks, task.head_dim, alpha).isfinite().all()


@torch.no_grad()
def test_statistics_are_those_of_the_inputs(task):
    inputs = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
        for name, linear in task.linears.items()
    ]
    task.forward(task.fp_stream, quantized=False)
    for hook in hooks:
        hook.remove()
    statistics = input_statistics(task, task.fp_stream)
    for name, x in inputs.items():
        torch.testing.assert_close(statistics.peak[name], x.abs().amax(0))
        torch.testing.assert_close(statistics.energy[name], x.square().mean(0))
