"""Every kernel compiles for every architecture, to the instructions it was written for. None of it needs a GPU."""

import re
from dataclasses import replace

import pytest
import torch

from abq_llm.kernels.cuda import (
    activations,
    decode,
    dequantize,
    gemm_mma,
    gemm_mma_f16,
    gemm_wgmma,
    gemm_wgmma_f16,
    jit,
    launch,
    plan,
)
from abq_llm.kernels.cuda.gpus import Gpu
from abq_llm.kernels.cuda.problem import Problem
from tests.kernels.cuda.sass import overwritten_in_flight, sass

KIB = 1024
GPUS = {
    "sm_80": Gpu(80, 108, 163 * KIB),
    "sm_86": Gpu(86, 82, 99 * KIB),
    "sm_89": Gpu(89, 128, 99 * KIB),
    "sm_90a": Gpu(90, 132, 227 * KIB),
    "sm_100a": Gpu(100, 148, 227 * KIB),
    "sm_120a": Gpu(120, 170, 99 * KIB),
}
HALF = torch.float16


@pytest.fixture(autouse=True, scope="module")
def _nothing_compiled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ABQ_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(jit, "_compiled", {})
        yield


def problem(m, planes, bits=8, group_size=0):
    return Problem(m, 4096, 4096, planes, bits, False, group_size)


def compiled(stem, constants, arch):
    cubin, mangled_name = jit.compile_cubin(stem, stem, constants, arch)
    assert cubin.startswith(b"\x7fELF") and mangled_name.encode() in cubin
    return cubin


def instructions(cubin):
    """The names of a cubin's instructions, their suffixes included."""
    return set(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass(cubin), re.MULTILINE))


def has(found, start):
    return any(name.startswith(start) for name in found)


# --- decode


def decode_constants(tile, shape, dtype=HALF):
    return decode.constants(tile, shape, activations.TYPE_NAMES[dtype], shape.in_fours, 132)


@pytest.mark.parametrize("planes", range(1, 10))
def test_decode(planes):
    """Fused and not: binary products, and registers for everything."""
    for shape, fused in ((problem(1, planes), True), (problem(4, planes), True), (problem(8, planes), False)):
        tile = decode.choose(shape, GPUS["sm_90a"].sms, GPUS["sm_90a"].shared_limit)
        assert tile.fused == fused
        found = instructions(compiled("decode", decode_constants(tile, shape), "sm_90a"))
        assert has(found, "BMMA.168256.AND.POPC") and not has(found, "IMMA")
        assert planes == 9 or not (has(found, "STL") or has(found, "LDL")), "it keeps something in local memory"


@pytest.mark.parametrize("planes", [2, 8])
@pytest.mark.parametrize("arch", GPUS)
def test_decode_on_every_architecture(arch, planes):
    shapes = [problem(1, planes), problem(1, planes, group_size=64), problem(4, planes, bits=16)]
    shapes = [replace(shape, k=1536) for shape in shapes]  # compiled faster
    cubins = [
        compiled("decode", decode_constants(decode.choose(s, GPUS[arch].sms, GPUS[arch].shared_limit), s), arch)
        for s in shapes
    ]
    native = has(instructions(cubins[0 if planes == 2 else 2]), "BMMA.168256.AND.POPC")
    assert native == GPUS[arch].has_binary  # elsewhere it is emulated


def test_decode_of_other_tiles_and_dtypes():
    float32, bfloat16 = torch.float32, torch.bfloat16
    for shape, dtype in (
        (problem(1, 3, bits=2), bfloat16),
        (problem(16, 3), float32),
        (problem(3, 3, bits=5, group_size=96), bfloat16),
        (problem(1, 3, bits=16, group_size=33), float32),
    ):
        shape = replace(shape, k=1536)
        for tile in decode.candidates(shape, 132, 227 * KIB)[::60]:
            compiled("decode", decode_constants(tile, shape, dtype), "sm_90a")


# --- quantize and dequantize: their host functions say which kernel they launch


@pytest.fixture
def launched(monkeypatch):
    """[(stem, constants, launch)] of the kernels that would have run."""
    calls = []

    def load(stem, name, constants, device):
        assert stem == name
        calls.append((stem, constants))

    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(launch, "launch", lambda *args, **kwargs: None)
    return calls


