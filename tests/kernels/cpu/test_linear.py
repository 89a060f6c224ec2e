"""Every instruction set of this CPU against the reference backend: the same bits, not just the same integers."""

import random
import sys

import numpy as np
import pytest
import torch

from abq_llm import kernels
from abq_llm.errors import AbqError
from abq_llm.kernels import cpu, reference
from abq_llm.scheme import Scheme
from tests import oracle

CPU = torch.device("cpu")


def both(case, x):
    """(ours, the reference's) output of a layer."""
    weight, bias, k = case.layer.packed_weight(), case.layer.bias, x.shape[1]
    ours = cpu.linear(x, cpu.prepare(weight, case.scheme, k), bias, case.scheme)
    return ours, reference.linear(x, weight, bias, case.scheme)


def tokens(m, k, seed=0):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("planes", ["1", "2", "3", "4", "5", "6", "7", "8", "1*", "2*", "5*", "7*", "8*"])
def test_bit_exact_on_drawn_schemes_and_shapes(level, planes):
    draw = random.Random(planes)
    for seed in range(40):
        m, n, k = draw.choice([1, 2, 3, 5, 8, 16, 17, 33, 80]), draw.randint(1, 40), draw.randint(1, 300)
        group = draw.choice(["", "", f"g{draw.randint(1, k)}", "g32", "g64"])
        scheme = f"W{planes}A{draw.randint(1, 8)}{group}"
        case = oracle.make_case(
            scheme,
            k,
            n,
            bias=draw.random() < 0.5,
            symmetric=(draw.random() < 0.5, draw.random() < 0.5),
            scale_dtype=draw.choice([torch.float16, torch.bfloat16, torch.float32]),
            seed=seed,
        )
        ours, expected = both(case, tokens(m, k, seed))
        assert torch.equal(ours, expected), (scheme, m, n, k, case.scheme)


@pytest.mark.parametrize("scheme", ["W2A8", "W4A8g128", "W3*A5"])
def test_bit_exact_on_many_tokens(level, scheme):
    """More than a core's cache holds: they pass the weight in turns."""
    case = oracle.make_case(scheme, 1030, 24)
    ours, expected = both(case, tokens(600, 1030))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bit_exact_in_half_precision(level, dtype):
    case = oracle.make_case("W4A8g32", 70, 9, dtype=dtype)
    ours, expected = both(case, tokens(5, 70).to(dtype))
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)


def test_sums_beyond_32_bits(level):
    """255 * 255 * 40000 does not fit an int32, and neither do the integers of a symmetric grid's shifted codes."""
    for symmetric in (False, True):
        case = oracle.make_case("W8A8", 40_000, 2, bias=False, symmetric=(False, symmetric), unit_scale=True)
        x = torch.full((1, 40_000), 255.0)
        ours, expected = both(case, x)
        assert torch.equal(ours, expected)
        assert ours.abs().max() > 2**31


@pytest.mark.parametrize("scheme", ["W1A16", "W2*A16", "W3A16g32", "W4A16g128", "W5A16g200", "W8A16", "W8*A16g33"])
def test_weight_only_keeps_activations_to_23_bits(level, scheme):
    """Error against float64: 2^-23 of the largest of 128 neighbours, and the roundings of fp32 sums."""
    for m, k, seed in [(1, 520, 0), (3, 129, 1), (9, 64, 2), (16, 33, 3)]:
        case = oracle.make_case(scheme, k, 19, bias=False, seed=seed)
        x = tokens(m, k, seed)
        x[:, ::7] *= 100
        ours, _ = both(case, x)
        size = case.scheme.group_size or k
        w = (case.codes - case.zero[:, np.arange(k) // size]) * case.scale[:, np.arange(k) // size]
        exact = x.double().numpy() @ w.T
        segments = sum(-(-(min(start + size, k) - start) // 128) for start in range(0, k, size))
        magnitude = np.abs(x.double().numpy()) @ np.abs(w).T
        largest = np.zeros_like(exact)
        for start in range(0, k, size):
            for first in range(start, min(start + size, k), 128):
                part = slice(first, min(first + 128, start + size, k))
                largest += np.abs(x[:, part].double().numpy()).max(1)[:, None] * np.abs(w[:, part]).sum(1)
        assert (
            np.abs(ours.double().numpy() - exact) <= largest * 2.0**-23 + magnitude * (segments + 6) * 2.0**-24
        ).all()


@pytest.mark.parametrize("scheme", ["W4A8", "W4A8g32", "W4A16", "W4A16g32", "W8*A8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(level, scheme, value):
    """And stays in its token."""
    case = oracle.make_case(scheme, 70, 9)
    x = tokens(5, 70)
    clean, _ = both(case, x)
    x[2, 33] = value
    ours, _ = both(case, x)
    assert not ours[2].isfinite().any()
    rest = [0, 1, 3, 4]
    assert torch.equal(ours[rest], clean[rest])


def test_zeros_and_tiny_values(level):
    for scheme in ("W4A8", "W4A16"):
        case = oracle.make_case(scheme, 70, 9, bias=False)
        x = torch.zeros(3, 70)
        x[1], x[2, 5] = 1e-30, 1e-42
        ours, expected = both(case, x)
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-38)


def test_a_level_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("ABQ_CPU_LEVEL", "sse9")
    with pytest.raises(
        AbqError, match=r"backend 'cpu' cannot run on cpu: ABQ_CPU_LEVEL is 'sse9', but here are .*scalar"
    ):
        kernels.choose_backend("cpu", CPU)
    assert kernels.choose_backend("auto", CPU) == "reference"


def test_without_the_module_auto_is_the_reference(monkeypatch):
    cpu.native.module.cache_clear()
    monkeypatch.delitem(sys.modules, cpu.native.NAME, raising=False)
    monkeypatch.setenv("ABQ_NATIVE_MODULE", "/nowhere/_native.so")
    with pytest.raises(
        AbqError, match=r"backend 'cpu' cannot run on cpu: its native module is not there \(.*nowhere.*\)"
    ):
        kernels.choose_backend("cpu", CPU)
    assert kernels.choose_backend("auto", CPU) == "reference"
    cpu.native.module.cache_clear()


def test_the_prepared_weight_is_as_large_as_the_packed_one():
    scheme = Scheme.parse("W3A8g128")
    case = oracle.make_case("W3A8g128", 1024, 256)
    prepared, _ = cpu.prepare(case.layer.packed_weight(), scheme, 1024)
    packed = scheme.bits_per_weight(256, 1024) * 256 * 1024 / 8
    assert packed <= prepared.nbytes <= 1.06 * packed + 512  # a total of 16 bits a group


def test_matrix_units_are_left_to_others_as_they_were(level):
    """AMX is a thread's own state, which torch shapes once for several products in bf16."""
    x, case = torch.randn(64, 256).bfloat16(), oracle.make_case("W4A8", 256, 70)
    expected = x @ x.T
    for _ in range(2):
        ours, theirs = both(case, tokens(64, 256))
        assert torch.equal(ours, theirs)
        assert torch.equal(x @ x.T, expected)
