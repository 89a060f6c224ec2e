import itertools

import numpy as np
import pytest
import torch

from abq_llm.kernels import reference
from tests import oracle

SCHEMES = [
    "W1A1",
    "W1*A1",
    "W1A8",
    "W1*A8g32",
    "W2A2g33",
    "W2*A8",
    "W2*A4g128",
    "W3A5g100",
    "W4A4",
    "W4A8g128",
    "W5A3g1",
    "W6A6g64",
    "W7A7",
    "W7*A7",
    "W8A8",
    "W8*A8g32",
    "W8A1",
    "W2*A16",
    "W4A16g128",
    "W8*A16g50",
]
SHAPES = [(1, 1, 1), (3, 33, 5), (2, 257, 8), (reference.TOKENS["cpu"] + 3, 70, 9)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["auto", "float32", "float64"])
def way(request, monkeypatch):
    """The way of `integer_product` that this machine chooses, and those of others: no int8, then no fp32 either."""
    if request.param != "auto":
        monkeypatch.setattr(reference, "_int8_products_are_exact", lambda: False)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if request.param == "float64" else "ieee"
    yield
    settings.fp32_precision = before


def operand(rows, columns, dtype, generator):
    low, high = (-128, 128) if dtype == torch.int8 else (-255, 256)
    values = torch.randint(low, high, (rows, columns), generator=generator)
    values[0], values[-1] = low, high - 1
    return values.to(dtype)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 255, 256, 257, 1000, 2**15, 2**15 + 1, 2**16 + 5])
def test_integer_product_is_exact(k):
    generator = torch.Generator().manual_seed(k)
    for left, right in itertools.product((torch.int8, torch.int16), repeat=2):
        for m, n in [(1, 1), (2, 3), (17, 5)] if k < 2**15 else [(2, 3)]:
            a, b = operand(m, k, left, generator), operand(n, k, right, generator)
            product = reference.integer_product(a, b)
            assert product.dtype == (torch.int32 if k <= 2**15 else torch.int64)
            expected = (a[:, None].long() * b[None].long()).sum(-1)
            assert torch.equal(product.long(), expected), (left, right, m, n)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("k", [1, 256, 2**15, 2**15 + 1])
def test_integer_product_at_the_extremes(k):
    for a, b in itertools.product((-255, -128, 127, 255), repeat=2):
        dtypes = [torch.int8 if -128 <= value <= 127 else torch.int16 for value in (a, b)]
        left, right = (torch.full((2, k), value, dtype=dtype) for value, dtype in zip((a, b), dtypes, strict=True))
        assert (reference.integer_product(left, right).long() == a * b * k).all(), (a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_is_the_formula_in_float64(scheme, dtype):
    flags = itertools.product((False, True), repeat=2)
    for index, ((m, k, n), symmetric) in enumerate(itertools.product(SHAPES, flags)):
        scale_dtype = DTYPES[index % 3]
        case = oracle.make_case(
            scheme, k, n, bias=index % 2 == 0, symmetric=symmetric, dtype=dtype, scale_dtype=scale_dtype, seed=index
        )
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(index)).to(dtype) + 0.5
        x[-1] = 0
        y = reference.linear(x, case.layer.packed_weight(), case.layer.bias, case.scheme)
        expected, tolerance = oracle.linear(case, x)
        assert y.dtype == dtype
        assert y.shape == (m, n)
        distance = np.abs(y.double().numpy() - expected)
        assert (distance <= tolerance).all(), (m, k, n, symmetric, (distance / tolerance).max())


@pytest.mark.parametrize("scheme", ["W1*A8g32", "W3A5", "W2*A16g33", "W8*A16", "W8A8g7"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dequantize_weight(scheme, symmetric):
    case = oracle.make_case(scheme, 70, 6, symmetric=(symmetric, False))
    dequantized = reference.dequantize_weight(case.layer.packed_weight(), case.scheme, 70)
    assert dequantized.dtype == torch.float32
    for g, columns in enumerate(oracle.groups_of(case.scheme, 70)):
        expected = (case.codes[:, columns] - case.zero[:, g, None]) * case.scale[:, g, None]
        assert np.array_equal(dequantized[:, columns].numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("scheme", ["W1A1", "W1*A3", "W2*A8", "W3A2", "W4A4", "W8A8", "W8*A8"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_integers_are_the_binary_decomposition_of_the_paper(scheme, symmetric):
    """sum_k q_w q_x = sum_i sum_j 2^(i+j) popcount(plane_i(W) & plane_j(X)), corrected for the zero points."""
    m, k, n = 4, 45, 5
    case = oracle.make_case(scheme, k, n, bias=False, symmetric=(symmetric, symmetric), unit_scale=True)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
    scale, z_x, q_x = oracle.contract(x.numpy(), case.scheme.activation)
    z_x, q_x = z_x.astype(int), q_x.astype(int)
    planes_w = case.layer.weight_packed.tolist()
    planes_x = oracle.pack(q_x.tolist(), case.scheme.activation.planes)
    products = np.zeros((m, n), dtype=int)
    for (i, w), (j, a) in itertools.product(enumerate(planes_w), enumerate(planes_x)):
        for row, column in itertools.product(range(m), range(n)):
            words = zip(a[row], w[column], strict=True)
            products[row, column] += sum(((left & right) % 2**32).bit_count() for left, right in words) << i + j
    z_w = case.zero[:, 0]
    products += -z_x * case.codes.sum(1) - q_x.sum(1, keepdims=True) * z_w + k * z_x * z_w
    y = reference.linear(x, case.layer.packed_weight(), None, case.scheme)
    assert np.array_equal(y.numpy(), products.astype(np.float32) * scale)
