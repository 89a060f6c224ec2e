import math

import pytest
import torch

from abq_llm.calibration.losses import akl_loss, dlc_loss, relative_mse


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def cosine(a, b):
    dot, size = sum(x * y for x, y in zip(a, b, strict=True)), math.hypot(*a) * math.hypot(*b)
    return dot / size


def test_dlc_is_the_formula():
    output, *targets = (draw(2, 3, 5, seed=seed) + 2 for seed in range(3))
    expected = 0.0
    for target in targets:
        rows = zip(output.flatten(0, 1).tolist(), target.flatten(0, 1).tolist(), strict=True)
        cosines = [cosine(a, b) for a, b in rows]
        expected -= math.log(sum(cosines) / len(cosines))
    assert expected > 0.1
    assert float(dlc_loss(output, *targets)) == pytest.approx(expected, rel=1e-5)
    assert float(dlc_loss(output, targets[0])) != pytest.approx(expected, rel=1e-2)


def test_dlc_is_zero_for_equal_outputs_whatever_their_size():
    output = draw(2, 3, 5)
    assert abs(float(dlc_loss(output, output, output))) < 1e-6
    assert abs(float(dlc_loss(3 * output, output, output))) < 1e-6


def test_relative_mse_is_the_formula():
    output, target = draw(2, 3, 5), draw(2, 3, 5, seed=1)
    rows = zip(output.flatten(0, 1).tolist(), target.flatten(0, 1).tolist(), strict=True)
    errors = [math.dist(a, b) ** 2 / math.hypot(*b) ** 2 for a, b in rows]
    assert float(relative_mse(output, target)) == pytest.approx(sum(errors) / 6, rel=1e-5)
    assert float(relative_mse(target, target)) == 0
    assert float(relative_mse(10 * output, 10 * target)) == pytest.approx(sum(errors) / 6, rel=1e-5)
    assert relative_mse(output, torch.zeros_like(target)).isfinite()


def naive_maps(query, key, window=99, softcap=None):
    """[batch][head][row] -> the probabilities of the last `window` of positions 0..row, as Python numbers."""
    query, key = query.double(), key.double()
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    maps = []
    for q, k in zip(query, key, strict=True):
        maps.append([])
        for head in range(heads):
            scores = [[float(a @ b) / math.sqrt(len(a)) for b in k[head // group]] for a in q[head]]
            if softcap:
                scores = [[softcap * math.tanh(s / softcap) for s in row] for row in scores]
            rows = [[math.exp(s) for s in row[max(t + 1 - window, 0) : t + 1]] for t, row in enumerate(scores)]
            maps[-1].append([[e / sum(row) for e in row] for row in rows])
    return maps


def naive_akl(student, teacher, rows, **shape):
    """(mean over batch, heads and rows of KL both ways, the largest mean of one head)."""
    heads = []
    for ours, theirs in zip(naive_maps(*student, **shape), naive_maps(*teacher, **shape), strict=True):
        for our_head, their_head in zip(ours, theirs, strict=True):
            total = 0.0
            for row in rows:
                pairs = list(zip(our_head[row], their_head[row], strict=True))
                total += sum(q * math.log(q / p) for q, p in pairs) + sum(p * math.log(p / q) for q, p in pairs)
            heads.append(total / len(rows))
    return sum(heads) / len(heads), max(heads)


@pytest.mark.parametrize("rows", [list(range(7)), [6, 2], [0]], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_akl_is_both_divergences_of_every_head(kv_heads, rows):
    student = draw(2, 4, 7, 8), draw(2, kv_heads, 7, 8, seed=1)
    teacher = draw(2, 4, 7, 8, seed=2), draw(2, kv_heads, 7, 8, seed=3)
    expected, _ = naive_akl(student, teacher, rows)
    assert float(akl_loss(student, teacher, torch.tensor(rows))) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert (expected > 0.5) == (rows != [0])  # the first row attends to one token


@pytest.mark.parametrize("additive", [False, True])
def test_akl_is_of_the_maps_that_the_block_computes(additive):
    """Through a sliding window and under a softcap, as in Gemma 2."""
    student = draw(2, 4, 7, 8, scale=2.0), draw(2, 2, 7, 8, seed=1)
    teacher = draw(2, 4, 7, 8, seed=2), draw(2, 2, 7, 8, seed=3)
    mask = torch.ones(7, 7).tril().triu(-2).bool()[None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, _ = naive_akl(student, teacher, [6, 2, 4], window=3, softcap=1.5)
    others = [naive_akl(student, teacher, [6, 2, 4], **shape)[0] for shape in ({"window": 3}, {"softcap": 1.5})]
    assert float(akl_loss(student, teacher, torch.tensor([6, 2, 4]), mask, 1.5)) == pytest.approx(expected, rel=1e-4)
    assert min(abs(other - expected) for other in others) > 0.1


def test_akl_is_zero_for_equal_maps():
    pair = draw(2, 4, 7, 8), draw(2, 2, 7, 8, seed=1)
    assert float(akl_loss(pair, pair, torch.arange(7))) == 0
    half = tuple(x.half() for x in pair)  # the teacher is kept in fp16
    assert abs(float(akl_loss(pair, half, torch.arange(7)))) < 1e-5


def test_a_divergence_of_a_tenth_stays_one():
    """The published loss, softmax of head-averaged maps averaged over all entries, makes 3e-9 of it."""
    tokens = 64
    query, key = draw(1, 2, tokens, 16), draw(1, 2, tokens, 16, seed=1)
    student = query + 0.25 * draw(1, 2, tokens, 16, seed=2), key
    rows = list(range(tokens))
    expected, _ = naive_akl(student, (query, key), rows)
    assert 0.05 < expected < 0.2
    assert float(akl_loss(student, (query, key), torch.tensor(rows))) == pytest.approx(expected, rel=1e-3)


def test_heads_do_not_cancel():
    query, key = draw(1, 2, 9, 8), draw(1, 2, 9, 8, seed=1)
    swapped = query.flip(1), key.flip(1)  # the mean over heads is the same map
    assert float(akl_loss(swapped, (query, key), torch.arange(9))) > 0.5


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_gradients_are_finite(scale):
    """At 30 the maps are nearly one-hot: probabilities underflow to 0, and future positions are -inf."""
    student = tuple(draw(2, 4, 7, 8, seed=seed, scale=scale).requires_grad_() for seed in (0, 1))
    teacher = draw(2, 4, 7, 8, seed=2, scale=scale), draw(2, 4, 7, 8, seed=3, scale=scale)
    loss = akl_loss(student, teacher, torch.arange(7))
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() for x in student)
    assert (student[0].grad.abs().max() > 0) == (scale > 0)
    output = (draw(2, 3, 5) + 2).requires_grad_()
    dlc_loss(output, draw(2, 3, 5, seed=1) + 2).backward()
    assert output.grad.isfinite().all() and output.grad.abs().max() > 0
