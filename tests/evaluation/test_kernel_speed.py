"""The measuring of kernels, on a CPU: what is timed is what is said, and one failure does not end a run."""

from dataclasses import replace

import pytest
import torch

from abq_llm import kernels
from abq_llm.errors import AbqError
from abq_llm.evaluation import kernel_speed
from abq_llm.evaluation.kernel_speed import Failure, Row, measure
from abq_llm.evaluation.kernels_compared import Kernel, Loaded, ours, random_weight, torch_fp16, torch_int8
from abq_llm.kernels import reference
from abq_llm.packing import unpack_planes
from abq_llm.scheme import Scheme

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernel_speed, "CALLS", (3, 6))
    monkeypatch.setattr(kernel_speed, "BANDWIDTH_BYTES", {"cpu": 2**16})


def run(*candidates, shapes=((24, 40),), tokens=(1, 3), **options):
    return list(measure(candidates, shapes, tokens, CPU, bandwidth=1e9, **options))


@pytest.mark.parametrize("scheme", ["W1A8", "W2*A8", "W8*A4", "W8A8", "W4A16g32"])
def test_random_weights_are_valid_and_use_the_whole_grid(scheme):
    parsed = Scheme.parse(scheme)
    packed, scale, *zero_point = random_weight(parsed, 96, 80, CPU)
    codes = unpack_planes(packed, 80)
    assert (codes.min(), codes.max()) == (0, parsed.weight.qmax)
    assert scale.dtype == torch.float16 and (scale > 0).all()
    assert bool(zero_point) == (not parsed.weight.balanced)
    y = reference.linear(torch.randn(4, 80).half(), [packed, scale, *zero_point], None, parsed)
    assert y.isfinite().all() and y.abs().max() > 0.1


def test_rows_are_the_arithmetic_of_their_time():
    scheme = Scheme.parse("W2*A8")
    rows = run(torch_fp16(), torch_int8(), ours("reference", scheme))
    assert [(row.kernel, row.scheme, row.m) for row in rows] == [
        (kernel, name, m)
        for kernel, name in [("torch-fp16", "W16A16"), ("torch-int8", "W8A8"), ("abq-reference", "W2*A8")]
        for m in (1, 3)
    ]
    assert [row.weight_bytes for row in rows[::2]] == [24 * 40 * 2, 24 * 40, 24 * (3 * 8 + 2)]
    for row, fp16 in zip(rows, rows[:2] * 3, strict=True):
        assert (row.n, row.k, row.copies, row.cold, row.cuda_graph) == (24, 40, 6, False, False)
        assert row.us_range[0] <= row.us <= row.us_range[1] and row.first_call_seconds > 0
        assert row.gb_per_s == pytest.approx(row.weight_bytes / (row.us * 1e-6) / 1e9)
        assert row.tops == pytest.approx(2 * row.m * 24 * 40 / (row.us * 1e-6) / 1e12)
        assert row.fraction_of_bandwidth_floor == pytest.approx(row.gb_per_s)  # the device reads 1 GB/s
        assert row.ratio_to_fp16 == pytest.approx(fp16.us / row.us)


def test_there_is_no_ratio_without_fp16():
    (row,) = run(ours("reference", Scheme.parse("W4A8")), tokens=(1,))
    assert row.ratio_to_fp16 is None


class OffByALittle:
    """A backend whose last output is wrong."""

    error = 1e-3

    def available(self, device):
        return None

    def prepare(self, weight, scheme, in_features):
        return weight

    def linear(self, x, weight, bias, scheme):
        y = reference.linear(x, weight, bias, scheme)
        y[-1, -1] += self.error * y.abs().max()
        return y


@pytest.mark.parametrize(
    ("scheme", "exact"), [("W4A8", True), ("W2*A4", True), ("W4A8g32", None), ("W4A16", None)], ids=str
)
def test_agreement_with_the_reference(monkeypatch, scheme, exact):
    backend = OffByALittle()
    monkeypatch.setattr(kernels, "BACKENDS", {"reference": reference, "off": backend})
    parsed = Scheme.parse(scheme)
    right, wrong = (run(ours(name, parsed), tokens=(3,))[0] for name in ("reference", "off"))
    assert (right.bit_exact, right.max_relative_error) == (exact, 0)
    assert wrong.bit_exact is (exact and False)
    assert 1e-4 < wrong.max_relative_error < 1e-2
    (unchecked,) = run(ours("off", parsed), tokens=(3,), check=False)
    assert (unchecked.bit_exact, unchecked.max_relative_error) == (None, None)
    (many,) = run(ours("off", parsed), tokens=(65,))
    assert (many.bit_exact, many.max_relative_error) == (None, None)
    backend.error = float("nan")
    (failure,) = run(ours("off", parsed), tokens=(3,))
    assert str(failure) == f"abq-off {scheme} 24x40 M=3: the output is not finite"


