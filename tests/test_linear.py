import copy

import pytest
import torch
from torch import nn

from abq_llm import kernels
from abq_llm.errors import AbqError
from abq_llm.kernels import BACKENDS, reference
from abq_llm.linear import QuantLinear, buffer_layout, set_backend
from abq_llm.quantizers import QParams, choose_qparams, fake_quantize, fake_quantize_dynamic, from_groups, to_groups
from abq_llm.scheme import Scheme

SCHEMES = ["W1A8", "W1*A8", "W2*A8g32", "W3A5g48", "W4A4", "W4A8g128", "W8A8", "W8*A8", "W4A16g32", "W2*A16"]


class Spy:
    """The reference backend, counting what it is asked to prepare."""

    def __init__(self):
        self.prepared = 0

    available = staticmethod(reference.available)
    linear = staticmethod(reference.linear)

    def prepare(self, weight, scheme, in_features):
        self.prepared += 1
        return [tensor.clone() for tensor in weight]


@pytest.fixture
def spy(monkeypatch):
    backend = Spy()
    monkeypatch.setattr(kernels, "BACKENDS", {"spy": backend, **BACKENDS})
    return backend


def quantized(text, k=70, n=9, *, bias=True, dtype=torch.float32, scale_dtype=torch.float16, seed=0, **flags):
    """(QuantLinear, fp32 [N, K]: the fake-quantized weight it should stand for)."""
    torch.manual_seed(seed)
    scheme = Scheme.parse(text, **flags)
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    grouped = to_groups(linear.weight.detach(), scheme.group_size)
    qparams = choose_qparams(grouped, scheme.weight, scale_dtype=scale_dtype)
    weight = from_groups(fake_quantize(grouped, qparams, scheme.weight), k)
    return QuantLinear.from_linear(linear, qparams, scheme, scale_dtype), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("text", SCHEMES)
def test_dequantize_is_the_fake_quantized_weight(text, symmetric, dtype):
    for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer, weight = quantized(text, dtype=dtype, scale_dtype=scale_dtype, weight_symmetric=symmetric)
        assert torch.equal(layer.dequantize(), weight)
        layout = buffer_layout(70, 9, layer.scheme, scale_dtype)
        assert {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items() if name != "bias"} == layout
        assert ("weight_zero_point" in layout) == (not symmetric and "*" not in text)
        assert layer.bias.dtype == dtype


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_linear_of_the_fake_quantized_operands(text, bias):
    for flags in ({}, {"weight_symmetric": True, "activation_symmetric": True}):
        layer, weight = quantized(text, bias=bias, **flags)
        x = torch.randn(4, 3, 70) + 0.3
        expected = nn.functional.linear(fake_quantize_dynamic(x, layer.scheme.activation), weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_stored_bits_are_those_of_the_scheme():
    for text in SCHEMES:
        for k, n in [(70, 9), (64, 4), (256, 3)]:
            layer = QuantLinear(k, n, Scheme.parse(text))
            bits = sum(tensor.numel() * tensor.element_size() * 8 for tensor in layer.packed_weight())
            assert bits == pytest.approx(layer.scheme.bits_per_weight(n, k) * n * k)


def test_the_bias_is_a_copy():
    linear = nn.Linear(32, 4)
    scheme = Scheme.parse("W4A8")
    layer = QuantLinear.from_linear(
        linear, choose_qparams(to_groups(linear.weight.detach(), None), scheme.weight), scheme
    )
    before = linear.bias.detach().clone()
    layer.bias.zero_()
    assert torch.equal(linear.bias, before)
    assert not layer.bias.requires_grad


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
def test_conversions_leave_the_scales_alone(scale_dtype, convert):
    layer, weight = quantized("W3A8g32", scale_dtype=scale_dtype)
    before = layer.weight_scale.clone()
    model = convert(nn.Sequential(layer))
    assert layer.weight_scale.dtype == scale_dtype
    assert torch.equal(layer.weight_scale, before)
    assert (
        layer.bias.dtype
        == {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[convert.__name__]
    )
    assert torch.equal(layer.dequantize(), weight)
    model.to(torch.bfloat16)
    assert layer.weight_scale.dtype == scale_dtype
    model.to("meta", torch.float16)
    assert layer.weight_scale.is_meta
    assert layer.weight_scale.dtype == scale_dtype


def test_state_dict_round_trip():
    layer, weight = quantized("W4A8g32")
    other = QuantLinear(70, 9, layer.scheme, bias=True, dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), weight)
    empty = QuantLinear(70, 9, layer.scheme, bias=True, dtype=torch.float32, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.dequantize(), weight)
    x = torch.randn(2, 70)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_prepare_is_called_once_and_again_for_another_weight(spy):
    layer, _ = quantized("W4A8")
    x = torch.randn(2, 70)
    layer(x)
    layer(x[:1])
    layer.half()
    layer(x)
    assert spy.prepared == 1
    other, _ = quantized("W4A8", seed=1)
    for tensor in ("weight_packed", "weight_scale", "weight_zero_point", "bias"):
        setattr(layer, tensor, getattr(other, tensor))
    assert torch.equal(layer(x), other(x))
    assert spy.prepared == 3  # one for each of the layers
    layer.backend = "reference"
    layer(x)
    assert spy.prepared == 3


def test_prepare_is_called_again_after_loading_in_place(spy):
    layer, _ = quantized("W4A8")
    other, _ = quantized("W4A8", seed=1)
    x = torch.randn(2, 70)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_another_bias_is_used():
    layer, _ = quantized("W4A4", dtype=torch.float16)
    x = torch.randn(3, 70)
    before = layer(x)
    layer.bias = torch.zeros_like(layer.bias)
    without = layer(x)
    layer.bias = None
    assert not torch.equal(before, without) and torch.equal(layer(x), without)


def test_scales_of_any_layout_are_packed_contiguous():
    """Safetensors refuses others, and kernels read rows."""
    torch.manual_seed(0)
    scheme, linear = Scheme.parse("W4A8g32"), nn.Linear(64, 9)
    grid = choose_qparams(to_groups(linear.weight.detach(), 32), scheme.weight, scale_dtype=torch.float16)
    layer = QuantLinear.from_linear(linear, grid, scheme)
    by_groups = QParams(*(part.transpose(0, 1).contiguous().transpose(0, 1) for part in grid))
    other = QuantLinear.from_linear(linear, by_groups, scheme)
    for name, tensor in other.state_dict().items():
        assert tensor.is_contiguous() and torch.equal(tensor, layer.state_dict()[name]), name


def test_set_backend(spy):
    first, _ = quantized("W4A8")
    second, _ = quantized("W4A16")
    model = nn.Sequential(first, nn.ReLU(), nn.ModuleList([second, nn.Linear(3, 3)]))
    set_backend(model, "reference")
    assert (first.backend, second.backend) == ("reference", "reference")
    first(torch.randn(1, 70))
    assert spy.prepared == 0
    set_backend(model, "auto")
    first(torch.randn(1, 70))
    assert spy.prepared == 1


def test_set_backend_with_an_unknown_name():
    layer, _ = quantized("W4A8")
    with pytest.raises(AbqError, match=r"unknown backend 'cuda13'; this installation has .*reference"):
        set_backend(nn.Sequential(layer), "cuda13")
    assert layer.backend == "auto"


def test_repr():
    assert repr(QuantLinear(64, 8, Scheme.parse("W2*A8"))) == "QuantLinear(64, 8, scheme=W2*A8, bias=False)"
