import math

import pytest
import torch

from abq_llm.calibration.reconstruct import Group, Outcome, reconstruct

SAMPLES = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)) + 1


def fit(x, loss, *, epochs=20, lr=0.05, batch_size=4, seed=0, groups=None, training=None, held_out=None, **options):
    """Fit x to samples by `loss(batch, whether training)` -> (Outcome, losses reported, batches fetched)."""
    losses, fetched = [], []

    def fetch(samples, is_training):
        fetched.append((is_training, samples.tolist()))
        return SAMPLES[samples], torch.tensor(is_training)

    outcome = reconstruct(
        groups or [Group((x,), lr)],
        fetch,
        loss,
        training=torch.arange(4, 16) if training is None else training,
        held_out=torch.arange(4) if held_out is None else held_out,
        batch_size=batch_size,
        epochs=epochs,
        generator=torch.Generator().manual_seed(seed),
        report=lambda epoch, value: losses.append((epoch, value)),
        **options,
    )
    assert [epoch for epoch, _ in losses] == list(range(len(losses)))
    return outcome, [value for _, value in losses], fetched


def quadratic(x):
    return lambda batch, training: (x - batch).square().mean()


def drifting(x):
    """Training pulls x to 10, on held-out samples x = 1 is best."""
    return lambda batch, training: (x - torch.where(training, 10.0, 1.0)).square().mean()


def test_a_quadratic_is_minimised():
    x = torch.full((3,), 5.0)
    held_out = torch.arange(16)
    outcome, losses, _ = fit(x, quadratic(x), epochs=400, training=held_out, held_out=held_out, batch_size=16)
    least = float((SAMPLES.mean(0) - SAMPLES).square().mean())
    torch.testing.assert_close(x, SAMPLES.mean(0), rtol=0.02, atol=0.02)
    assert outcome.before == pytest.approx(float((5 - SAMPLES).square().mean()))
    assert 0.999 * least < outcome.after < 1.01 * least and outcome.after == min(losses) and not outcome.diverged
    assert not x.requires_grad and x.grad is None


def test_rates_that_decay_fall_linearly_to_nearly_zero():
    """Adam's first steps under one gradient are as long as the rate: six steps of 1, 5/6, 4/6 ... of it."""
    x, start = torch.zeros(3), 0.05
    slope = lambda batch, training: -x.sum() + 0 * batch.sum()  # noqa: E731
    fit(x, slope, epochs=2, lr=start, decay=True)  # 12 samples in batches of 4
    torch.testing.assert_close(x, torch.full((3,), start * (1 + 5 + 4 + 3 + 2 + 6) / 6), rtol=1e-4, atol=0)
    y = torch.zeros(3)
    fit(y, lambda batch, training: -y.sum() + 0 * batch.sum(), epochs=2, lr=start)
    torch.testing.assert_close(y, torch.full((3,), start * 6), rtol=1e-4, atol=0)


def test_the_best_state_is_kept_when_the_loss_rises_later():
    x = torch.zeros(3)
    outcome, losses, _ = fit(x, drifting(x))
    best = losses.index(min(losses))
    assert 2 < best < len(losses) - 3 and losses[-1] > 3 * outcome.before
    assert outcome == Outcome(1.0, min(losses), False)
    assert float((x - 1).square().mean()) == pytest.approx(outcome.after)
    again = torch.zeros(3)
    fit(again, drifting(again), epochs=best + 1)
    assert torch.equal(again, x)


def test_where_nothing_is_better_the_start_is_kept():
    x = torch.ones(3)
    outcome, losses, _ = fit(x, drifting(x), epochs=3)
    assert outcome == Outcome(0.0, 0.0, False) and min(losses) > 0 and torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_with_the_best_state(bad):
    x = torch.zeros(3)
    outcome, losses, _ = fit(x, lambda *batch: drifting(x)(*batch) * torch.where(x > 1.5, bad, 1.0).mean())
    assert outcome.diverged and not math.isfinite(losses[-1]) and len(losses) < 20
    assert all(math.isfinite(value) for value in losses[:-1])
    assert outcome.after == min(losses[:-1]) < 0.5
    assert float((x - 1).square().mean()) == pytest.approx(outcome.after)


def test_gradients_that_are_not_finite_end_with_the_best_state():
    x = torch.zeros(3)  # where the square root is 0 and its slope infinite
    outcome, losses, _ = fit(x, lambda batch, training: (x - 1).square().mean() + 0 * x.sqrt().sum())
    assert outcome == Outcome(1.0, 1.0, True) and len(losses) == 1 and math.isnan(losses[0])
    assert torch.equal(x, torch.zeros(3)) and not x.requires_grad and x.grad is None


def test_a_start_that_is_not_finite_is_left_alone():
    x = torch.zeros(3)
    outcome, losses, _ = fit(x, lambda *batch: quadratic(x)(*batch) * math.nan)
    assert outcome.diverged and math.isnan(outcome.before) and not losses and torch.equal(x, torch.zeros(3))


def test_the_seed_decides():
    results = []
    for seed in (0, 0, 1):
        x = torch.zeros(3)
        outcome, losses, fetched = fit(x, quadratic(x), epochs=3, seed=seed)
        results.append((x, losses, fetched, outcome))
    (x, *first), (y, *second), (z, *third) = results
    assert torch.equal(x, y) and first == second
    assert not torch.equal(x, z) and first[1] != third[1]


def test_without_epochs_or_tensors_only_the_loss_is_measured():
    x = torch.zeros(3)
    expected = float(SAMPLES[:4].square().mean())
    for arguments in ({"epochs": 0}, {"groups": [Group((), 0.1)]}):
        outcome, losses, fetched = fit(x, quadratic(x), **arguments)
        assert outcome == Outcome(outcome.before, outcome.before, False) and not losses
        assert outcome.before == pytest.approx(expected) and not any(is_training for is_training, _ in fetched)
        assert torch.equal(x, torch.zeros(3)) and not x.requires_grad


def test_each_group_has_its_learning_rate():
    x, y, z = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    groups = [Group((x,), 0.1), Group((y,), 0.01), Group((z,), 0.0)]
    fit(x, lambda *batch: sum(quadratic(v)(*batch) for v in (x, y, z)), epochs=1, batch_size=12, groups=groups)
    torch.testing.assert_close(x.abs(), torch.full((3,), 0.1))  # Adam's first step is the learning rate
    torch.testing.assert_close(y.abs(), torch.full((3,), 0.01))
    assert torch.equal(z, torch.zeros(3))


def test_an_epoch_sees_each_sample_once_but_for_a_short_last_batch():
    x = torch.zeros(3)
    _, _, fetched = fit(x, quadratic(x), epochs=2, batch_size=5)
    trained = [samples for is_training, samples in fetched if is_training]
    assert [len(batch) for batch in trained] == [5, 5, 5, 5]
    for epoch in (trained[:2], trained[2:]):
        assert len({*epoch[0], *epoch[1]} & set(range(4, 16))) == 10
    _, _, fetched = fit(x, quadratic(x), epochs=1, batch_size=100)
    assert [sorted(samples) for is_training, samples in fetched if is_training] == [list(range(4, 16))]


def test_the_held_out_loss_is_a_mean_over_samples():
    x = torch.zeros(3)
    outcome, _, _ = fit(x, quadratic(x), epochs=0, batch_size=4, held_out=torch.arange(7))
    assert outcome.before == pytest.approx(float(SAMPLES[:7].square().mean()))
