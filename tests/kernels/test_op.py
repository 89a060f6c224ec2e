"""One contract for every backend, and the op `abq_llm::linear` around them."""

import itertools

import numpy as np
import pytest
import torch

from abq_llm import kernels
from abq_llm.errors import AbqError
from abq_llm.kernels import BACKENDS
from abq_llm.packing import unpack_planes
from abq_llm.quantizers import choose_qparams, quantize
from tests import oracle

CONTRACT_SCHEMES = [
    "W1A1",
    "W1*A8",
    "W2*A8",
    "W2A4g32",
    "W3A5g48",
    "W4A8g128",
    "W7A7",
    "W8A8",
    "W8*A8g33",
    "W4A16g32",
    "W2*A16",
]


class PlaneByPlane:
    """A backend with a layout of its own: boolean planes, multiplied one pair at a time (the paper's decomposition)."""

    prepared = 0

    def available(self, device):
        return None if device.type in ("cpu", "cuda") else "it has no planes there"

    def prepare(self, weight, scheme, in_features):
        self.prepared += 1
        packed, scale, *zero_point = weight
        codes = unpack_planes(packed, in_features)
        planes = torch.stack([(codes >> plane & 1).bool() for plane in range(scheme.planes)])
        fixed = scheme.weight.fixed_zero_point
        zero = zero_point[0].double() if zero_point else torch.full_like(scale, fixed, dtype=torch.float64)
        return [planes, scale.float(), zero]

    def linear(self, x, weight, bias, scheme):
        planes, scale, zero = weight
        size = scheme.group_size or x.shape[1]
        y = torch.zeros(len(x), planes.shape[1], device=x.device)
        if scheme.activation is None:
            codes = sum(plane.double() * 2**i for i, plane in enumerate(planes))
            group = torch.arange(x.shape[1], device=x.device) // size
            w = ((codes - zero[:, group]).float() * scale[:, group]).to(x.dtype)
            y = x.float() @ w.float().t()
            return (y if bias is None else y + bias).to(x.dtype)
        qparams = choose_qparams(x, scheme.activation)
        q = quantize(x, qparams, scheme.activation)
        for g, (w, a) in enumerate(zip(planes.split(size, 2), q.split(size, 1), strict=True)):
            pairs = itertools.product(range(len(w)), range(scheme.activation.planes))
            total = sum(((a >> j & 1).double() @ w[i].double().t()) * 2 ** (i + j) for i, j in pairs)
            row_sum = sum(plane.double().sum(1) * 2**i for i, plane in enumerate(w))
            z_x, z_w = qparams.zero_point.double(), zero[:, g]
            total += -z_x * row_sum - a.double().sum(1, keepdim=True) * z_w + a.shape[1] * z_x * z_w
            y += total.float() * scale[:, g]
        y *= qparams.scale
        return (y if bias is None else y + bias).to(x.dtype)


BACKENDS_AND_TOY = {**BACKENDS, "plane-by-plane": PlaneByPlane()}
DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
RUNNABLE = [
    (name, device)
    for name, candidate in BACKENDS_AND_TOY.items()
    for device in DEVICES
    if candidate.available(device) is None
]


@pytest.fixture(params=RUNNABLE, ids=lambda param: f"{param[0]}-{param[1]}")
def backend(request, monkeypatch):
    """(name, device): every backend of this installation wherever it can run here, and one that only this file has."""
    monkeypatch.setattr(kernels, "BACKENDS", BACKENDS_AND_TOY)
    return request.param


def layer_of(case, backend):
    name, device = backend
    case.layer.backend = name
    return case.layer.to(device)


def tokens(m, k, dtype, seed=0):
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


# --- what every backend has to do