@pytest.mark.parametrize("arch", GPUS)
def test_quantize(arch, launched):
    x, shape = torch.zeros(3, 4096, dtype=HALF), problem(3, 2)
    grouped = problem(3, 2, bits=5, group_size=33)
    rms_norm, silu_mul = activations.RMS_NORM, activations.SILU_MUL
    activations.quantize(x, shape, activations.FRAGMENTS)
    activations.quantize(x, problem(3, 2, bits=16), activations.FRAGMENTS)
    activations.quantize(x, grouped, activations.BYTES, group_sums=True, prologue=rms_norm, other=x[0])
    activations.quantize(x.bfloat16(), shape, activations.BYTES, prologue=silu_mul, other=x)
    activations.quantize(x.float(), replace(problem(3, 2, bits=3), symmetric=True), activations.PLANE_BYTES)
    assert {stem for stem, _ in launched} == {"quantize"} and len({str(constants) for _, constants in launched}) == 5
    for stem, constants in launched:
        compiled(stem, constants, arch)


@pytest.mark.parametrize("arch", GPUS)
def test_quantize_many_tokens(arch, launched, monkeypatch):
    monkeypatch.setattr(activations, "gpu", lambda index: GPUS[arch])
    x, shape = torch.zeros(1024, 4096, dtype=HALF), problem(1024, 2)
    grouped = problem(1024, 2, bits=5, group_size=33)
    activations.quantize(x, shape, activations.BYTES)
    activations.quantize(x, grouped, activations.BYTES, group_sums=True, prologue=activations.RMS_NORM, other=x[0])
    activations.quantize(x.bfloat16(), problem(1024, 2, bits=2), activations.PLANE_BYTES)
    wide = replace(shape, k=28672)
    activations.quantize(torch.zeros(1024, wide.k, dtype=HALF), wide, activations.BYTES)
    assert {stem for stem, _ in launched} == {"quantize_tiles"}
    large = GPUS[arch].shared_limit > 128 * KIB
    assert [constants["kept"] for _, constants in launched] == [True, large, True, False]
    for stem, constants in launched:
        compiled(stem, constants, arch)


