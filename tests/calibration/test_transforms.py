import math

import pytest
import torch

from abq_llm.architectures import LinearPair, NormPair, QueryKeyPair, ValueOutputPair, architecture_of
from abq_llm.calibration.block import input_statistics
from abq_llm.calibration.transforms import (
    LOG_LIMIT,
    apply,
    block_parameters,
    consumers,
    initial_log_scale,
    storable_log_scale,
)
from tests.blocks import first_block, name_of, rows_of
from tests.tiny import VARIANTS, tiny_config, tiny_model


def task_of(variant):
    model_type, overrides = VARIANTS[variant]
    return first_block(tiny_model(model_type, **overrides))


@pytest.fixture(params=VARIANTS)
def task(request):
    return task_of(request.param)


KINDS_OF = {
    variant: dict.fromkeys(type(pair) for pair in architecture_of(tiny_config(model_type, **overrides)).pairs)
    for variant, (model_type, overrides) in VARIANTS.items()
}


@pytest.fixture(
    params=[(variant, kind) for variant, kinds in KINDS_OF.items() for kind in kinds],
    ids=lambda case: f"{case[0]}-{case[1].__name__}",
)
def case(request):
    """(task, kind): every kind of pair that the block of a variant has."""
    variant, kind = request.param
    return task_of(variant), kind


def random_log_scale(task, pair, std=0.5, seed=0):
    d = task.head_dim
    if isinstance(pair, QueryKeyPair):
        shape = len(rows_of(task.block, pair.key)) // d, d - int(d * pair.rotary) // 2
    elif isinstance(pair, ValueOutputPair):
        shape = (len(rows_of(task.block, pair.value)),)
    else:
        shape = (task.linears[consumers(pair)[0]].in_features,)
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


def producers(pair):
    """The parts whose rows, or whose weight of a norm, the scale changes."""
    names = {NormPair: ["norm"], LinearPair: ["producer"], ValueOutputPair: ["value"], QueryKeyPair: ["query", "key"]}
    return [getattr(pair, name) for name in names[type(pair)]]


def test_the_block_computes_the_same(case):
    task, kind = case
    for pair in pairs_of(task, kind):
        before = block_parameters(task.block)
        kept = {name: tensor.clone() for name, tensor in before.items()}
        after = apply(pair, before, random_log_scale(task, pair), task.head_dim)
        assert change(task, after) < 2e-6
        touched = {name.rpartition(".")[0] for name in after if not torch.equal(after[name], kept[name])}
        assert touched == {*map(name_of, producers(pair)), *consumers(pair), *getattr(pair, "kept", ())}
        assert all(torch.equal(before[name], kept[name]) for name in kept)  # nothing was written in place


def test_only_the_rows_of_a_part_are_scaled_and_their_bias_with_them(case):
    task, kind = case
    for pair in pairs_of(task, kind):
        before = block_parameters(task.block)
        after = apply(pair, before, random_log_scale(task, pair), task.head_dim)
        for name in {*map(name_of, producers(pair))}:
            rows = {row for part in producers(pair) if name_of(part) == name for row in rows_of(task.block, part)}
            for tensor in [f"{name}.{kind}" for kind in ("weight", "bias") if f"{name}.{kind}" in before]:
                changed = (after[tensor] != before[tensor]).view(len(after[tensor]), -1).any(1)
                assert {*changed.nonzero().flatten().tolist()} == rows


def test_all_pairs_together_compute_the_same(task):
    parameters = block_parameters(task.block)
    for seed, pair in enumerate(task.architecture.pairs):
        parameters = apply(pair, parameters, random_log_scale(task, pair, seed=seed), task.head_dim)
    assert change(task, parameters) < 5e-6


