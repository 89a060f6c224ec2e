import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abq_llm.quantizers import (
    MIN_SCALE,
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_dynamic,
    from_groups,
    quantize,
    storable_scale,
    to_groups,
)
from abq_llm.scheme import IntFormat
from tests import oracle

FORMATS = st.sampled_from(oracle.FORMATS)
SCALE_DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def matrices(draw, limit=1e4):
    """fp32 [M, K]: any floats, or a shifted normal distribution with outliers and rows of zeros, of any magnitude."""
    m, k = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    if draw(st.booleans()):
        numbers = st.floats(-limit, limit, width=32)
        return torch.tensor(draw(st.lists(numbers, min_size=k, max_size=k)), dtype=torch.float32)[None]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.normal(size=(m, k)) + draw(st.sampled_from([0, 0, 3, -3, 100]))
    x[rng.random((m, k)) < 0.05] *= 30
    x[rng.random(m) < 0.1] = 0
    return torch.from_numpy(x * 10.0 ** draw(st.integers(-8, 1))).float()


@settings(deadline=None, max_examples=300)
@given(matrices(), FORMATS, SCALE_DTYPES)
def test_the_fp32_contract_bit_for_bit(x, fmt, scale_dtype):
    scale, zero, codes = oracle.contract(x.numpy(), fmt, scale_dtype)
    qparams = choose_qparams(x, fmt, scale_dtype=scale_dtype)
    assert qparams.scale.dtype == qparams.zero_point.dtype == torch.float32
    assert np.array_equal(qparams.scale.numpy().view(np.int32), scale.view(np.int32))
    assert np.array_equal(qparams.zero_point.numpy(), zero)
    quantized = quantize(x, qparams, fmt)
    assert quantized.dtype == torch.int16
    assert np.array_equal(quantized.numpy(), codes)
    assert np.array_equal(fake_quantize(x, qparams, fmt).numpy(), (codes - zero) * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", oracle.FORMATS, ids=str)
def test_half_precision_input_is_quantized_in_fp32(dtype, fmt):
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, _, codes = oracle.contract(x.float().numpy(), fmt)
    qparams = choose_qparams(x, fmt)
    assert np.array_equal(qparams.scale.numpy(), scale)
    assert np.array_equal(quantize(x, qparams, fmt).numpy(), codes)
    assert fake_quantize(x, qparams, fmt).dtype == torch.float32


def test_ties_go_to_even():
    qparams = QParams(torch.tensor([[1.0]]), torch.tensor([[4.0]]))
    assert quantize(torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]]), qparams, IntFormat(4)).tolist() == [
        [2, 2, 4, 4, 6, 6]
    ]


@settings(deadline=None, max_examples=200)
@given(matrices(), FORMATS, SCALE_DTYPES, st.floats(0.1, 1), st.floats(0.1, 1))
def test_the_grid(x, fmt, scale_dtype, clip_hi, clip_lo):
    """Codes and zero points in range, scales storable, zero exact, order kept, error at most half a step."""
    qparams = choose_qparams(x, fmt, clip_hi=clip_hi, clip_lo=clip_lo, scale_dtype=scale_dtype)
    scale, zero = qparams
    assert scale.shape == zero.shape == (len(x), 1)
    assert (scale >= MIN_SCALE).all()
    assert torch.equal(scale.to(scale_dtype).float(), scale)
    assert torch.equal(zero, zero.round().clamp(0, fmt.qmax))
    codes = quantize(x, qparams, fmt)
    assert codes.min() >= 0
    assert codes.max() <= fmt.qmax
    assert (fake_quantize(torch.zeros_like(x), qparams, fmt) == 0).all()
    assert (quantize(x.sort().values, qparams, fmt).diff() >= 0).all()
    lowest, highest = -zero * scale, (fmt.qmax - zero) * scale
    y = fake_quantize(x, qparams, fmt)
    error = (x.clamp(lowest, highest) - y).abs()
    assert (error <= scale * (0.5 + 1e-4)).all()  # 1e-4: fp32 roundings of numbers up to 256 steps
    assert torch.equal(y, dequantize(codes, qparams))


