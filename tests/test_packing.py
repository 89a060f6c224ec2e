import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abq_llm.packing import pack_planes, unpack_planes
from abq_llm.quantizers import choose_qparams, dequantize, from_groups, quantize, to_groups
from tests import oracle

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@st.composite
def code_matrices(draw):
    """(codes [N, K] in a dtype that holds them, planes)."""
    planes = draw(st.integers(1, 9))
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = torch.from_numpy(rng.integers(0, 2**planes, (n, k)))
    return codes.to(draw(st.sampled_from([dtype for dtype in DTYPES if planes < 9 or dtype != torch.uint8]))), planes


@settings(deadline=None)
@given(code_matrices())
def test_packing_is_the_definition_and_round_trips(case):
    codes, planes = case
    k = codes.shape[1]
    before = codes.clone()
    packed = pack_planes(codes, planes)
    assert packed.dtype == torch.int32
    assert packed.shape == (planes, len(codes), -(-k // 32))
    assert packed.tolist() == oracle.pack(codes.tolist(), planes)
    unpacked = unpack_planes(packed, k)
    assert unpacked.dtype == (torch.int16 if planes == 9 else torch.uint8)
    assert unpacked.tolist() == codes.tolist()
    assert torch.equal(codes, before)
    padding = unpack_planes(packed, packed.shape[2] * 32)[:, k:]
    assert padding.count_nonzero() == 0


@pytest.mark.parametrize("planes", range(1, 10))
def test_one_bit_at_a_time(planes):
    for k in (0, 7, 8, 31, 32, 40, 63, 64):
        codes = torch.zeros(1, 65, dtype=torch.int64)
        codes[0, k] = 2**planes - 1
        packed = pack_planes(codes, planes)
        assert packed.count_nonzero() == planes
        assert (packed[:, 0, k // 32] == (-(2**31) if k % 32 == 31 else 1 << k % 32)).all()


@pytest.mark.parametrize("planes", range(1, 10))
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_codes_out_of_range_raise(planes, dtype):
    codes = torch.zeros(2, 33, dtype=dtype)
    for bad in (-1, 2**planes):
        codes[1, 32] = bad
        with pytest.raises(ValueError, match=rf"{bad}.* do not fit {planes} bit-planes"):
            pack_planes(codes, planes)


def test_eight_planes_of_uint8():
    codes = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(unpack_planes(pack_planes(codes, 8), 256), codes)


def test_a_large_code_does_not_wrap():
    with pytest.raises(ValueError, match="65536"):
        pack_planes(torch.tensor([[65536]]), 4)


def test_views_need_no_copy_by_the_caller():
    codes = torch.randint(0, 32, (70, 6), generator=torch.Generator().manual_seed(0))
    packed = pack_planes(codes.t(), 5)
    assert torch.equal(packed, pack_planes(codes.t().contiguous(), 5))
    assert torch.equal(unpack_planes(packed[:, 2:5], 70), codes.t()[2:5])  # rows: column-parallel shards
    assert torch.equal(unpack_planes(packed[:, :, 1:], 38), codes.t()[:, 32:])  # whole words: row-parallel shards
    assert torch.equal(unpack_planes(packed.transpose(1, 2).contiguous().transpose(1, 2), 70), codes.t())


@pytest.mark.parametrize("fmt", oracle.FORMATS, ids=str)
@pytest.mark.parametrize(("k", "group_size"), [(64, None), (33, None), (100, 32), (65, 64), (40, 128), (5, 1)])
def test_every_format_survives_the_disk(fmt, k, group_size):
    """quantize -> pack -> unpack -> dequantize, with short last groups and rows that do not fill a word."""
    weight = torch.randn(6, k, generator=torch.Generator().manual_seed(k))
    grouped = to_groups(weight, group_size)
    qparams = choose_qparams(grouped, fmt, scale_dtype=torch.float16)
    codes = quantize(grouped, qparams, fmt)
    unpacked = unpack_planes(pack_planes(from_groups(codes, k), fmt.planes), k)
    assert torch.equal(unpacked.short(), from_groups(codes, k))
    restored = from_groups(dequantize(to_groups(unpacked, group_size), qparams), k)
    assert torch.equal(restored, from_groups(dequantize(codes, qparams), k))