def test_a_scale_left_out_on_one_side_would_change_it(case):
    """The block is not blind to what the tests above call unchanged."""
    task, kind = case
    for pair in pairs_of(task, kind):
        before = block_parameters(task.block)
        after = apply(pair, before, random_log_scale(task, pair), task.head_dim)
        if kind is QueryKeyPair:
            side, rows = f"{name_of(pair.query)}.weight", rows_of(task.block, pair.query)
            after[side] = after[side].index_copy(0, torch.tensor(rows), before[side][rows])
            assert change(task, after) > 1e-3
            continue
        for name in (*consumers(pair), *getattr(pair, "kept", ())):
            assert change(task, {**after, f"{name}.weight": before[f"{name}.weight"]}) > 1e-3


def scale_queries_and_keys(task, pair, scale):
    """Rows of the queries * scale, of the keys / scale; scale [kv_heads, d], one for each channel."""
    parameters = {name: tensor.clone() for name, tensor in block_parameters(task.block).items()}
    repeats = len(rows_of(task.block, pair.query)) // scale.numel()
    for part, factor in ((pair.key, 1 / scale), (pair.query, scale.repeat_interleave(repeats, 0))):
        for row, value in zip(rows_of(task.block, part), factor.flatten(), strict=True):
            for kind in ("weight", "bias"):
                if f"{name_of(part)}.{kind}" in parameters:
                    parameters[f"{name_of(part)}.{kind}"][row] *= value
    return parameters


@pytest.mark.parametrize("variant", [variant for variant, kinds in KINDS_OF.items() if QueryKeyPair in kinds])
def test_under_rope_the_scales_of_a_rotated_pair_must_be_equal(variant):
    task = task_of(variant)
    (pair,) = pairs_of(task, QueryKeyPair)
    half = int(task.head_dim * pair.rotary) // 2
    first, others = random_log_scale(task, pair).exp().split([half, task.head_dim - 2 * half], 1)
    expected = scale_queries_and_keys(task, pair, torch.cat([first, first, others], 1))
    assert change(task, expected) < 2e-6
    applied = apply(pair, block_parameters(task.block), torch.cat([first, others], 1).log(), task.head_dim)
    torch.testing.assert_close(applied, expected)
    if half:
        second = random_log_scale(task, pair, seed=1).exp()[:, :half]
        assert change(task, scale_queries_and_keys(task, pair, torch.cat([first, second, others], 1))) > 1e-2
        neighbours = first.repeat_interleave(2, 1)  # (0, 1), (2, 3), ... turn together in other models, not in these
        assert change(task, scale_queries_and_keys(task, pair, torch.cat([neighbours, others], 1))) > 1e-2


def test_apply_is_differentiable_and_limited(case):
    task, kind = case
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
        if pair.kept:
            continue  # see below
        before, shift = block_parameters(task.block), pair.offset
        name = f"{pair.norm}.weight"
        either_sign = (before[name] + shift) * torch.linspace(-1.3, 1.7, len(before[name]))
        before[name] = (either_sign - shift).to(dtype).float()
        before[name][5] = -shift
        log_scale = random_log_scale(task, pair)
        wanted = (before[name] + shift) / log_scale.exp() - shift
        storable = storable_log_scale(pair, before, log_scale, dtype)
        after = apply(pair, before, storable, task.head_dim)
        stored = after[name].to(dtype).float()
        assert torch.equal(stored, wanted.to(dtype).float())  # the nearest to what was wanted
        torch.testing.assert_close(after[name] + shift, stored + shift, rtol=5e-7, atol=2e-7 * shift)
        assert (wanted - stored).abs().max() > 1e-5 and (shift or (storable - log_scale).abs().max() < 2**-7)
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


