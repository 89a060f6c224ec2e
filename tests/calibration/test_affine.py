import pytest
import torch

from abq_llm.architectures import LinearPair, NormPair, QueryKeyPair, ValueOutputPair
from abq_llm.calibration.affine import (
    DOMINANCE,
    can_shift,
    dominant,
    initial_shift,
    inverse,
    mix,
    mixed_heads,
    shift,
    storable_shift,
)
from abq_llm.calibration.block import input_statistics
from abq_llm.calibration.transforms import apply, block_parameters, consumers, spread
from tests.blocks import first_block, name_of, rows_of
from tests.tiny import VARIANTS, tiny_model


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def task(request):
    model_type, overrides = request.param
    return first_block(tiny_model(model_type, **overrides))


@pytest.fixture
def opt():
    return first_block(tiny_model("opt", **VARIANTS["opt"][1]))


def random(*shape, std=0.5, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


@torch.no_grad()
def change(task, parameters):
    """How far the block's output moves with other parameters, relative to its size."""
    output = task.forward(task.fp_stream, parameters, quantized=False)
    return float((output - task.fp_output).norm() / task.fp_output.norm())


@pytest.fixture(params=["opt", "falcon"])
def biased(request):
    """A block whose norms and linears have biases: q, k, v of falcon are one linear."""
    model_type, overrides = VARIANTS[request.param]
    return first_block(tiny_model(model_type, **overrides))


def shifted_pairs(task):
    return [pair for pair in task.architecture.pairs if can_shift(pair, block_parameters(task.block))]


def mixed_pairs(task):
    heads = {pair: mixed_heads(pair, block_parameters(task.block), task.head_dim) for pair in task.architecture.pairs}
    return {pair: count for pair, count in heads.items() if count}


def producer(pair):
    return pair.norm if isinstance(pair, NormPair) else pair.value


def channels(task, pair):
    return len(rows_of(task.block, producer(pair)))


def changed_rows(before, after):
    """Parameters that are not the same in both, and the rows that are not."""
    return {
        name: (after[name] != x).flatten(1).any(1).nonzero().flatten().tolist()
        if x.dim() == 2
        else (after[name] != x).nonzero().flatten().tolist()
        for name, x in before.items()
        if not torch.equal(after[name], x)
    }


def test_shifts_need_a_bias_on_both_sides(task):
    pairs = [pair for pair in task.architecture.pairs if isinstance(pair, NormPair | ValueOutputPair)]
    if all(linear.bias is not None for linear in task.linears.values()):  # opt, and falcon with biases
        assert shifted_pairs(task) == pairs and len(pairs) >= 2
    else:
        assert not shifted_pairs(task)  # no norm has a bias, or no linear, and of values and outputs at most the former


def test_no_shift_passes_a_norm_that_feeds_more_than_linears():
    parameters = {f"{name}.bias": torch.zeros(4) for name in ("norm", "linear", "router")}
    assert can_shift(NormPair("norm", ("linear",)), parameters)
    assert not can_shift(NormPair("norm", ("linear",), kept=("router",)), parameters)


@torch.no_grad()
def test_the_block_computes_the_same_when_shifted(biased):
    for seed, pair in enumerate(shifted_pairs(biased)):
        before = block_parameters(biased.block)
        kept = {name: tensor.clone() for name, tensor in before.items()}
        after = shift(pair, before, random(channels(biased, pair), seed=seed), biased.head_dim)
        assert change(biased, after) < 2e-6
        changed = changed_rows(kept, after)
        source = f"{name_of(producer(pair))}.bias"
        assert changed.keys() == {source, *(f"{name}.bias" for name in consumers(pair))}
        assert changed[source] == rows_of(biased.block, producer(pair))
        assert all(torch.equal(before[name], kept[name]) for name in kept)  # nothing was written in place
        assert change(biased, {**after, source: before[source]}) > 1e-3


@torch.no_grad()
def test_shifts_and_scales_are_undone_by_their_opposites(biased):
    before = block_parameters(biased.block)
    for pair in shifted_pairs(biased):
        delta, log_scale = random(channels(biased, pair)), random(channels(biased, pair), seed=1)
        there = apply(pair, shift(pair, before, delta, biased.head_dim), log_scale, biased.head_dim)
        back = shift(pair, apply(pair, there, -log_scale, biased.head_dim), -delta, biased.head_dim)
        torch.testing.assert_close(back, before, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_shift_starts_in_the_middle_of_the_range(opt):
    inputs = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
        for name, linear in opt.linears.items()
    ]
    opt.forward(opt.fp_stream, quantized=False)
    for hook in hooks:
        hook.remove()
    statistics = input_statistics(opt, opt.fp_stream)
    for pair in shifted_pairs(opt):
        x = inputs[consumers(pair)[0]]
        delta = initial_shift(pair, block_parameters(opt.block), statistics.high, statistics.low, opt.head_dim)
        torch.testing.assert_close(delta, (x.amax(0) + x.amin(0)) / 2)
        assert (x - delta).abs().amax() < x.abs().amax()


def test_query_heads_that_share_a_value_head_share_its_shift():
    task = first_block(tiny_model("llama", num_key_value_heads=2, attention_bias=True))
    (pair,) = shifted_pairs(task)
    high, low = random(64, seed=1).abs(), -random(64, seed=2).abs()
    delta = initial_shift(pair, block_parameters(task.block), {pair.output: high}, {pair.output: low}, 16)
    heads = [(high[h * 16 : h * 16 + 16], low[h * 16 : h * 16 + 16]) for h in range(4)]
    expected = [
        (torch.maximum(heads[h][0], heads[h + 1][0]) + torch.minimum(heads[h][1], heads[h + 1][1])) / 2 for h in (0, 2)
    ]
    torch.testing.assert_close(delta, torch.cat(expected))
    assert change(task, shift(pair, block_parameters(task.block), delta, 16)) < 2e-6
    high[3] = torch.inf
    delta = initial_shift(pair, block_parameters(task.block), {pair.output: high}, {pair.output: low}, 16)
    assert delta[3] == 0 and delta.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_storable_shift_leaves_a_norm_bias_that_the_dtype_holds(opt, dtype):
    parameters = block_parameters(opt.block)
    for pair in shifted_pairs(opt):
        delta, log_scale = random(channels(opt, pair)), random(channels(opt, pair), seed=1)
        storable = storable_shift(pair, parameters, delta, log_scale, dtype)
        if isinstance(pair, ValueOutputPair):
            assert storable is delta
            continue
        name = f"{pair.norm}.bias"
        after, rounded = (
            apply(pair, shift(pair, parameters, x, opt.head_dim), log_scale, opt.head_dim) for x in (storable, delta)
        )
        stored = after[name].to(dtype).float()
        torch.testing.assert_close(after[name], stored, rtol=1e-6, atol=1e-6)
        assert (storable - delta).abs().max() < 0.02
        assert change(opt, {**after, name: stored}) < 2e-6
        assert change(opt, {**rounded, name: rounded[name].to(dtype).float()}) > 1e-5


def test_matrices_go_where_nothing_but_heads_lies_between(task):
    rotary = task.call.get("position_embeddings") is not None and task.call.get("alibi") is None
    kinds = {type(pair) for pair in mixed_pairs(task)}
    assert kinds == ({ValueOutputPair} if rotary else {ValueOutputPair, QueryKeyPair})
    (value,) = (pair.value for pair in mixed_pairs(task) if isinstance(pair, ValueOutputPair))
    assert set(mixed_pairs(task).values()) == {len(rows_of(task.block, value)) // task.head_dim}


@torch.no_grad()
def test_the_block_computes_the_same_when_mixed(task):
    d = task.head_dim
    for pair, heads in mixed_pairs(task).items():
        before = block_parameters(task.block)
        kept = {name: tensor.clone() for name, tensor in before.items()}
        after = mix(pair, before, random(heads, d, d))
        assert change(task, after) < 2e-6
        ends = (pair.value, pair.output) if isinstance(pair, ValueOutputPair) else (pair.key, pair.query)
        rows = {}
        for part in ends:
            rows.setdefault(f"{name_of(part)}.weight", []).extend(rows_of(task.block, part))
        changed = changed_rows(kept, after)
        assert {name: sorted(part) for name, part in rows.items()} == {name: changed[name] for name in rows}
        assert {name.rpartition(".")[0] for name in changed} == {*map(name_of, ends)}
        assert all(torch.equal(before[name], kept[name]) for name in kept)
        for part in ends:
            name = f"{name_of(part)}.weight"
            undone = after[name].clone()
            undone[rows_of(task.block, part)] = before[name][rows_of(task.block, part)]
            assert change(task, {**after, name: undone}) > 1e-3


@torch.no_grad()
def test_a_matrix_between_rotated_queries_and_keys_would_change_the_block():
    task = first_block(tiny_model())
    (pair,) = (pair for pair in task.architecture.pairs if isinstance(pair, QueryKeyPair))
    assert change(task, mix(pair, block_parameters(task.block), random(4, 16, 16))) > 1e-2


@torch.no_grad()
def test_a_mixed_block_is_mixed_back_by_the_inverse(task):
    d = task.head_dim
    for pair, heads in mixed_pairs(task).items():
        before = block_parameters(task.block)
        P = random(heads, d, d, std=0.02)
        there = mix(pair, before, P)
        back = mix(pair, there, inverse(dominant(P)) - torch.eye(d))
        torch.testing.assert_close(back, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("std", [0.0, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("d", [2, 16, 128])
def test_whatever_is_learned_has_an_inverse(d, std):
    matrix = dominant(random(3, d, d, std=std))
    off_diagonal = matrix - torch.eye(d)
    assert (off_diagonal.abs().sum(-1) <= DOMINANCE * (1 + 1e-5)).all()
    expected = torch.linalg.inv(matrix.double())
    assert (inverse(matrix) - expected).abs().max() < 1e-6
    worst = torch.eye(d) - DOMINANCE * torch.ones(d, d) / d  # the slowest series: all of one sign, eigenvalue 0.1
    torch.testing.assert_close(inverse(worst), torch.linalg.inv(worst.double()).float(), rtol=1e-5, atol=1e-5)


def test_small_matrices_are_left_as_they_are():
    P = random(2, 16, 16, std=0.01)
    torch.testing.assert_close(dominant(P), torch.eye(16) + P)


def test_gradients_are_finite_where_the_matrix_starts_and_where_it_is_limited(task):
    d = task.head_dim
    for pair, heads in mixed_pairs(task).items():
        for P in (torch.zeros(heads, d, d), random(heads, d, d, std=10.0)):
            P.requires_grad_()
            output = task.forward(task.fp_stream, mix(pair, block_parameters(task.block), P), quantized=True)
            output.square().sum().backward()
            assert P.grad.isfinite().all() and P.grad.abs().max() > 0


def test_linear_pairs_take_scales_only(task):
    parameters = block_parameters(task.block)
    for pair in task.architecture.pairs:
        if isinstance(pair, LinearPair):
            assert not can_shift(pair, parameters) and mixed_heads(pair, parameters, task.head_dim) == 0


@torch.no_grad()
def test_scale_and_matrix_together_are_the_affine_matrix():
    """x' = A^-1 x and W' = W A with A = diag(s) (I + P), written out for each head."""
    task = first_block(tiny_model("qwen2", num_key_value_heads=2))
    (pair,) = mixed_pairs(task)
    before, d = block_parameters(task.block), task.head_dim
    log_s, P = random(2 * d), random(2, d, d, std=0.02)
    after = mix(pair, apply(pair, before, log_s, d), P)
    for h in range(4):
        kv = h // 2
        A = torch.diag(log_s[kv * d : kv * d + d].exp()) @ (torch.eye(d) + P[kv])
        rows, columns = slice(kv * d, kv * d + d), slice(h * d, h * d + d)
        for part in ("weight", "bias"):
            old, new = (p[f"{pair.value}.{part}"][rows] for p in (before, after))
            torch.testing.assert_close(A @ new, old, rtol=1e-4, atol=1e-5)
        old, new = (p[f"{pair.output}.weight"][:, columns] for p in (before, after))
        torch.testing.assert_close(new, old @ A, rtol=1e-4, atol=1e-5)
    assert torch.equal(spread(log_s, 4 * d, d)[:d], log_s[:d])
