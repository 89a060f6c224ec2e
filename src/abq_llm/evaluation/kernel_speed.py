"""How fast one linear layer is, in µs a product: our backends and others' kernels, on the same shapes.

A product is timed as a model runs it, activations fp16 on the device and their quantization included, on a weight that
is not in the cache: copies of the weight take turns. On a GPU all turns are one CUDA graph; the time of a product is
the time of a replay over the number of products in it, the median of several replays.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from abq_llm import kernels
from abq_llm.errors import AbqError
from abq_llm.evaluation.kernels_compared import Kernel, Loaded, random_weight
from abq_llm.kernels import reference
from abq_llm.scheme import Scheme

CACHES = 4  # the copies of a weight are together this many times larger than the L2,
COLD_BYTES = 120 * 2**20  # but not smaller than this,
MEMORY_BYTES = 2 * 2**30  # and not larger than this, unless two copies are
GRAPH_CALLS = 48  # products in a graph, at least, so that its start weighs little
COPIES = 512  # of a weight so small that they never get cold
REPLAYS, REPLAY_SECONDS, DISCARDED = (5, 50), 0.1, 3  # (fewest, most), budget, before the clock counts
CALLS, CALL_SECONDS = (3, 50), 1.0  # without a graph
CHECKED_TOKENS = 64  # the reference is slow
RESEMBLANCE = 0.97  # the least cosine between a rival's output and the product; four bits of x leave 0.985
BANDWIDTH_BYTES = {"cpu": 2**28}
BANDWIDTH_BYTES_ELSEWHERE = 2**30


@dataclass(frozen=True)
class Row:
    """One kernel on x [m, k] and a weight [n, k]."""

    kernel: str
    scheme: str
    m: int
    n: int
    k: int
    us: float  # a product, the median
    us_range: tuple[float, float]  # the fastest and the slowest replay (or call, without a graph)
    gb_per_s: float  # weight_bytes / us
    tops: float  # 2 m n k / us, whatever the number of binary operations
    ratio_to_fp16: float | None  # how many times faster than torch-fp16
    fraction_of_bandwidth_floor: float  # the time to read weight_bytes at the device's bandwidth / us
    bit_exact: bool | None  # None: not checked, or floating point sums whose order is free (A16, groups)
    max_relative_error: float | None  # the largest difference from the reference / the reference's largest output
    weight_bytes: int  # codes, scales and zero points, as on disk
    copies: int
    cold: bool  # whether the copies are large enough together to be out of the cache
    cuda_graph: bool
    first_call_seconds: float  # compiling included, unless an earlier row or the kernel cache did it


@dataclass(frozen=True)
class Failure:
    """A row that could not be measured; m is None if the weight already could not be loaded."""

    kernel: str
    scheme: str
    m: int | None
    n: int
    k: int
    error: str

    def __str__(self) -> str:
        tokens = "" if self.m is None else f" M={self.m}"
        return f"{self.kernel} {self.scheme} {self.n}x{self.k}{tokens}: {self.error}"


def measure(
    candidates: Iterable[Kernel],
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    device: torch.device,
    *,
    bandwidth: float,
    check: bool = True,
) -> Iterator[Row | Failure]:
    """Time each kernel on each shape (n, k) and number of tokens; put torch-fp16 first for `ratio_to_fp16`.

    bandwidth: bytes a second, of `read_bandwidth`. check: compare ours with the reference up to `CHECKED_TOKENS`,
    and refuse a rival's output that does not resemble the product.
    """
    candidates, tokens = list(candidates), list(tokens)
    for n, k in shapes:
        fp16: dict[int, float] = {}
        for kernel in candidates:
            try:
                loaded = kernel.load(n, k, device)
                wanted = cold_copies(loaded.weight_bytes, device)
                weights = [loaded.weight, *(copy.deepcopy(loaded.weight) for _ in range(wanted - 1))]
            except Exception as error:  # whatever a rival may raise: the other rows are still worth having
                yield Failure(kernel.name, kernel.scheme, None, n, k, _one_line(error))
                continue
            for m in tokens:
                try:
                    row = _row(kernel, loaded, weights, (m, n, k), device, bandwidth, fp16.get(m), check)
                except Exception as error:
                    yield Failure(kernel.name, kernel.scheme, m, n, k, _one_line(error))
                    continue
                if kernel.name == "torch-fp16":
                    fp16[m] = row.us
                yield row
            del loaded, weights
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _row(
    kernel: Kernel,
    loaded: Loaded,
    weights: list[Any],
    problem: tuple[int, int, int],
    device: torch.device,
    bandwidth: float,
    fp16_us: float | None,
    check: bool,
) -> Row:
    m, n, k = problem
    x = torch.randn(m, k, generator=torch.Generator(device).manual_seed(m), device=device).half()
    started = time.perf_counter()
    y = kernel.linear(x, loaded.weight)
    _synchronize(device)
    first = time.perf_counter() - started
    if y.shape != (m, n):
        raise AbqError(f"the output is {tuple(y.shape)}")
    exact, error = None, None
    if check and kernel.backend and kernel.quantized and m <= CHECKED_TOKENS:
        exact, error = _agreement(kernel.backend, kernel.quantized, loaded.weight, x, n, device)
    if check and loaded.dense is not None:
        _check_resemblance(y, x, loaded.dense)
    graph = device.type == "cuda" and kernel.capturable
    calls: list[Callable[[], object]] = [partial(kernel.linear, x, weight) for weight in weights]
    times = [1e6 * seconds for seconds in (_time_graph(calls, device) if graph else _time_calls(calls, device))]
    us = statistics.median(times)
    return Row(
        kernel=kernel.name,
        scheme=kernel.scheme,
        m=m,
        n=n,
        k=k,
        us=us,
        us_range=(min(times), max(times)),
        gb_per_s=loaded.weight_bytes / us / 1e3,
        tops=2 * m * n * k / us / 1e6,
        ratio_to_fp16=1.0 if kernel.name == "torch-fp16" else fp16_us and fp16_us / us,
        fraction_of_bandwidth_floor=loaded.weight_bytes / bandwidth * 1e6 / us,
        bit_exact=exact,
        max_relative_error=error,
        weight_bytes=loaded.weight_bytes,
        copies=len(weights),
        cold=len(weights) * loaded.weight_bytes >= cold_bytes(device),
        cuda_graph=graph,
        first_call_seconds=first,
    )


def _agreement(
    backend: str, scheme: Scheme, prepared: Any, x: Tensor, n: int, device: torch.device
) -> tuple[bool | None, float]:
    """(bit_exact, max_relative_error) of a backend against the reference, on fp16 as timed and on the same x in fp32.

    A16 rounds its weight to the dtype of x, so it is compared on fp16 only.
    """
    canonical = random_weight(scheme, n, x.shape[1], device)
    integers = scheme.activation is not None
    exact, largest = True, 0.0
    for inputs in (x, x.float()) if integers else (x,):
        y = kernels.BACKENDS[backend].linear(inputs, prepared, None, scheme)
        expected = reference.linear(inputs, canonical, None, scheme)
        exact &= torch.equal(y, expected)
        error = ((y.float() - expected.float()).abs().amax() / expected.float().abs().amax()).item()
        if not math.isfinite(error):
            raise AbqError("the output is not finite")
        largest = max(largest, error)
    return (exact if integers and scheme.group_size is None else None), largest


def _check_resemblance(y: Tensor, x: Tensor, dense: Tensor) -> None:
    expected = torch.nn.functional.linear(x, dense).float().flatten()
    cosine = torch.nn.functional.cosine_similarity(y.float().flatten(), expected, dim=0).item()
    if not cosine >= RESEMBLANCE:
        raise AbqError(f"the output is not the product: their cosine is {cosine:.3f}")


def cold_bytes(device: torch.device) -> int:
    """How many bytes of weights push each other out of the cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(CACHES * cache, COLD_BYTES)


