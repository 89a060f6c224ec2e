"""The integer-only operators against what they stand for, in floats; each runs where no float may."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from abq_llm.integer_only import fixed, from_float, to_float
from abq_llm.kernels import integer
from abq_llm.kernels.integer import Dyadic
from abq_llm.scheme import IntFormat
from tests.integers import IntegersOnly

EIGHT, WIDE = IntFormat(8), IntFormat(16)
FORMATS = [IntFormat(bits, symmetric=symmetric) for bits in (2, 4, 8, 16) for symmetric in (False, True)]


def ints(function, *args):
    with IntegersOnly():
        return function(*args)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(x):
    """The size of one step of each row."""
    return to_float(x._replace(codes=torch.ones_like(x.m)))


def test_the_mode_notices_floats():
    with pytest.raises(AssertionError, match="aten"):
        ints(lambda: torch.ones(2, dtype=torch.int64) / 2)
    with pytest.raises(AssertionError, match="aten"):
        ints(torch.ones(2).long)


def test_shifts_and_quotients_are_to_nearest_with_ties_up():
    values = [0, 1, 2, 3, 5, 6, 7, 2**40 + 1, 2**61 - 1]
    x = torch.tensor([sign * value for value in values for sign in (1, -1)])
    for k in (-3, 0, 1, 2, 5, 40, 62, 63, 200):
        if k < 0 and x.abs().max() >> (63 + k):
            continue
        expected = [math.floor(Fraction(value) / Fraction(2) ** k + Fraction(1, 2)) for value in x.tolist()]
        assert ints(integer.shift, x, torch.tensor(k)).tolist() == expected
    for k in (-2, 3):
        assert ints(integer.shift, torch.tensor(10), torch.tensor(k)).item() == {-2: 40, 3: 1}[k]
    for y in (1, 2, 3, 255, 2**30 + 1):
        expected = [math.floor(Fraction(value, y) + Fraction(1, 2)) for value in x.tolist()]
        assert ints(integer.divide, x, y).tolist() == ints(integer.divide, x, torch.tensor(y)).tolist() == expected


def test_logarithms_and_roots_are_exact():
    values = sorted({2**bit + step for bit in range(62) for step in (-1, 0, 1)} | {n * n for n in (3, 1000, 2**30 + 7)})
    x = torch.tensor([value for value in values if value >= 1])
    assert ints(integer.log2_floor, x).tolist() == [value.bit_length() - 1 for value in x.tolist()]
    x = torch.tensor([value for value in values if value < 2**62])
    assert ints(integer.sqrt_floor, x).tolist() == [math.isqrt(value) for value in x.tolist()]


def test_scales_are_shortened_by_less_than_a_unit_of_their_last_bit():
    m, k = torch.tensor([1, 100, 255, 256, 257, 511, 12345, 2**50 - 1]), torch.tensor(20)
    for bits in (8, 16):
        short, moved = ints(integer.shorten, m, k, bits)
        assert (short >= 2 ** (bits - 1)).all() and (short <= 2**bits).all()
        change = short.double() * 2.0 ** (k - moved).double() / m
        assert (change >= 1).all() and (change < 1 + 2.0 ** (1 - bits)).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("size", [2.0**-4, 1.0, 300.0])
def test_quantized_rows_lose_half_a_step_of_the_float_grid(fmt, size):
    x = normal(5, 40) * size * torch.tensor([[1], [100], [0.02], [1], [1]])
    x[3], x[4] = x[3].abs(), -x[4].abs()  # ranges that end at zero
    wide = Dyadic((x / 200 * 2**36).round().long(), torch.full((5, 1), 200), torch.full((5, 1), 36))
    q = ints(integer.quantize, wide, fmt)
    hi, lo = x.amax(-1, keepdim=True).clamp_min(0), x.amin(-1, keepdim=True).clamp_max(0)
    if fmt.fixed_zero_point is None:
        expected = (hi - lo) / fmt.qmax
        assert (q.codes.amax(-1) - q.codes.amin(-1) <= fmt.qmax).all()
    else:
        expected = torch.maximum(hi, -lo) / (fmt.qmax - fmt.fixed_zero_point)
        assert (q.codes >= -fmt.fixed_zero_point).all() and (q.codes <= fmt.qmax - fmt.fixed_zero_point).all()
    ratio = steps(q) / expected
    assert (ratio > 1 - 2.0**-14).all() and (ratio < 1 + 2.0**-6).all()
    error = (to_float(q) - x).abs() / steps(q)
    assert error.max() < 1.02 and error.quantile(0.95) < 0.5  # a zero point in the middle of a step costs an end one


def test_zeros_stay_zeros_and_the_tiny_vanish():
    x = torch.zeros(3, 8, dtype=torch.int64)
    x[1, 0], x[2, 0] = 1, 1
    q = ints(integer.quantize, Dyadic(x, torch.full((3, 1), 200), torch.tensor([[60], [60], [10]])), EIGHT)
    assert not q.codes[:2].any() and q.codes[2, 0] > 250
    assert (q.m > 0).all() and (q.k <= integer.MAX_SHIFT).all()


@pytest.mark.parametrize("group_size", [None, 16, 24])
def test_products_of_groups_are_exact(group_size):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-255, 256, (2, 3, 40), generator=generator)
    weight = torch.randint(-255, 256, (7, 40), generator=generator)
    x = Dyadic(codes, torch.full((2, 3, 1), 150), torch.full((2, 3, 1), 12))
    size = group_size or 40
    scale = fixed(normal(7, -(-40 // size)).abs())
    y = ints(integer.matmul, x, weight, scale, group_size, None)
    for b, t, n in itertools.product(range(2), range(3), range(7)):
        expected = sum(int(codes[b, t, k]) * int(weight[n, k]) * int(scale.codes[n, k // size]) for k in range(40))
        assert y.codes[b, t, n] == expected
    assert y.k[0, 0, 0] == 12 + scale.k and torch.equal(y.m, x.m)


def test_constants_are_added_on_the_scale_of_the_row():
    x, bias = from_float(normal(4, 9) * torch.tensor([[1], [30], [1e-2], [1]])), normal(9, seed=1) * 5
    wide = x._replace(codes=x.codes << 16, k=x.k + 16)
    y = to_float(ints(integer.add_constant, wide, fixed(bias)))
    torch.testing.assert_close(y, to_float(x) + bias, rtol=0, atol=2.0**-15 * 16)
    zero = Dyadic(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([[128]]), torch.tensor([[70]]))
    torch.testing.assert_close(to_float(ints(integer.add_constant, zero, fixed(bias)))[0], bias, rtol=0, atol=1e-6)


def test_sums_and_shared_scales_keep_sixteen_bits():
    x, y = from_float(normal(6, 9)), from_float(normal(6, 9, seed=1) * torch.logspace(-3, 3, 6)[:, None])
    total = to_float(ints(integer.add, x, y))
    assert ((total - to_float(x) - to_float(y)).abs() <= 2.0**-8 * torch.maximum(steps(x), steps(y))).all()
    codes, k = ints(integer.on_one_scale, y, 0)
    assert codes.shape == (6, 9) and k.shape == (1, 1)
    torch.testing.assert_close(
        torch.ldexp(codes.double(), -k), to_float(y), rtol=0, atol=float(2.0**-8 * steps(y).max())
    )


def test_the_exponential_is_the_papers_to_its_last_bits():
    """2^-f as a straight line is too large by up to 6.2 %, 1.4375 for log2 e by 0.4 % of x."""
    x = torch.linspace(-15, 0, 4001, dtype=torch.float64)[:, None]
    m, k = torch.full((4001, 1), 1 << 7), torch.full((4001, 1), 20)
    codes = (x * 2**13).round().long()
    ours = ints(integer.exp, Dyadic(codes, m, k)).double() / 2**integer.FRACTION
    y = -x * 1.4375
    line = torch.exp2(-y.floor()) * (1 - (y - y.floor()) / 2)
    torch.testing.assert_close(ours, line, rtol=0, atol=2.0**-integer.FRACTION * 2)
    ratio = (ours / x.exp())[x > -4]
    assert ratio.min() > 0.99 and 1.06 < ratio.max() < 1.08
    assert (ours - x.exp()).abs().max() < 0.045
    assert ours[-1] == 1


def softmax(scores, mask, fmt=EIGHT):
    wide = from_float(scores)
    return ints(integer.clipped_softmax, wide._replace(codes=wide.codes << 8, k=wide.k + 8), mask, fmt)


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0, 100.0])
def test_the_clipped_softmax(size):
    scores, mask = normal(2, 30, 30) * size, torch.ones(30, 30, dtype=torch.bool).tril()
    p = to_float(softmax(scores, mask))
    expected = scores.masked_fill(~mask, -math.inf).softmax(-1)
    assert not p[:, ~mask].any()
    assert (p.sum(-1) - 1).abs().max() < 0.02
    assert (p - expected).abs().max() < 0.045
    assert (p[:, 0, 0] - 1).abs().max() < 0.005  # alone in its row
    assert not softmax(scores, torch.zeros_like(mask)).codes.any()


def test_scores_far_below_one_are_all_alike():
    codes, mask = torch.arange(4)[None] << 30, torch.ones(1, 4, dtype=torch.bool)
    for k in (60, 83, 99):
        p = ints(integer.clipped_softmax, Dyadic(codes, torch.tensor([[2**15]]), torch.tensor([[k]])), mask, EIGHT)
        assert (to_float(p) - 0.25).abs().max() < 0.005


def test_scores_are_clipped_at_fifteen_below_the_largest():
    """So a far outlier does not widen the grid of the others."""
    scores, mask = torch.tensor([[0.0, -1.0, -2.0, -1e4]], dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    p = to_float(softmax(scores, mask))
    assert (p - scores.softmax(-1)).abs().max() < 0.02
    before = softmax(torch.tensor([[0.0, -15.0]]).double(), mask[:, :2], WIDE)
    after = softmax(torch.tensor([[0.0, -1000.0]]).double(), mask[:, :2], WIDE)
    assert torch.equal(before.codes, after.codes)


def test_the_sigmoid():
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)[:, None]
    ours = ints(integer.sigmoid, from_float(x)).double() / 2**integer.FRACTION
    assert (ours - x.sigmoid()).abs().max() < 0.016
    assert (ours + ours.flip(0) - 1).abs().max() < 1e-4
    assert (ours / x.sigmoid() - 1)[x > -5].abs().max() < 0.1


def test_swiglu_of_smoothed_operands():
    gate, up, s = normal(20, 50) * 3, normal(20, 50, seed=1), torch.ones(50, dtype=torch.float64)
    s[::7] = 1 / 30
    gate, up = gate / s, up * s  # outlier channels, of the gate
    expected = torch.nn.functional.silu(gate) * up

    def error(smoothing):
        operands = (integer.quantize(from_float(x), EIGHT) for x in (gate * smoothing, up / smoothing))
        ours = to_float(ints(integer.swiglu, *operands, fixed(1 / smoothing)))
        return (ours - expected).norm() / expected.norm()

    assert error(s) < 0.02 < 0.1 < error(torch.ones_like(s))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_norms(size):
    x, weight, bias, eps = normal(6, 64) * size, 1 + normal(64, seed=1), normal(64, seed=2), 1e-5
    x[0, 5] *= 1000  # an outlier channel
    x[1] = 0
    rooted, epsilon = fixed(weight * 8), fixed((64 * eps) ** 0.5)
    ours = to_float(ints(integer.rms_norm, from_float(x), rooted, epsilon))
    expected = torch.nn.functional.rms_norm(to_float(from_float(x)), (64,), weight, eps)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    ours = to_float(ints(integer.layer_norm, from_float(x), rooted, fixed(bias), epsilon))
    expected = torch.nn.functional.layer_norm(to_float(from_float(x)), (64,), weight, bias, eps)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