@pytest.mark.parametrize("arch", GPUS)
def test_dequantize(arch, launched):
    for planes, group_size, dtype in ((2, 0, HALF), (9, 33, torch.bfloat16)):
        shape = problem(64, planes, 16, group_size)
        weight = [torch.zeros(4096 // 16, shape.k_blocks, planes, 32, 4, dtype=torch.int32), *4 * [torch.zeros(0)]]
        dequantize.dequantize(weight, shape, torch.zeros(0, dtype=dtype))
    for stem, constants in launched:
        assert stem == "dequantize"
        compiled(stem, constants, arch)


# --- the products for many tokens


def mma_constants(shape, arch, dtype=HALF):
    grouped, limit = shape.group_size > 0, GPUS[arch].shared_limit
    found = plan.choose(shape, replace(GPUS[arch], capability=89))  # what a GPU takes that has no wgmma
    assert found.path == "mma"
    return gemm_mma.constants(found.tile, shape.planes, dtype, shape.group_words, grouped, True, limit)


@pytest.mark.parametrize("planes", range(1, 9))
def test_gemm_mma(planes):
    found = instructions(compiled("gemm_mma", mma_constants(problem(64, planes), "sm_90a"), "sm_90a"))
    assert has(found, "IMMA.16832.U8.U8") and not has(found, "BMMA")


@pytest.mark.parametrize("arch", GPUS)
def test_gemm_mma_on_every_architecture(arch):
    shapes = problem(64, 2), problem(64, 8), problem(64, 3, group_size=64)
    cubins = [compiled("gemm_mma", mma_constants(shape, arch), arch) for shape in shapes]
    assert has(instructions(cubins[-1]), "IMMA.16832.U8.U8")


def mma_f16_constants(shape, arch, dtype=HALF):
    tile = gemm_mma_f16.choose(shape, GPUS[arch].sms, GPUS[arch].shared_limit)
    return gemm_mma_f16.constants(tile, shape, dtype, GPUS[arch].shared_limit)


@pytest.mark.parametrize("planes", range(1, 10))
def test_gemm_mma_f16(planes):
    """One token and many: products of floats, and registers for everything."""
    for m, group_size, dtype, name in ((1, 128, HALF, "F32"), (64, 0, torch.bfloat16, "F32.BF16")):
        constants = mma_f16_constants(problem(m, planes, 16, group_size), "sm_90a", dtype)
        found = instructions(compiled("gemm_mma_f16", constants, "sm_90a"))
        assert f"HMMA.16816.{name}" in found and has(found, "UBLKCP")
        assert not (has(found, "STL") or has(found, "LDL")), "it keeps something in local memory"


@pytest.mark.parametrize("arch", GPUS)
def test_gemm_mma_f16_on_every_architecture(arch):
    for shape in (problem(16, 4, 16), replace(problem(64, 3, 16, 96), k=1000)):
        found = instructions(compiled("gemm_mma_f16", mma_f16_constants(shape, arch), arch))
        assert "HMMA.16816.F32" in found
        engine = GPUS[arch].has_copy_engine
        assert has(found, "UBLKCP") == engine and has(found, "LDGSTS") == (not engine or shape.group_size > 0)


@pytest.mark.parametrize("planes", range(1, 9))
def test_gemm_wgmma(planes):
    gpu = GPUS["sm_90a"]
    for n in (4096, 11008):  # whole tiles, and some that are cut
        tile = gemm_wgmma.choose(2048, n, 16, planes, gpu.sms)
        constants = gemm_wgmma.constants(tile, planes, HALF, programmatic=True)
        cubin = compiled("gemm_wgmma", constants, "sm_90a")
        found = instructions(cubin)
        assert has(found, "IGMMA") and not has(found, "IMMA")
        assert not (has(found, "STL") or has(found, "LDL"))
        assert not overwritten_in_flight(sass(cubin))


@pytest.mark.parametrize(
    ("planes", "group_words", "dtype"), [(2, 2, HALF), (7, 3, torch.bfloat16), (4, 4, torch.float32)]
)
def test_gemm_wgmma_of_groups(planes, group_words, dtype):
    tile = gemm_wgmma.choose(2048, 4096, 16, planes, GPUS["sm_90a"].sms, group_words)
    constants = gemm_wgmma.constants(tile, planes, dtype, group_words=group_words, programmatic=True)
    cubin = compiled("gemm_wgmma", constants, "sm_90a")
    found = instructions(cubin)
    assert has(found, "IGMMA") and not (has(found, "I2F.S32") or has(found, "I2FP"))  # sums are read as floats
    assert not overwritten_in_flight(sass(cubin))


@pytest.mark.parametrize(("planes", "x_planes"), [(2, 2), (1, 4), (7, 1)])
def test_gemm_wgmma_b1(planes, x_planes):
    tile = gemm_wgmma.choose_b1(2048, 4096, 16, planes, x_planes, GPUS["sm_90a"].sms)
    constants = {**gemm_wgmma.constants(tile, planes, HALF, programmatic=True), "x_planes": x_planes}
    found = instructions(compiled("gemm_wgmma_b1", constants, "sm_90a"))
    assert has(found, "BGMMA") and not has(found, "BMMA")


@pytest.mark.parametrize(
    ("m", "planes", "group_size", "dtype"), [(512, 4, 128, HALF), (64, 3, 33, torch.bfloat16), (300, 7, 0, HALF)]
)
def test_gemm_wgmma_f16(launched, m, planes, group_size, dtype):
    shape = problem(m, planes, 16, group_size)
    tile = gemm_wgmma_f16.choose(shape, GPUS["sm_90a"].sms)
    constants = gemm_wgmma_f16.constants(tile, shape, dtype)
    found = instructions(compiled("gemm_wgmma_f16", constants, "sm_90a"))
    assert has(found, "HGMMA") and not (has(found, "STL") or has(found, "LDL"))
    gemm_wgmma_f16.x_tiles(torch.zeros(m, 4096, dtype=dtype), shape, tile.tokens)
    for stem, config in launched:
        assert stem == "x_tiles"
        compiled(stem, config, "sm_90a")