def cold_copies(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight take turns."""
    wanted = min(-(-cold_bytes(device) // weight_bytes), MEMORY_BYTES // weight_bytes)
    return max(2, min(wanted, COPIES if device.type == "cuda" else CALLS[1]))


def _time_graph(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of a call, from each replay of one CUDA graph of all calls, again and again."""
    turns = calls * -(-GRAPH_CALLS // len(calls))
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        torch.cuda.synchronize()  # the weights are in place: a kernel may read them ahead of its predecessor's end
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for call in turns:
                call()
        graph.replay()
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        replays = _within(REPLAYS, REPLAY_SECONDS / (time.perf_counter() - started))
        # Replays queue up behind one another, so that no gap between them is the host's.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(DISCARDED + replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
    pairs = itertools.pairwise(events[DISCARDED:])
    return [begin.elapsed_time(end) / 1e3 / len(turns) for begin, end in pairs]


def _time_calls(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each call, by the host's clock."""
    times: list[float] = []
    calls[-1]()
    _synchronize(device)
    for call in itertools.islice(itertools.cycle(calls), CALLS[1]):
        started = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - started)
        if len(times) >= CALLS[0] and sum(times) > CALL_SECONDS:
            break
    return times


@lru_cache
def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that `device` can read: the best of two sums of a large tensor and its copy (read + written)."""
    size = BANDWIDTH_BYTES.get(device.type, BANDWIDTH_BYTES_ELSEWHERE)
    source = torch.arange(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    clock = _time_graph if device.type == "cuda" else _time_calls
    sums = [source.sum, source.view(torch.float32).sum]
    reading = min(statistics.median(clock([total], device)) for total in sums)
    copying = statistics.median(clock([lambda: target.copy_(source)], device))
    return max(source.nbytes / reading, 2 * source.nbytes / copying)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _within(bounds: tuple[int, int], value: float) -> int:
    return int(min(max(value, bounds[0]), bounds[1]))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return text if isinstance(error, AbqError) else f"{name}: {text[:200]}" if text else name