@settings(deadline=None, max_examples=200)
@given(matrices(), FORMATS)
def test_min_max_grids_reach_the_whole_range(x, fmt):
    """Without clipping nothing is further than one step off (half for the zero point, half for the code)."""
    if fmt.symmetric:
        x = -x.abs()  # a symmetric grid has one more step below zero than above: its upper end may be a step short
    qparams = choose_qparams(x, fmt)
    assert ((x - fake_quantize(x, qparams, fmt)).abs() <= qparams.scale * (1 + 1e-4)).all()


@settings(deadline=None)
@given(FORMATS, st.floats(MIN_SCALE, 1e4, width=32), SCALE_DTYPES)
def test_codes_are_idempotent(fmt, scale, scale_dtype):
    """quantize(dequantize(q)) == q for every code and every zero point."""
    scale = storable_scale(torch.tensor([scale]), scale_dtype).expand(fmt.levels, 1)
    zero = torch.arange(fmt.levels)[:, None].float()
    codes = torch.arange(fmt.levels, dtype=torch.int16).expand(fmt.levels, -1)
    qparams = QParams(scale, zero)
    assert torch.equal(quantize(dequantize(codes, qparams), qparams, fmt), codes)


@settings(deadline=None)
@given(matrices(), st.sampled_from([fmt for fmt in oracle.FORMATS if fmt.balanced]))
def test_balanced_grids_are_odd(x, fmt):
    assert torch.equal(choose_qparams(x, fmt).scale, choose_qparams(-x, fmt).scale)
    assert (fake_quantize_dynamic(x, fmt) == -fake_quantize_dynamic(-x, fmt)).all()


@pytest.mark.parametrize("fmt", oracle.FORMATS, ids=str)
def test_degenerate_rows(fmt):
    zeros = choose_qparams(torch.zeros(2, 5), fmt)
    assert (zeros.scale == MIN_SCALE).all()
    assert (fake_quantize(torch.zeros(2, 5), zeros, fmt) == 0).all()
    empty = choose_qparams(torch.empty(0, 5), fmt)
    assert empty.scale.shape == empty.zero_point.shape == (0, 1)
    constant = torch.full((1, 5), -7.0)
    assert torch.allclose(fake_quantize_dynamic(constant, fmt), constant, rtol=1e-6)


def test_scales_are_rounded_before_the_zero_point_is_chosen():
    """With the scale 0.1 of fp32 the zero point would be 127; the nearest fp16, 0.09998, makes it 128."""
    x = torch.tensor([[-12.749, 12.751]])
    exact, stored = (choose_qparams(x, IntFormat(8), scale_dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert stored.scale.item() == torch.tensor(0.1).half().item()
    assert (exact.zero_point.item(), stored.zero_point.item()) == (127, 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_storable_scale(dtype):
    scale = torch.tensor([0.0, 2.0**-30, MIN_SCALE, 1.3e-5, 0.1, 1 / 3, 1000.1], requires_grad=True)
    rounded = storable_scale(scale, dtype)
    assert torch.equal(rounded, scale.detach().clamp_min(MIN_SCALE).to(dtype).float())
    rounded.sum().backward()
    assert scale.grad.tolist() == [0, 0, 1, 1, 1, 1, 1]


def straight_through(x, scale, zero_point, fmt):
    """fake_quantize as a composition that autograd differentiates by itself."""
    t = x * (1 / scale)
    t = t + (t.round() - t).detach()
    return ((t + zero_point).clamp(0, fmt.qmax) - zero_point) * scale


@pytest.mark.parametrize("fmt", oracle.FORMATS, ids=str)
@pytest.mark.parametrize("clip", [1.0, 0.5])
def test_gradients_are_straight_through(fmt, clip):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 50, generator=generator) + 0.3
    qparams = choose_qparams(x, fmt, clip_hi=clip, clip_lo=clip)
    upstream = torch.randn(x.shape, generator=generator)
    grads = []
    for function in (
        lambda *args: fake_quantize(args[0], QParams(*args[1:]), fmt),
        lambda *a: straight_through(*a, fmt),
    ):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *qparams)]
        y = function(*leaves)
        assert torch.equal(y, fake_quantize(x, qparams, fmt))
        grads.append(torch.autograd.grad(y, leaves, upstream))
    for ours, naive in zip(*grads, strict=True):
        assert ours.shape == naive.shape
        assert torch.allclose(ours, naive, rtol=1e-4, atol=1e-4 * naive.abs().max().item())
    unclamped = (x * (1 / qparams.scale)).round() + qparams.zero_point
    inside = (unclamped >= 0) & (unclamped <= fmt.qmax)
    assert torch.equal(grads[0][0], upstream * inside)
    if clip < 1 and fmt.bits > 1:
        assert not inside.all()
        assert inside.any()


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_one_input_alone(needed):
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    fmt = IntFormat(2)
    qparams = choose_qparams(x, fmt, clip_hi=0.5)
    leaves = [leaf.clone().requires_grad_(need) for leaf, need in zip((x, *qparams), needed, strict=True)]
    fake_quantize(leaves[0], QParams(*leaves[1:]), fmt).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needed)