@pytest.mark.parametrize("scheme", [scheme for scheme in CONTRACT_SCHEMES if "A16" not in scheme])
@pytest.mark.parametrize("symmetric", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_integers_are_bit_exact(backend, scheme, symmetric):
    """Every scale is 1 and every sum is below 2^24, so the output in fp32 is the integer itself."""
    for seed, (m, k, n) in enumerate([(1, 1, 1), (2, 31, 3), (5, 130, 17), (67, 200, 40)]):
        case = oracle.make_case(scheme, k, n, bias=False, symmetric=symmetric, unit_scale=True, seed=seed)
        fmt = case.scheme.activation
        zero = fmt.qmax // 3 if fmt.fixed_zero_point is None else fmt.fixed_zero_point
        rng = np.random.default_rng(seed)
        x = rng.integers(0, fmt.qmax + 1, (m, k)) - zero
        if k > 1:
            x[:, 0], x[:, -1] = -zero, fmt.qmax - zero
            if fmt.fixed_zero_point is not None:
                x[:, 0] = zero - fmt.qmax or -1  # the larger side sets the scale: one step shorter below zero
                x = x.clip(zero - fmt.qmax or -1, fmt.qmax - zero)
        else:
            x[:] = fmt.qmax - zero or -1
            if fmt.fixed_zero_point is None:
                x[:] = fmt.qmax
        expected = np.zeros((m, n), dtype=np.int64)
        for g, columns in enumerate(oracle.groups_of(case.scheme, k)):
            expected += x[:, columns] @ (case.codes[:, columns] - case.zero[:, g, None]).T
        assert np.abs(expected).max() < 2**24
        x = torch.from_numpy(x).float()
        assert (choose_qparams(x, fmt).scale == 1).all()
        y = layer_of(case, backend)(x.to(backend[1]))
        assert np.array_equal(y.cpu().numpy(), expected), (m, k, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", CONTRACT_SCHEMES)
def test_backend_is_the_formula(backend, scheme, dtype):
    for seed, (m, k, n) in enumerate([(1, 33, 5), (7, 130, 16), (40, 64, 9)]):
        symmetric = (seed == 1, seed == 2)
        case = oracle.make_case(scheme, k, n, bias=seed != 1, symmetric=symmetric, dtype=dtype, seed=seed)
        x = tokens(m, k, dtype)
        x[0] = 0
        expected, tolerance = oracle.linear(case, x)
        y = layer_of(case, backend)(x.to(backend[1])).cpu()
        assert y.dtype == dtype
        distance = np.abs(y.double().numpy() - expected)
        assert (distance <= tolerance).all(), (m, k, n, (distance / tolerance).max())


@pytest.mark.parametrize("scheme", ["W2*A8", "W4A8g32", "W4A16g32"])
def test_any_shape_of_input(backend, scheme):
    case = oracle.make_case(scheme, 70, 9)
    layer = layer_of(case, backend)
    x = tokens(12, 70, torch.float32).to(backend[1])
    y = layer(x)
    assert y.shape == (12, 9)
    close = {"rtol": 1e-5, "atol": 1e-5}  # A16: the order of the sums may depend on M
    torch.testing.assert_close(layer(x.view(2, 3, 2, 70)), y.view(2, 3, 2, 9), **close)
    torch.testing.assert_close(layer(x[5]), y[5], **close)
    strided = torch.stack([x, torch.full_like(x, 1e3)], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(layer(strided), y, **close)
    torch.testing.assert_close(layer(x.view(3, 4, 70).transpose(0, 1)), y.view(3, 4, 9).transpose(0, 1), **close)
    torch.testing.assert_close(layer(x[::3]), y[::3], **close)
    for empty in [(0, 70), (2, 0, 70)]:
        assert layer(torch.empty(empty, device=backend[1])).shape == (*empty[:-1], 9)


@pytest.mark.parametrize("scheme", ["W2*A8", "W4A8g32", "W4A16g32"])
def test_arguments_are_left_alone(backend, scheme):
    case = oracle.make_case(scheme, 70, 9)
    layer = layer_of(case, backend)
    x = tokens(3, 70, torch.float32).to(backend[1])
    before = [tensor.clone() for tensor in (x, layer.bias, *layer.packed_weight())]
    first = layer(x)
    second = layer(x)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    for old, new in zip(before, (x, layer.bias, *layer.packed_weight()), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("scheme", ["W2*A8", "W4A8g32", "W4A16g32"])
def test_autocast_changes_nothing(backend, scheme):
    case = oracle.make_case(scheme, 70, 9)
    layer = layer_of(case, backend)
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens(3, 70, dtype).to(backend[1])
        plain = layer(x)
        with torch.autocast(backend[1].type, torch.bfloat16):
            inside = layer(x)
        assert inside.dtype == dtype
        assert torch.equal(inside, plain)


@pytest.mark.parametrize("scheme", ["W2*A8", "W4A8g32", "W4A16g32"])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(backend, scheme, bias):
    case = oracle.make_case(scheme, 70, 9, bias=bias, symmetric=(True, True))
    layer = layer_of(case, backend)
    name, weight = layer._prepare()
    x = tokens(6, 70, torch.float32).to(backend[1]).view(2, 3, 70)
    results = torch.library.opcheck(
        torch.ops.abq_llm.linear.default, (x, weight, layer.bias, 9, str(case.scheme), True, True, name)
    )
    assert len(results) >= 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("scheme", ["W2*A8", "W4A8g32", "W4A16g32"])
@pytest.mark.parametrize("prepared", [False, True])
def test_compiles_without_a_graph_break(backend, scheme, prepared):
    torch._dynamo.reset()
    case = oracle.make_case(scheme, 70, 9, bias=True)
    layer = layer_of(case, backend).to(torch.bfloat16)
    x = tokens(12, 70, torch.float32).to(backend[1])
    if prepared:
        layer(x)
    model = torch.nn.Sequential(torch.nn.Identity(), layer, torch.nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (x, x[:5], x.view(3, 4, 70)):
        assert torch.equal(compiled(rows), layer(rows).relu())


# --- the op


def test_meta_tensors():
    case = oracle.make_case("W4A8g32", 70, 9, dtype=torch.bfloat16)
    layer = case.layer.to("meta")
    layer.backend = "reference"
    y = layer(torch.empty(2, 3, 70, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 9), torch.bfloat16, "meta")


def test_choose_backend(monkeypatch):
    monkeypatch.setattr(kernels, "BACKENDS", {"plane-by-plane": PlaneByPlane(), **BACKENDS})
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert kernels.choose_backend("auto", cpu) == "plane-by-plane"
    assert kernels.choose_backend("auto", meta) == "reference"
    assert kernels.choose_backend("reference", cpu) == "reference"
    with pytest.raises(AbqError, match="backend 'plane-by-plane' cannot run on meta: it has no planes there"):
        kernels.choose_backend("plane-by-plane", meta)
    with pytest.raises(
        AbqError, match="unknown backend 'fast'; this installation has plane-by-plane, cuda, cpu, reference"
    ):
        kernels.choose_backend("fast", cpu)
    with pytest.raises(AbqError, match="backend 'cuda' cannot run on cpu: it needs an NVIDIA GPU"):
        kernels.choose_backend("cuda", cpu)
