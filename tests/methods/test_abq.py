import copy
import math
from dataclasses import fields

import pytest
import torch

from abq_llm.calibration.block import input_statistics
from abq_llm.calibration.learned import CLIP_AT_START, LearnedWeights
from abq_llm.calibration.losses import akl_loss, dlc_loss, relative_mse
from abq_llm.calibration.transforms import apply, block_parameters, initial_log_scale
from abq_llm.errors import AbqError
from abq_llm.evaluation import evaluate
from abq_llm.methods import METHODS, abq, method_by_name
from abq_llm.methods.abq import Abq
from abq_llm.quantize import quantize
from abq_llm.quantizers import choose_qparams, fake_quantize, from_groups, to_groups
from abq_llm.scheme import Scheme
from tests.blocks import Watched, calibration, first_block, random_tokens
from tests.tiny import VARIANTS, tiny_model

SWITCHES = [field.name for field in fields(Abq) if field.type == "bool"]
OFF = dict.fromkeys(SWITCHES, False)


def learn(scheme="W3A6KV6", *, samples=16, layers=3, seed=0, dtype=torch.float32, messages=None, **options):
    """One epoch, unless told -> (model, report, each block's parameters before and after, each block's grids).

    Rounding to nearest, unless told: so that the parameters are those before it.
    """
    original = tiny_model(num_hidden_layers=layers).to(dtype)
    model, parameters, grids = copy.deepcopy(original), [], []

    def look(task, block_grids):
        before = {name: tensor.float() for name, tensor in block_parameters(original.model.layers[task.index]).items()}
        after = {name: tensor.clone() for name, tensor in block_parameters(task.block).items()}
        parameters.append((before, after))
        grids.append(block_grids)

    method = Watched(Abq(**{"epochs": 1, "rounding": False, **options}), look)
    report = quantize(
        model,
        scheme,
        method,
        calibration(samples),
        device="cpu",
        seed=seed,
        batch_size=4,
        progress=lambda block, _, loss, message: None if messages is None else messages.append((block, loss, message)),
    )
    return model, report, parameters, grids


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def same_grids(ours, theirs):
    return all(torch.equal(x, y) for name in theirs for x, y in zip(ours[name], theirs[name], strict=True))


def min_max(parameters, scheme, grids):
    """The grids that round to nearest would choose for these weights."""
    return {
        name: choose_qparams(
            to_groups(parameters[f"{name}.weight"], scheme.group_size), scheme.weight, scale_dtype=torch.float16
        )
        for name in grids
    }


def test_the_switches_are_the_parts_of_the_method():
    assert SWITCHES == ["balance", "clipping", "compensation", "rounding", "dlc", "akl", "search"]
    assert all(getattr(Abq(), switch) for switch in SWITCHES)


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_part_can_be_left_out_and_matters(switch):
    full, report, *_ = learn(layers=2, rounding=True)
    without, other, *_ = learn(layers=2, **{"rounding": True, switch: False})
    assert other.provenance["options"]["method"][switch] is False
    assert all(math.isfinite(loss) for loss in other.block_losses) and other.block_losses != report.block_losses
    held_out, original = random_tokens(8, 32, seed=9), tiny_model()
    kl, reference = (evaluate(model, held_out, original, batch_size=8).kl for model in (without, full))
    assert kl != reference and kl < 0.6
    ours, theirs = without.state_dict(), full.state_dict()
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs if name.endswith("weight_packed"))


def test_with_everything_off_it_is_round_to_nearest():
    model, *_ = learn("W3A6KV6g32", **OFF)
    reference = tiny_model(num_hidden_layers=3)
    quantize(reference, "W3A6KV6g32", "rtn", device="cpu")
    expected = reference.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_only_balance_moves_the_scales():
    _, _, parameters, _ = learn(balance=False, compensation=False)
    assert all(not changed(before, after) for before, after in parameters)
    _, _, parameters, _ = learn(compensation=False)
    assert all(changed(before, after) == set(before) for before, after in parameters)


def test_queries_and_keys_are_balanced_only_if_keys_are_quantized():
    for scheme, moved in (("W3A6", False), ("W3A6KV6", True)):
        ((before, after),) = learn(scheme, layers=1, compensation=False)[2]
        # the rows of the keys: their columns are scaled with the norm's, by the same factor for the values
        name, norm = "self_attn.k_proj.weight", "input_layernorm.weight"
        rows = after[name] * (after[norm] / before[norm]) / before[name]
        assert ((rows - 1).abs().max() > 1e-3) == moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_balanced_norms_are_what_is_stored(dtype):
    """In the block that the method leaves, and so in the streams, a norm is what the checkpoint will hold."""
    model, _, parameters, _ = learn(layers=2, dtype=dtype)
    for index, (before, after) in enumerate(parameters):
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            stored = model.model.layers[index].get_parameter(name)
            assert stored.dtype == dtype and not torch.equal(stored.float(), before[name])
            torch.testing.assert_close(stored.float(), after[name], rtol=1e-6, atol=0)