def test_clip_factors_learn():
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    hi, lo = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    for fmt, expected in [(IntFormat(4), (hi / 15, -lo / 15)), (IntFormat(3, symmetric=True), None)]:
        clips = [torch.full((6, 1), 0.9, requires_grad=True) for _ in range(2)]
        qparams = choose_qparams(x, fmt, clip_hi=clips[0], clip_lo=clips[1], scale_dtype=torch.float16)
        grads = torch.autograd.grad(qparams.scale.sum(), clips, retain_graph=True)
        if expected is None:  # only the end that sets the scale is responsible for it
            wins = hi > -lo
            expected = (torch.where(wins, hi / 3, 0), torch.where(wins, 0, -lo / 3))
        for grad, wanted in zip(grads, expected, strict=True):
            assert torch.allclose(grad, wanted, rtol=1e-5)
        fake_quantize(x, qparams, fmt).square().sum().backward()
        assert all(clip.grad.isfinite().all() and clip.grad.any() for clip in clips)


def test_dynamic_quantization_is_per_token_and_keeps_the_dtype():
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([[[1.0], [50.0], [0.01]]])
    assert fake_quantize_dynamic(x, None) is x
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        y = fake_quantize_dynamic(x.to(dtype), IntFormat(8))
        assert y.dtype == dtype
        assert torch.equal(y[1, 2], fake_quantize_dynamic(x[1, 2].to(dtype), IntFormat(8)))
        assert ((y - x).abs() <= x.abs().amax(-1, keepdim=True) / 60).all()


@pytest.mark.parametrize("fmt", oracle.FORMATS, ids=str)
@pytest.mark.parametrize("shift", [0.3, 5.0, -5.0])
def test_dynamic_gradients_are_those_of_the_composition(fmt, shift):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(40, 50, generator=generator) + shift).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator)
    y, composed = fake_quantize_dynamic(x, fmt), fake_quantize(x, choose_qparams(x, fmt), fmt)
    assert torch.equal(y, composed)
    (grad,), (expected,) = (torch.autograd.grad(output, x, upstream) for output in (y, composed))
    assert torch.allclose(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("k", "size"), [(8, None), (8, 4), (10, 4), (3, 4), (5, 1), (129, 128)])
def test_groups(k, size):
    weight = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    grouped = to_groups(weight, size)
    width = min(size or k, k)
    assert grouped.shape == (3, -(-k // width), width)
    assert torch.equal(from_groups(grouped, k), weight)
    assert from_groups(grouped, grouped.shape[1] * width)[:, k:].count_nonzero() == 0
    for fmt in oracle.FORMATS:
        qparams = choose_qparams(grouped, fmt)
        for group, part in enumerate(weight.split(width, 1)):
            alone = choose_qparams(part, fmt)
            assert torch.equal(qparams.scale[:, group], alone.scale)
            assert torch.equal(qparams.zero_point[:, group], alone.zero_point)
