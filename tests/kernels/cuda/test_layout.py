"""`layout.prepare` against the layout as it is documented, bit by bit. None of it needs a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from abq_llm import kernels
from abq_llm.errors import AbqError
from abq_llm.kernels import cuda, reference
from abq_llm.kernels.cuda import layout
from abq_llm.kernels.cuda.problem import Problem
from abq_llm.scheme import Scheme
from tests import oracle


@pytest.mark.parametrize("scheme", ["W2*A8", "W4A8", "W4A8g33", "W3A16g32"])
def test_it_is_an_op(scheme):
    """What a compiler is told of the results is what they are."""
    case = oracle.make_case(scheme, 70, 9)
    packed, scale, *zero_point = case.layer.packed_weight()
    arguments = packed, scale, zero_point[0] if zero_point else None, scheme, False, False, 70
    assert set(torch.library.opcheck(torch.ops.abq_llm.prepare_cuda, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("scheme", ["W2*A8", "W4A8g32", "W4A16g32"])
def test_a_layer_that_is_not_prepared_compiles_without_a_graph_break(monkeypatch, scheme):
    """As on a GPU: the choice of the backend and the preparation are traced, too."""
    torch._dynamo.reset()
    gpu = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda index: (9, 0))
    monkeypatch.setattr(cuda, "torch", SimpleNamespace(cuda=gpu))
    cuda._missing.cache_clear()
    case = oracle.make_case(scheme, 70, 9)
    weight = case.layer.packed_weight()

    class OnThisDevice:
        prepare = staticmethod(layout.prepare)

        @staticmethod
        def available(device):
            cuda.available(torch.device("cuda", 0))  # which looks for modules and a driver
            return

        @staticmethod
        def linear(x, prepared, bias, scheme):
            assert prepared[0].dim() == 5
            return reference.linear(x, weight, bias, scheme)

    monkeypatch.setattr(kernels, "BACKENDS", {"cuda": OnThisDevice})
    case.layer.backend = "cuda"
    x = torch.randn(3, 70)
    compiled = torch.compile(torch.nn.Sequential(case.layer, torch.nn.ReLU()), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), reference.linear(x, weight, case.layer.bias, case.scheme).relu())
    cuda._missing.cache_clear()  # what it says of this machine was made up


def bit(words, plane, row, column):
    """Of the code of (row, column of the layout): the sentence in `layout.py`, word for word."""
    tile, row = divmod(row, 16)
    e, g = divmod(row, 8)
    block, column = divmod(column, 256)
    i, column = divmod(column, 32)
    h, column = divmod(column, 16)
    t, j = divmod(column, 4)
    return words[tile][block][plane][4 * g + t][2 * h + e] >> (i + 8 * j) & 1


def check(case, group_size):
    """All that `prepare` returns for `case`; group_size: of the layout, None where it has a scale per channel."""
    (n, k), scheme = case.codes.shape, case.scheme
    prepared = layout.prepare(case.layer.packed_weight(), scheme, k)
    assert all(tensor.is_contiguous() for tensor in prepared)
    planes, scale, zero, total, group_total, rows = prepared
    size = group_size or k
    groups = -(-k // size)
    padded = -(-size // 32) * 32
    row_tiles = -(-n // 16)

    # planes: every bit of every code, and no other bit
    columns = [k // size * padded + k % size for k in range(k)]
    assert planes.dtype == torch.int32
    assert planes.shape == (row_tiles, columns[-1] // 256 + 1, scheme.planes, 32, 4)
    words = planes.tolist()
    for row, codes in enumerate(case.codes.tolist()):
        assert [sum(bit(words, p, row, column) << p for p in range(scheme.planes)) for column in columns] == codes
    assert ones(planes.flatten().tolist()) == ones(case.codes.flatten().tolist())

    # tables
    of_group = np.arange(groups) * case.scale.shape[1] // groups  # one scale may serve all groups of the layout
    s, z = case.scale[:, of_group], case.zero[:, of_group]
    centered = np.zeros((n, groups))
    for column in range(k):
        centered[:, column // size] += case.codes[:, column] - z[:, column // size]
    if group_size is None:
        expected = [(s[:, 0], torch.float32), (z[:, 0], torch.int32), (centered[:, 0], torch.int32)]
        assert group_total.numel() == 0
    else:
        expected = [(s.T, torch.float32), (z.T, torch.uint8), ((s * centered).sum(1), torch.float32)]
        expected.append((centered.T, torch.int32))
    for table, (values, dtype) in zip((scale, zero, total, group_total), expected, strict=False):
        assert table.dtype == dtype and table.shape == (*values.shape[:-1], 16 * row_tiles)
        assert torch.equal(table[..., :n], torch.tensor(values).to(dtype))
        assert not table[..., n:].any()
    assert rows.shape == (n, 0)


def ones(values):
    return sum((value & 0xFFFFFFFF).bit_count() for value in values)


@pytest.mark.parametrize("n", [1, 16, 40])
@pytest.mark.parametrize(
    ("scheme", "k", "group_size"),
    [
        ("W1A8", 256, None),
        ("W1A8", 31, None),
        ("W3A8", 300, None),
        ("W8A8", 130, None),
        ("W8*A8", 290, None),  # nine planes
        ("W2*A16", 513, None),
        ("W4A8g512", 300, None),  # one group is none
        ("W4A8g300", 300, None),
        ("W4A8g64", 512, 64),
        ("W4A8g64", 300, 64),  # the last group has 44 columns
        ("W2*A8g33", 300, 33),  # a group takes 64, the last has 3
        ("W5A4g32", 257, 32),  # the last has one, in a block of its own
        ("W6A8g96", 600, 96),  # the third lies in blocks 0 and 1
        ("W7A8g300", 700, 300),  # a group takes 320
        ("W8*A8g128", 256, 128),
        ("W3A16g40", 130, 40),
    ],
)
def test_every_bit_and_table(scheme, k, group_size, n):
    check(oracle.make_case(scheme, k, n, seed=n), group_size)


@pytest.mark.parametrize(("scheme", "group_size"), [("W4A8", None), ("W1A8", None), ("W4A8g96", 96), ("W8A8g48", 48)])
def test_symmetric_weight_gets_its_fixed_zero_point(scheme, group_size):
    case = oracle.make_case(scheme, 200, 20, symmetric=(True, False))
    assert len(case.layer.packed_weight()) == 2 and (case.zero == 2 ** (case.scheme.weight.bits - 1)).all()
    check(case, group_size)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scheme", "group_size"), [("W3A8", None), ("W3A8g64", 64)])
def test_scale_of_any_dtype(scheme, group_size, scale_dtype):
    check(oracle.make_case(scheme, 130, 20, scale_dtype=scale_dtype), group_size)


@pytest.mark.parametrize(
    ("scheme", "k", "group_size"),
    [
        ("W8A8", 33025, None),  # 255 * 255 * 33025 = 2^31 - 33023
        ("W8A8", 33026, 2**14),
        ("W8A8g40000", 33026, 2**14),  # one group is none
        ("W8*A8", 32896, None),  # 256 * 255 * 32896 = 2^31 - 32768
        ("W8*A8", 32897, 2**14),
        ("W8A16", 33026, None),  # no integer sums
    ],
)
def test_sums_that_might_not_fit_get_groups(scheme, k, group_size):
    check(oracle.make_case(scheme, k, 3), group_size)


@pytest.mark.parametrize("k", [1, 4096, 33025, 33026, 2**17, 2**20])
def test_no_sum_of_codes_reaches_32_bits(k):
    for bits in range(1, 9):
        for scheme in (Scheme.parse(f"W{bits}A8"), Scheme.parse(f"W{bits}*A8")):
            columns = Problem.of(1, 16, k, scheme).group_size or k
            assert scheme.weight.qmax * scheme.activation.qmax * columns < 2**31


def test_groups_whose_sums_may_not_fit_are_refused():
    with pytest.raises(AbqError, match="W8A8g40000: sums over 40000 columns may not fit 32 bits"):
        Problem.of(1, 16, 80000, Scheme.parse("W8A8g40000"))
    assert Problem.of(1, 16, 80000, Scheme.parse("W4A8g40000")).group_size == 40000


def test_weight_is_left_alone():
    case = oracle.make_case("W4A8g64", 300, 20)
    before = [tensor.clone() for tensor in case.layer.packed_weight()]
    first, second = (layout.prepare(case.layer.packed_weight(), case.scheme, 300) for _ in range(2))
    assert all(map(torch.equal, before, case.layer.packed_weight()))
    assert all(map(torch.equal, first, second))
