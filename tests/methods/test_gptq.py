from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import nn

from abq_llm.architectures.table import NormPair
from abq_llm.calibration.experts import experts_shown_all
from abq_llm.calibration.moments import linears_by_input, moments
from abq_llm.calibration.transforms import block_parameters
from abq_llm.errors import AbqError
from abq_llm.linear import QuantLinear
from abq_llm.methods import gptq, method_by_name
from abq_llm.methods.gptq import Gptq, choose_grid, corrected, inverse_factor, round_columns
from abq_llm.quantize import quantize
from abq_llm.quantizers import choose_qparams, fake_quantize, from_groups, to_groups
from abq_llm.scheme import Scheme
from tests.blocks import Watched, calibration, first_block
from tests.tiny import VARIANTS, tiny_model

PAPER = Gptq(act_order=False, mse=False)
SCHEMES = ["W3A16", "W3A16g8", "W4A16g7", "W2*A16g8", "W1A16", "W2A16g100"]  # 7: a short last group


def problem(n=6, k=24, tokens=200, rank=6, seed=0):
    """W [n, k], X [k, tokens] of correlated channels with different sizes, H."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, k, generator=generator)
    X = torch.randn(k, rank, generator=generator) @ torch.randn(rank, tokens, generator=generator)
    X += 0.3 * torch.randn(k, tokens, generator=generator)
    X *= torch.linspace(0.5, 2, k)[torch.randperm(k, generator=generator), None]
    return W, X, 2 * X.double() @ X.double().T


def hessian(task, linear):
    return moments(task, linear)[0]


def nearest(W, scheme):
    groups = to_groups(W, scheme.group_size)
    grid = choose_qparams(groups, scheme.weight, scale_dtype=torch.float16)
    return from_groups(fake_quantize(groups, grid, scheme.weight), W.shape[1])


def output_error(W, Q, X):
    return float(((W - Q) @ X).norm())


def obq(W, H, scheme, options):
    """Optimal brain quantization in a fixed order, the inverse Hessian updated as OBQ's equation says."""
    k = W.shape[1]
    size = min(scheme.group_size or k, k)
    H = H + options.damp * H.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    order = H.diagonal().argsort(descending=True) if options.act_order else torch.arange(k)
    grids = [choose_grid(part, scheme.weight, torch.float16, mse=options.mse) for part in W.split(size, 1)]
    W, inverse = W.double().clone(), H.inverse()
    for i in order.tolist():
        if i % size == 0 and not (options.act_order or options.static_groups):
            grids[i // size] = choose_grid(W[:, i : i + size], scheme.weight, torch.float16, mse=options.mse)
        error = W[:, i] - fake_quantize(W[:, i : i + 1], grids[i // size], scheme.weight)[:, 0]
        W -= torch.outer(error / inverse[i, i], inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i], inverse[:, i] = 0, 0  # what is left of them is rounding
    return W


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("text", SCHEMES)
def test_it_is_naive_obq(text, symmetric, mse, static_groups, act_order):
    scheme = Scheme.parse(text, weight_symmetric=symmetric)
    options = Gptq(act_order=act_order, static_groups=static_groups, mse=mse, block=5)
    W, _, H = problem()
    Q, _ = round_columns(W, H, scheme, options)
    assert (Q - obq(W, H, scheme, options)).abs().max() < 1e-5
    assert (Q - nearest(W, scheme)).abs().max() > 1e-2


@pytest.mark.parametrize("options", [PAPER, Gptq(), replace(PAPER, static_groups=True)], ids=str)
@pytest.mark.parametrize("text", SCHEMES)
def test_the_block_size_changes_nothing(text, options):
    W, _, H = problem(k=50)
    expected = round_columns(W, H, Scheme.parse(text), replace(options, block=1))
    for block in (3, 8, 50, 128):
        Q, grid = round_columns(W, H, Scheme.parse(text), replace(options, block=block))
        assert torch.equal(Q, expected[0]) and all(map(torch.equal, grid, expected[1]))


@pytest.mark.parametrize("options", [PAPER, Gptq(), replace(PAPER, act_order=True)], ids=str)
@pytest.mark.parametrize("text", [text for text in SCHEMES if not text.startswith("W1")])
def test_the_output_is_nearer_than_that_of_round_to_nearest(text, options):
    scheme = Scheme.parse(text)
    for seed in range(5):
        W, X, H = problem(16, 64, seed=seed)
        Q, _ = round_columns(W, H, scheme, options)
        assert output_error(W, Q, X) < 0.8 * output_error(W, nearest(W, scheme), X)


@pytest.mark.parametrize("better", ["act_order", "mse"])
def test_each_option_helps(better):
    """On the mean over problems: where channels differ in size, and at two bits."""
    errors = {False: 0.0, True: 0.0}
    for seed in range(10):
        W, X, H = problem(16, 64, seed=seed)
        for switch in errors:
            options = replace(PAPER, **{better: switch})
            errors[switch] += output_error(W, round_columns(W, H, Scheme.parse("W2A16"), options)[0], X)
    assert errors[True] < 0.95 * errors[False]


def test_independent_inputs_are_rounded_to_nearest():
    W, scheme = problem()[0], Scheme.parse("W3A16g8")
    Q, grid = round_columns(W, torch.diag(torch.rand(24).double() + 0.1), scheme, PAPER)
    assert torch.equal(Q, nearest(W, scheme))
    expected = choose_qparams(to_groups(W, 8), scheme.weight, scale_dtype=torch.float16)
    assert all(map(torch.equal, grid, expected))


def test_act_order_keeps_the_groups_of_the_original_order():
    """The grids are those of contiguous groups of the original weight, and Q lies on them without a permutation."""
    W, _, H = problem()
    scheme = Scheme.parse("W4A16g7")
    Q, grid = round_columns(W, H, scheme, replace(PAPER, act_order=True))
    assert all(map(torch.equal, grid, choose_qparams(to_groups(W, 7), scheme.weight, scale_dtype=torch.float16)))
    assert torch.equal(from_groups(fake_quantize(to_groups(Q, 7), grid, scheme.weight), 24), Q)
    first = int(H.diagonal().argmax())  # the first to be rounded: nothing has moved it
    assert torch.equal(Q[:, first], nearest(W, scheme)[:, first])


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_are_rounded_to_nearest_and_move_nothing(act_order, damp):
    W, X, _ = problem()
    dead, scheme = torch.zeros(24, dtype=torch.bool), Scheme.parse("W3A16")
    dead[[0, 7, 23]] = True
    X[dead] = 0
    W[:, 3], W[:, 4] = 4, -4  # the range, so that it is the same with and without the dead columns
    options = Gptq(act_order=act_order, mse=False, damp=damp)
    Q, _ = round_columns(W, 2 * X.double() @ X.double().T, scheme, options)
    assert torch.equal(Q[:, dead], nearest(W, scheme)[:, dead])
    X = X[~dead].double()
    alive = replace(options, damp=damp * len(X) / 24)  # the mean of the diagonal counts the dead
    assert torch.equal(Q[:, ~dead], round_columns(W[:, ~dead], 2 * X @ X.T, scheme, alive)[0])
    Q, _ = round_columns(W, torch.zeros(24, 24).double(), scheme, options)
    assert torch.equal(Q, nearest(W, scheme))


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("options", [PAPER, Gptq()], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_fewer_tokens_than_channels(tokens, options, damp):
    W, X, H = problem(16, 64, tokens)
    messages = []
    Q, _ = round_columns(W, H, Scheme.parse("W3A16"), replace(options, damp=damp), report=messages.append)
    assert Q.isfinite().all()
    assert output_error(W, Q, X) < 0.5 * output_error(W, nearest(W, Scheme.parse("W3A16")), X)


def test_the_factor_is_that_of_the_damped_inverse():
    *_, H = problem()
    U = inverse_factor(H, 0.05)
    assert torch.equal(U, U.triu())
    expected = (H + 0.05 * H.diagonal().mean() * torch.eye(24, dtype=H.dtype)).inverse()
    torch.testing.assert_close(U.T @ U, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(U, torch.linalg.cholesky(expected, upper=True), rtol=1e-9, atol=1e-12)


def test_damping_rises_until_there_is_a_factor():
    H, messages = torch.tensor([[1.0, 1.5], [1.5, 1.0]]).double(), []
    U = inverse_factor(H, 0.01, messages.append)
    torch.testing.assert_close((U.T @ U).inverse(), H + torch.eye(2, dtype=H.dtype))
    assert [message.split()[-1] for message in messages] == ["0.1", "1"]
    messages.clear()
    inverse_factor(H, 0.0, messages.append)
    assert [message.split()[-1] for message in messages] == ["0.01", "0.1", "1"]


@pytest.mark.parametrize(("value", "words"), [(1e9, "not positive definite.*100 of"), (float("nan"), "not finite")])
def test_a_hessian_beyond_help_is_an_error_that_names_the_linears(value, words, monkeypatch):
    def broken(task, linear, original):
        H = torch.eye(linear.in_features, dtype=torch.float64)
        H[0, 1] = H[1, 0] = value
        H[0, 0] = 1 if value == value else value
        return H, None

    monkeypatch.setattr(gptq, "moments", broken)
    with pytest.raises(AbqError, match=rf"block 0: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: .*{words}"):
        Gptq().quantize_block(first_block(tiny_model()))


def test_mse_grids_err_no_more_than_min_max():
    groups, fmt = to_groups(problem(64)[0], 8), Scheme.parse("W2A16").weight
    errors = [
        (fake_quantize(groups, choose_grid(groups, fmt, torch.float16, mse=mse), fmt) - groups).abs().pow(2.4).sum(-1)
        for mse in (False, True)
    ]
    assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_linears_are_grouped_by_what_they_are_given_and_ordered_as_they_run(variant):
    model_type, overrides = VARIANTS[variant]
    task = first_block(tiny_model(model_type, **overrides))
    table = task.architecture
    task.architecture = replace(table, linears=table.linears[::-1])
    ran = []
    for name, linear in task.linears.items():
        linear.register_forward_hook(lambda *_, name=name: ran.append(name))
    found = linears_by_input(task)
    assert sorted(name for names in found for name in names) == sorted(table.linears)
    assert [names[0] for names in found] == sorted((names[0] for names in found), key=ran.index)
    norms = [pair.linears for pair in table.pairs if isinstance(pair, NormPair)]
    shared = [
        list(names)  # an expert gets its own share of what the norm puts out
        for linears in norms
        for _, names in groupby(linears, lambda name: name.rpartition(".")[0] if "experts" in name else "")
    ]
    assert all(names in shared or len(names) == 1 for names in found)
    assert [names for names in found if names in shared] == sorted(shared, key=lambda names: ran.index(names[0]))


def test_a_linear_that_never_runs_is_named():
    task = first_block(tiny_model())
    task.block.idle = nn.Linear(64, 64)
    task.architecture = replace(task.architecture, linears=(*task.architecture.linears, "idle"))
    with pytest.raises(AbqError, match="block 0 never runs idle"):
        Gptq().quantize_block(task)


@pytest.mark.parametrize("scheme", ["W3A16", "W3A4KV4"])
def test_later_linears_see_what_the_rounded_ones_compute(scheme, monkeypatch):
    """Each H is that of the finished block: on the quantized stream, with quantized activations, keys and values."""
    task, seen, inputs = first_block(tiny_model(), scheme), [], {}
    task.quantized_stream = task.fp_stream + 0.1 * torch.randn(task.fp_stream.shape)
    groups = linears_by_input(task)
    original = [hessian(task, task.linears[names[0]]) for names in groups]
    monkeypatch.setattr(gptq, "moments", lambda *args: (seen.append(hessian(*args[:2])) or seen[-1], None))
    target = task.fp_output
    Gptq().quantize_block(task)

    for name, linear in task.linears.items():
        linear.register_forward_hook(lambda module, args, _, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    output = task.forward_stream(task.quantized_stream, quantized=True)  # 4 samples: one batch
    for H, names, before in zip(seen, groups, original, strict=True):
        X = inputs[names[0]].double().T
        torch.testing.assert_close(H, 2 * X @ X.T, rtol=1e-5, atol=1e-4)
        assert torch.equal(H, before) == (names[0] == "self_attn.q_proj")
        levels = [len(x.unique()) for x in inputs[names[0]]]
        assert (max(levels) <= 16) == (scheme == "W3A4KV4")
    error = ((output - target).square().sum(-1) / target.square().sum(-1)).mean()
    assert task.block_loss == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("options", [PAPER, Gptq()], ids=str)
@pytest.mark.parametrize("scheme", ["W8A8", "W4A6g20", "W2*A8g32", "W1A16", "W3A16g1"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_packed_is_what_was_rounded(scheme, options, symmetric):
    """The driver rounds once more, and finds the same codes."""
    seen = []

    def look(task, grids):
        for name, linear in task.linears.items():
            packed = QuantLinear.from_linear(linear, grids[name], task.scheme, task.scale_dtype)
            seen.append(torch.equal(packed.dequantize(), linear.weight))

    parsed = Scheme.parse(scheme, weight_symmetric=symmetric)
    model = tiny_model("qwen2", num_key_value_heads=2).to(torch.bfloat16)
    quantize(model, parsed, Watched(options, look), calibration(2), device="cpu")
    assert len(seen) == 14 and all(seen)


@pytest.mark.parametrize("seqlen", [1, 32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_one_sample(seqlen, autocast):
    model = tiny_model()
    report = quantize(model, "W4A8g32", "gptq", calibration(1, seqlen), device="cpu", autocast=autocast)
    assert all(0 < loss < 1 for loss in report.block_losses)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_mixed_precision_leaves_the_hessian_in_full():
    full, mixed = (
        hessian(task, task.linears["mlp.down_proj"])
        for task in (first_block(tiny_model(), "W4A16", autocast=autocast) for autocast in (None, torch.bfloat16))
    )
    assert mixed.dtype == torch.float64 and 0 < (full - mixed).norm() < 0.02 * full.norm()
    assert not torch.equal(mixed, mixed.bfloat16().double())


@pytest.mark.parametrize(
    "options", [{"damp": -0.1}, {"damp": float("nan")}, {"damp": float("inf")}, {"block": 0}, {"correction": 1.5}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(AbqError, match=rf"{next(iter(options))}="):
        method_by_name("gptq", **options)


def test_the_corrected_weight_is_the_least_squares_solution():
    """W' X is as near to W X_fp as any weight takes X, and half the correction goes half the way."""
    W, X, H = problem()
    X_fp = X + 0.2 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    D = 2 * (X_fp - X).double() @ X.double().T
    solution = torch.linalg.lstsq(X.T.double(), (W @ X_fp).T.double()).solution.T
    whole, half = (corrected(W, H, D, Gptq(damp=0.0, correction=share)) for share in (1.0, 0.5))
    torch.testing.assert_close(whole.double(), solution, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half, (W + whole) / 2, rtol=1e-5, atol=1e-6)


def test_the_correction_leaves_dead_channels_as_they_are():
    W, X, _ = problem()
    X[3] = 0
    X_fp = X + torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    H, D = 2 * X.double() @ X.double().T, 2 * (X_fp - X).double() @ X.double().T
    moved = corrected(W, H, D, Gptq(correction=1.0))
    assert torch.equal(moved[:, 3], W[:, 3]) and moved.isfinite().all() and not torch.equal(moved, W)


@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_moments_pair_the_streams_token_by_token(variant):
    """X of what the block has become, X_fp of the original one: also of experts that the streams route differently."""
    model_type, overrides = VARIANTS[variant]
    task = first_block(tiny_model(model_type, **overrides), "W4A6")
    task.quantized_stream = task.fp_stream + 0.3 * torch.randn(task.fp_stream.shape)
    original = {name: tensor.clone() for name, tensor in block_parameters(task.block).items()}
    name = list(task.linears)[-1]
    for linear in task.linears.values():
        linear.weight.data += 0.02 * torch.randn(linear.weight.shape)
    seen = []
    linear = task.linears[name]
    handle = linear.register_forward_hook(lambda module, args, _: seen.append(args[0].flatten(0, -2).double().T))
    with experts_shown_all(task, range(4)):
        task.forward(task.quantized_stream, quantized=True)
        task.forward(task.fp_stream, original, quantized=False)
    handle.remove()
    (X, X_fp), (H, D) = seen, moments(task, linear, original)
    assert X.shape[1] == task.fp_stream[..., 0].numel() and not torch.equal(X, X_fp)
    torch.testing.assert_close(H, 2 * X @ X.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(D, 2 * (X_fp - X) @ X.T, rtol=1e-4, atol=1e-3)
    assert moments(task, linear)[1] is None


@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_correction_makes_up_for_what_the_inputs_have_lost(variant):
    """Nothing in the first linears, whose inputs are whole; the last block ends nearer to the fp one."""
    losses, first = [], []

    def look(task, grids):
        if task.index == 0:
            first.append(next(iter(task.linears.values())).weight.clone())

    for share in (0.0, 0.5):
        model_type, overrides = VARIANTS[variant]
        method = Watched(Gptq(correction=share), look)
        report = quantize(tiny_model(model_type, **overrides), "W3A16", method, calibration(), device="cpu")
        losses.append(report.block_losses[-1])
    assert torch.equal(*first) and losses[1] < 0.95 * losses[0]