def test_compensation_is_of_rank_one_in_the_first_and_the_last_block():
    _, _, parameters, _ = learn("W2*A16", balance=False, clipping=False, epochs=2)
    first, middle, last = (changed(before, after) for before, after in parameters)
    assert first == last == {"mlp.down_proj.weight"} and middle == set()
    for before, after in (parameters[0], parameters[2]):
        values = torch.linalg.svdvals(after["mlp.down_proj.weight"] - before["mlp.down_proj.weight"])
        assert values[0] > 1e-3 and values[1] < 1e-4 * values[0]
    _, _, ((before, after),), _ = learn("W2*A16", layers=1, balance=False, clipping=False, epochs=2)
    assert changed(before, after) == {"mlp.down_proj.weight"}


def test_compensation_starts_at_zero():
    _, _, parameters, _ = learn(balance=False, epochs=0)
    assert not any(changed(before, after) for before, after in parameters)


@pytest.mark.parametrize("scheme", ["W3A6KV6g32", "W2*A8g48", "W4A8"])
def test_without_clipping_the_grids_are_min_max(scheme):
    for clipping in (False, True):
        _, _, parameters, grids = learn(scheme, layers=2, clipping=clipping)
        for (_, after), block_grids in zip(parameters, grids, strict=True):
            assert same_grids(block_grids, min_max(after, Scheme.parse(scheme), block_grids)) != clipping


@pytest.mark.parametrize("scheme", ["W1*A8", "W2A16g32", "W3A6KV6g32", "W4A8", "W8A8"])
def test_without_search_clips_start_at_exactly_one(scheme):
    _, _, ((_, after),), (grids,) = learn(scheme, layers=1, epochs=0, search=False, balance=False)
    assert same_grids(grids, min_max(after, Scheme.parse(scheme), grids))
    start = torch.logit(torch.tensor(1.0) * CLIP_AT_START)
    assert float(torch.sigmoid(start) / CLIP_AT_START) == 1


@pytest.mark.parametrize("scheme", ["W1*A8", "W3A6KV6g32", "W4A8"])
def test_clips_are_learned_from_there(scheme):
    """One is not where the slope of a clip is 0, and a clip may also grow."""
    *_, ((_, after),), (grids,) = learn(scheme, **{**OFF, "clipping": True, "dlc": True, "epochs": 8, "layers": 1})
    plain = min_max(after, Scheme.parse(scheme), grids)
    ratios = torch.cat([(grids[name].scale / plain[name].scale).flatten() for name in plain])
    assert ratios.min() < 0.999 and 1.001 < ratios.max() < 1.03


def weighted_error(task, grids):
    """Squared error of each linear's weights, each column by the mean square of what enters it."""
    energy, total = input_statistics(task, task.quantized_stream).energy, []
    for name, grid in grids.items():
        weight = task.linears[name].weight.detach()
        fake = from_groups(
            fake_quantize(to_groups(weight, task.scheme.group_size), grid, task.scheme.weight), weight.shape[1]
        )
        total.append(float(((fake - weight).square() * energy[name]).sum()))
    return torch.tensor(total)


@pytest.mark.parametrize("scheme", ["W3A16", "W2A8g32", "W2*A8g48"])
def test_learned_rounding_takes_a_neighbour_and_loses_less(scheme):
    """Of one block with other vectors off: each code is the nearest one or the next on the other side of the weight."""
    options = {"balance": False, "clipping": False, "compensation": False, "epochs": 5}
    _, report, ((before, after),), (grids,) = learn(scheme, layers=1, rounding=True, **options)
    nearest = learn(scheme, layers=1, **options)[1]
    assert report.block_losses[0] < 0.9 * nearest.block_losses[0]
    fmt, moved = Scheme.parse(scheme).weight, 0
    for name, grid in grids.items():
        weight, chosen = (
            to_groups(each[f"{name}.weight"], Scheme.parse(scheme).group_size) for each in (before, after)
        )
        steps = (chosen - weight) / grid.scale
        inside = ((weight / grid.scale + grid.zero_point) > 0) & ((weight / grid.scale + grid.zero_point) < fmt.qmax)
        assert steps[inside].abs().max() < 1 + 1e-3
        moved += int((steps[inside].abs() > 0.501).sum())
    assert moved > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_what_was_trained_is_what_is_packed(variant, dtype, monkeypatch):
    """Though norms are stored in bf16, and some scales as powers of two."""
    model_type, overrides = VARIANTS[variant]
    model = tiny_model(model_type, **overrides).to(dtype).float()
    task = first_block(model, "W3A16g32", samples=16, storage_dtype=dtype)
    trained, fold = {}, LearnedWeights.fold

    def look(weights, vectors):
        assert all(V.abs().max() > 0.03 for V in vectors.rounding.values())
        trained.update({name: tensor.clone() for name, tensor in weights.quantized(copy.deepcopy(vectors)).items()})
        return fold(weights, vectors)

    monkeypatch.setattr(LearnedWeights, "fold", look)
    Abq(epochs=12).quantize_block(task)
    assert all(
        torch.equal(trained[f"{name}.weight"], block_parameters(task.block)[f"{name}.weight"]) for name in task.linears
    )