@torch.no_grad()
def test_what_also_feeds_floating_point_moves_by_powers_of_two():
    """A router reads the norm of its experts: its columns must be stored without rounding too."""
    task = task_of("mixtral")
    (pair,) = (pair for pair in pairs_of(task, NormPair) if pair.kept)
    names = [f"{name}.weight" for name in (pair.norm, *pair.kept)]
    before = block_parameters(task.block)
    before |= {name: before[name].bfloat16().float() for name in names}
    log_scale = random_log_scale(task, pair, std=2)
    storable = storable_log_scale(pair, before, log_scale, torch.bfloat16)
    assert (storable - log_scale).abs().max() <= math.log(2) / 2 + 1e-6 and storable.abs().max() > 1

    def stored(log_scale):
        after = apply(pair, before, log_scale, task.head_dim)
        return after | {name: after[name].bfloat16().float() for name in names}

    original, ours, rounded = (
        task.forward(task.fp_stream, parameters, quantized=False)
        for parameters in (before, stored(storable), stored(log_scale))
    )
    assert (ours - original).norm() < 2e-6 * original.norm()
    assert (rounded - original).norm() > 1e-3 * original.norm()


def test_storable_scales_are_finite_where_a_weight_vanishes(task):
    pair = pairs_of(task, NormPair)[0]
    before = block_parameters(task.block)
    name = f"{pair.norm}.weight"
    before[name] = torch.full_like(before[name], 2.0**-20 - pair.offset)
    before[name][:8] = -pair.offset
    log_scale = torch.full_like(before[name], 9.0)  # 2^-20 / e^9 rounds to 0 in fp16
    storable = storable_log_scale(pair, before, log_scale, torch.float16)
    after = apply(pair, before, storable, task.head_dim)
    assert storable.isfinite().all() and torch.equal(after[name].half(), before[name].half())
    assert pair.offset or after[name].ne(0).sum() == len(storable) - 8


def test_scales_of_other_pairs_are_storable_as_they_are(task):
    for pair in task.architecture.pairs:
        if not isinstance(pair, NormPair) and name_of(producers(pair)[0]) in task.linears:
            log_scale = random_log_scale(task, pair)
            assert storable_log_scale(pair, block_parameters(task.block), log_scale, torch.float16) is log_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_scales_between_norms_of_queries_and_keys_are_stored_exactly(dtype):
    task = task_of("qwen3")
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


def naive_log_scale(task, pair, parameters, peaks, alpha):
    """One channel at a time, in Python numbers."""
    d = task.head_dim

    def column(name, k):
        return max(abs(w) for w in parameters[f"{name}.weight"][:, k].tolist())

    acts, weights = [], []
    if isinstance(pair, QueryKeyPair):
        queries, keys = peaks["queries"].tolist(), peaks["keys"].tolist()
        shared = len(rows_of(task.block, pair.key)) // d  # scales of one head each, or of all heads behind norms
        turned = int(d * pair.rotary)
        for head in range(shared):
            for i in [*range(turned // 2), *range(turned, d)]:
                together = (i, i + turned // 2) if i < turned else (i,)
                for channels, peak in ((acts, keys), (weights, queries)):
                    served = len(peak) // d // shared
                    heads = range(head * served, (head + 1) * served)
                    channels.append(max(peak[h * d + j] for h in heads for j in together))
    elif isinstance(pair, ValueOutputPair):
        peak, size = peaks[pair.output].tolist(), len(rows_of(task.block, pair.value))
        group = len(peak) // size
        for channel in range(size):
            served = [((channel // d) * group + h) * d + channel % d for h in range(group)]
            acts.append(max(peak[k] for k in served))
            weights.append(max(column(pair.output, k) for k in served))
    else:
        names = consumers(pair)
        acts = [max(act) for act in zip(*(peaks[name].tolist() for name in names), strict=True)]
        weights = [max(column(name, k) for name in names) for k in range(len(acts))]
    logs = [math.log(act**alpha / weight ** (1 - alpha)) for act, weight in zip(acts, weights, strict=True)]
    return [log - sum(logs) / len(logs) for log in logs]


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_start_is_smoothquants_formula(case, alpha):
    task, kind = case
    parameters = block_parameters(task.block)
    peaks = input_statistics(task, task.fp_stream).peak
    for pair in pairs_of(task, kind):
        start = initial_log_scale(pair, parameters, peaks, task.head_dim, alpha)
        assert start.shape == random_log_scale(task, pair).shape
        expected = naive_log_scale(task, pair, parameters, peaks, alpha)
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