def test_a_failure_does_not_end_the_run():
    def refuse(x, weight):
        if len(x) == 1:
            raise RuntimeError("no kernel\nfor one token")
        return torch.nn.functional.linear(x, weight)

    def no_load(n, k, device):
        raise ValueError

    picky = replace(torch_fp16(), name="picky", linear=refuse)
    absent = replace(picky, name="absent", load=no_load)
    rows = run(absent, picky, torch_fp16(), shapes=[(8, 16), (16, 8)])
    assert [type(row) for row in rows] == [Failure, Failure, Row, Row, Row] * 2
    assert str(rows[0]) == "absent W16A16 8x16: ValueError"
    assert str(rows[1]) == "picky W16A16 8x16 M=1: RuntimeError: no kernel for one token"


def test_the_output_must_have_the_shape():
    wrong = replace(torch_fp16(), linear=lambda x, weight: x)
    (failure,) = run(wrong, tokens=(3,))
    assert failure.error == "the output is (3, 40)"


def test_a_rival_must_compute_the_product():
    def load(n, k, device):
        dense = torch.linspace(-1, 1, n * k).view(n, k).half()
        return Loaded(dense, dense.nbytes, dense)

    right = Kernel("right", "W8A8", load, lambda x, dense: 1.01 * torch.nn.functional.linear(x, dense))
    wrong = replace(right, name="wrong", linear=lambda x, dense: torch.nn.functional.linear(x, dense.flip(0)))
    broken = replace(right, name="broken", linear=lambda x, dense: right.linear(x, dense) * float("nan"))
    rows = run(right, wrong, broken, tokens=(3,))
    assert [type(row) for row in rows] == [Row, Failure, Failure]
    assert rows[1].error.startswith("the output is not the product: their cosine is ")
    assert rows[2].error.endswith("nan")
    assert [type(row) for row in run(wrong, tokens=(3,), check=False)] == [Row]


def test_copies_take_turns(monkeypatch):
    seen = []

    def linear(x, weight):
        seen.append(weight[0].data_ptr())
        return x.new_zeros(len(x), 24)

    monkeypatch.setattr(kernel_speed, "COLD_BYTES", 400)
    kernel = Kernel("spy", "W8A8", lambda n, k, device: Loaded([torch.zeros(4)], 100), linear)
    (row,) = run(kernel, tokens=(1,))
    assert (row.copies, row.cold) == (4, True)
    assert len(set(seen)) == 4 and seen[2:] == [*seen[2:6], *seen[2:4]]  # after the first call and the warm-up


@pytest.mark.parametrize(
    ("weight_bytes", "copies"),
    [(2**22, 30), (2**26, 2), (2**31, 2), (100, 512)],
    ids=["4 MiB", "64 MiB", "2 GiB", "100 B"],
)
def test_how_many_copies(monkeypatch, weight_bytes, copies):
    monkeypatch.setattr(kernel_speed, "CALLS", (3, 512))
    assert kernel_speed.cold_copies(weight_bytes, CPU) == copies


def test_int8_is_the_product_of_codes():
    kernel = torch_int8()
    weight, size, _ = kernel.load(16, 8, CPU)
    x = torch.randn(3, 8).half()
    codes = (x / x.abs().amax() * 127).round().long()
    assert size == 128 and torch.equal(kernel.linear(x, weight).long(), codes @ weight.long())


def test_weights_that_stay_floating_point_are_refused():
    with pytest.raises(AbqError, match="W16A16"):
        ours("reference", Scheme.parse("W16A16"))


def test_the_bandwidth_is_some_bytes_a_second():
    kernel_speed.read_bandwidth.cache_clear()
    assert 1e6 < kernel_speed.read_bandwidth(CPU) < 1e13
    kernel_speed.read_bandwidth.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_on_a_gpu():
    device = torch.device("cuda")
    ours_here = ours(kernels.choose_backend("auto", device), Scheme.parse("W2*A8"))
    shapes, tokens = [(512, 1024)], (1, 33)
    rows = list(measure([torch_fp16(), torch_int8(), ours_here], shapes, tokens, device, bandwidth=1e12))
    assert [type(row) for row in rows] == [Row] * 6, rows
    assert [row.bit_exact for row in rows] == [None] * 4 + [True] * 2
    assert all(row.cuda_graph for row in rows[:4]) and all(row.cold for row in rows[:2])