@pytest.mark.parametrize(("epochs", "batch_size", "rate"), [(2, 4, 1 / 32), (10, 2, 1 / 70), (40, 4, 1 / 120)])
def test_the_rate_of_rounding_goes_by_the_number_of_steps(epochs, batch_size, rate, monkeypatch):
    """16 samples, of which 14 are trained on; the rate of the first step, by which all V move at most."""
    task = first_block(tiny_model(), "W3A16", samples=16, batch_size=batch_size)
    groups = []
    monkeypatch.setattr(abq, "fit", lambda task, given, *rest, **options: groups.extend(given))
    Abq(epochs=epochs).quantize_block(task)
    assert groups[-1].lr == pytest.approx(rate) and len(groups[-1].tensors) == 2  # groups of 64 and of 128


@pytest.mark.parametrize("scheme", ["W2A16g32", "W3A8", "W2*A8"])
def test_search_starts_from_clips_of_less_error(scheme):
    task = first_block(tiny_model(), scheme)
    searched = Abq(epochs=0, balance=False, rounding=False).quantize_block(task)
    plain = min_max(block_parameters(task.block), task.scheme, searched)
    error, before = weighted_error(task, searched), weighted_error(task, plain)
    assert (error <= before).all() and error.sum() < 0.9 * before.sum()
    assert all((searched[name].scale <= plain[name].scale).all() for name in plain)


def test_without_search_balance_starts_at_alpha_one_half():
    task = first_block(tiny_model(), "W4A8KV8")
    expected = block_parameters(copy.deepcopy(task.block))
    peaks = input_statistics(task, task.quantized_stream).peak
    parameters = dict(expected)
    for pair in task.architecture.pairs:
        parameters = apply(pair, parameters, initial_log_scale(pair, expected, peaks, 16, 0.5), 16)
    Abq(epochs=0, search=False, compensation=False, rounding=False).quantize_block(task)
    torch.testing.assert_close(block_parameters(task.block), parameters, rtol=1e-5, atol=1e-6)


def start_loss(**options):
    task = first_block(tiny_model(), "W4A4")
    Abq(epochs=0, clipping=False, compensation=False, **options).quantize_block(task)
    return task.block_loss


def test_search_starts_from_the_best_of_the_alphas_and_no_balance():
    none, half, quarter = start_loss(balance=False), start_loss(search=False), start_loss(alphas=(0.25,))
    assert half < none  # balance is worth something here
    assert start_loss(alphas=(0.25, 0.5)) == pytest.approx(min(half, quarter), rel=1e-5)
    assert start_loss(alphas=(-8.0,)) == pytest.approx(none, rel=1e-5)  # a bad alpha: better not to balance


@pytest.mark.parametrize("dlc", [True, False])
@pytest.mark.parametrize("akl", [True, False])
@torch.no_grad()
def test_the_loss_is_the_sum_of_what_is_on(dlc, akl):
    """Of the block that rounds to nearest, on a quantized stream that has strayed."""
    task = first_block(tiny_model(), "W3A6KV6")
    task.quantized_stream += 0.1 * torch.randn(task.fp_stream.shape, generator=torch.Generator().manual_seed(0))
    target, second = task.fp_output, task.forward(task.quantized_stream, quantized=False)
    teacher = task.queries_and_keys(task.fp_stream, torch.float32)
    grids = Abq(**(OFF | {"dlc": dlc, "akl": akl, "epochs": 0})).quantize_block(task)
    for name, linear in task.linears.items():
        linear.weight.copy_(fake_quantize(to_groups(linear.weight, None), grids[name], task.scheme.weight)[:, 0])
    records = []
    task.attention.attention_records = records
    output = task.forward(task.quantized_stream, quantized=True)
    expected = dlc_loss(output, target, second) if dlc else relative_mse(output, target)
    kl = akl_loss(records[0][:2], teacher, torch.arange(32))
    assert expected > 0.01 and kl > 0.01
    assert task.block_loss == pytest.approx(float(expected + kl * akl), rel=1e-3)


def test_attention_rows_are_drawn_anew_for_each_step(monkeypatch):
    """Where the loss is only measured they are the same each time, or two epochs could not be compared."""
    training, measuring = [], []

    def watched(student, teacher, rows, *shape):
        (training if torch.is_grad_enabled() else measuring).append(rows.tolist())
        return akl_loss(student, teacher, rows, *shape)

    monkeypatch.setattr(abq, "akl_loss", watched)
    learn(layers=1, akl_rows=4)
    assert set(map(tuple, measuring)) == {(0, 8, 16, 24)}
    assert len(training) == 3 and len(set(map(tuple, training))) == 3
    assert all(len(set(rows)) == 4 and set(rows) <= set(range(32)) for rows in training)
    for rows in (32, 256):
        training.clear()
        learn(layers=1, akl_rows=rows)
        assert all(sorted(drawn) == list(range(32)) for drawn in training)


def test_training_lowers_the_held_out_loss():
    before, after = (learn(layers=2, epochs=epochs)[1].block_losses for epochs in (0, 8))
    assert all(loss < 0.95 * start for start, loss in zip(before, after, strict=True))


def test_another_seed_learns_something_else():
    first, again, other = (learn(layers=1, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_few_samples_are_held_out_and_trained_on():
    for samples in (1, 7, 8):
        assert all(math.isfinite(loss) for loss in learn(samples=samples, layers=1)[1].block_losses)


@pytest.mark.parametrize(
    ("rate", "diverging"),
    [("lr_balance", [0, 1, 2]), ("lr_clipping", []), ("lr_compensation", [0, 2])],  # a clip ends at 0 or 1, not at NaN
)
def test_a_block_that_diverges_keeps_its_best_state_and_finishes(rate, diverging):
    messages = []
    model, report, _, _ = learn("W4A6", epochs=2, messages=messages, **{rate: math.inf})
    assert [block for block, _, message in messages if "not finite" in message] == diverging
    assert [block for block, _, message in messages if message == "done"] == [0, 1, 2]
    assert all(math.isfinite(loss) for loss in report.block_losses)
    untrained, start, _, _ = learn("W4A6", epochs=0)
    assert report.block_losses[0] == start.block_losses[0]
    held_out, original = random_tokens(8, 32, seed=9), tiny_model(num_hidden_layers=3)
    kl, expected = (evaluate(m, held_out, original, batch_size=8).kl for m in (model, untrained))
    assert kl < 1.1 * expected


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gptz", {}, ["gptz", *METHODS]),
        ("abq", {"epoch": 3}, ["abq", "epoch"]),
        ("rtn", {"epochs": 3}, ["rtn", "epochs"]),
    ],
)
def test_unknown_methods_and_options_are_named(name, options, words):
    with pytest.raises(AbqError) as error:
        method_by_name(name, **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_is_named(method, value):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(AbqError, match=rf"layers\.1\.mlp\.up_proj\.weight holds 1 .*{value}"):
        quantize(model, "W4A8", method, calibration(), device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_a_scheme_that_packs_nothing_is_refused(method):
    with pytest.raises(AbqError, match=r"W16A8.*W16"):
        quantize(tiny_model(), "W16A8", method, calibration(), device="cpu")


def test_missing_calibration_is_refused():
    with pytest.raises(AbqError, match=r"'abq'.*calibration"):
        quantize(tiny_model(), "W4A8", "abq", device="cpu")
    quantize(tiny_model(), "W4A8", "rtn", device="cpu")


def test_epochs_of_quantize_are_those_of_the_method():
    report = quantize(tiny_model(), "W4A8", Abq(akl=False), calibration(2), device="cpu", epochs=0)
    assert report.provenance["options"]["epochs"] == 0 and report.provenance["options"]["akl"] is False


def test_mixed_precision_learns_nearly_the_same():
    losses = []
    for autocast in (None, torch.bfloat16):
        model = tiny_model()
        report = quantize(model, "W4A4", Abq(epochs=2), calibration(), device="cpu", batch_size=4, autocast=autocast)
        losses.append(torch.tensor(report.block_losses))
    assert not torch.equal(*losses)
    assert torch.allclose(*losses, rtol=0.25)
