"""Every CUDA kernel against exact integers, over a sample of schemes x shapes x tiles. Writes one JSON record.

    python benchmarks/cuda_correctness.py --cases 2000 --jobs 12 --out benchmarks/results/cuda_correctness_h100.json

Under compute-sanitizer, whose tools take their time:

    compute-sanitizer --tool memcheck python benchmarks/cuda_correctness.py --cases 60 --jobs 0 --largest 1e8 --out ...

A case draws a scheme, a shape, and one plan: what the heuristic takes, or any candidate. Two comparisons each:

    integers  all scales are 1 and every sum is below 2^24, so the fp32 output is the integer itself: it must be equal
    floats    random scales against the reference backend: equal per channel, and with groups where the kernel adds
              them one after the other (`in_order`); elsewhere within 1e-6 of the sum of the terms' magnitudes (and half
              a step of the output's dtype)

One case in ten is the quantizer alone, with RMSNorm or SiLU(gate) * up before it: codes, scale, zero point, sums must
be those of `quantizers.py`; after a prologue, whose exp and sums round differently, 0.1 % of the codes may be one off.

With 16-bit activations, the output is compared with fp64 products of the dequantized weight: relative error of the
whole output below 1e-4.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from abq_llm.cli.common import commit_of_code

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 8, 16)
TOKENS = (1, 1, 1, 2, 3, 4, 7, 8, 16, 17, 33, 64, 200, 2048)
COLUMNS = (32, 96, 576, 1000, 1536, 4096, 11008)
ROWS = (8, 100, 192, 576, 4096, 11008, 32000)
GROUPS = (0, 0, 0, 64, 128, 32, 96, 192, 256, 40)


def draw(rng: random.Random, largest: float, choices: list[int] | None = None) -> dict:
    """A case of at most `largest` m n k; choices: of the activations' bits."""
    while True:
        bits = rng.choice(choices or BITS)
        m, n, k = rng.choice(TOKENS), rng.choice(ROWS), rng.choice(COLUMNS)
        if m * n * k <= largest:
            break
    star = "*" if rng.random() < 0.2 else ""
    group = rng.choice(GROUPS)
    return {
        "scheme": f"W{rng.randint(1, 8)}{star}A{bits}" + (f"g{group}" if group else ""),
        "symmetric": (not star and rng.random() < 0.3, bits > 1 and rng.random() < 0.3),
        "shape": (m, n, k),
        "dtype": rng.choice(("float32", "float16", "bfloat16")),
        "bias": rng.random() < 0.3,
        "plan": None if rng.random() < 0.4 else rng.random(),
        "prologue": rng.randrange(3) if bits < 16 and rng.random() < 0.1 else None,
    }


def check_quantizer(case: dict) -> str | None:
    """What is wrong with the codes of `activations.quantize`, laid out as bytes, or None."""
    from abq_llm.kernels.cuda import activations
    from abq_llm.kernels.cuda.problem import Problem
    from abq_llm.quantizers import choose_qparams, quantize
    from abq_llm.scheme import Scheme

    scheme = Scheme.parse(case["scheme"], activation_symmetric=case["symmetric"][1])
    (m, _, k), dtype = case["shape"], getattr(torch, case["dtype"])
    problem = Problem.of(m, 8, k, scheme)
    prologue = case["prologue"]
    x, other = torch.randn(m, k, device="cuda").to(dtype), torch.randn(m, k, device="cuda").to(dtype)
    if prologue == activations.RMS_NORM:
        other = other[0].contiguous()
        expected = other * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    elif prologue == activations.SILU_MUL:
        expected = torch.nn.functional.silu(x) * other
    else:
        expected = x
    grouped = problem.group_size > 0
    token = activations.quantize(
        x, problem, activations.BYTES, prologue=prologue, other=other, epsilon=1e-5, group_sums=grouped
    )
    bytes_ = token.codes.view(torch.uint8).view(problem.k_blocks * 16, -1, 8, 16)
    codes = bytes_.permute(1, 2, 0, 3).reshape(-1, problem.k_blocks * 256)[:m].short()
    size, padded = problem.group_size or k, problem.group_padded or k
    column = torch.arange(k, device="cuda")
    found = codes[:, column // size * padded + column % size]
    assert scheme.activation is not None
    qparams = choose_qparams(expected, scheme.activation)
    wanted = quantize(expected, qparams, scheme.activation)
    if prologue != activations.PLAIN:
        far = (found - wanted).abs()
        return None if far.max() <= 1 and far.count_nonzero() <= 1e-3 * far.numel() + 1 else f"codes off by {far.max()}"
    sums = torch.stack([part.sum(1) for part in wanted.split(size, 1)]) if grouped else wanted.sum(1)
    exact = {
        "codes": torch.equal(found, wanted),
        "scale": torch.equal(token.scale[:m], qparams.scale[:, 0]),
        "zero point": torch.equal(token.zero[:m], qparams.zero_point[:, 0].int()),
        "sums": torch.equal(token.sums[..., :m].long(), sums),
        "padding": int(codes.sum()) == int(found.sum()),
    }
    return None if all(exact.values()) else f"differ: {', '.join(name for name, equal in exact.items() if not equal)}"


def in_order(chosen) -> bool:
    """Whether a plan adds the groups as the reference does."""
    return chosen.path == "wgmma" or (chosen.path == "mma" and chosen.tile.in_order)


def check(case: dict) -> tuple[str, str | None]:
    """(path, what is wrong or None)."""
    if case["prologue"] is not None:
        return "quantizer", check_quantizer(case)
    from abq_llm.kernels import cuda, reference
    from abq_llm.kernels.cuda import plan
    from abq_llm.kernels.cuda.problem import Problem
    from abq_llm.packing import pack_planes
    from abq_llm.quantizers import choose_qparams
    from abq_llm.scheme import Scheme

    scheme = Scheme.parse(
        case["scheme"], weight_symmetric=case["symmetric"][0], activation_symmetric=case["symmetric"][1]
    )
    weight_format, activation = scheme.weight, scheme.activation
    assert weight_format is not None and scheme.planes is not None
    m, n, k = case["shape"]
    problem, gpu = Problem.of(m, n, k, scheme), cuda.gpu(0)
    plans = plan.candidates(problem, gpu)
    chosen = plan.choose(problem, gpu) if case["plan"] is None else plans[int(case["plan"] * len(plans))]

    groups = scheme.groups(k)
    codes = torch.randint(0, weight_format.qmax + 1, (n, k), device="cuda")
    zero = torch.randint(0, min(weight_format.qmax, 255) + 1, (n, groups), device="cuda")
    if case["plan"] is None or m > 64:  # zero points near the middle keep sums small
        zero = torch.full_like(zero, (weight_format.qmax + 1) // 2)
    packed = pack_planes(codes, scheme.planes)
    zeros = [] if weight_format.fixed_zero_point is not None else [zero.to(torch.uint8)]
    bias = torch.randn(n, device="cuda") if case["bias"] else None
    dtype = getattr(torch, case["dtype"])

    scale = torch.rand(n, groups, device="cuda").mul(0.01).add(1e-3).half()
    weight = [packed, scale, *zeros]
    x = (torch.randn(m, k, device="cuda") * 3 + 0.5).to(dtype)
    poison = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
    del poison  # so that what is not written is likely NaN
    y = cuda.run(chosen, problem, x, cuda.prepare(weight, scheme, k), bias)
    if activation is None:
        exact = x.double() @ reference.dequantize_weight(weight, scheme, k).double().t()
        exact = exact if bias is None else exact + bias
        error = float((y.double() - exact).norm() / exact.norm())
        limit = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 8e-3}[case["dtype"]]
        return chosen.path, None if error <= limit else f"relative error {error:.2e}"
    expected = reference.linear(x, weight, bias, scheme)
    if problem.group_size and not (in_order(chosen) and problem.group_size == scheme.group_size):
        columns = reference.dequantize_weight(weight, scheme, k).abs().sum(1)
        span = choose_qparams(x, activation).scale * activation.qmax  # no term is larger than span * |w|
        step = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[case["dtype"]]
        error = (y.double() - expected.double()).abs() / (
            1e-6 * span * columns + step * expected.double().abs() + 1e-30
        )
        if not bool((error <= 1).all()):
            return chosen.path, f"floats: error {float(error.max()):.2e} of what is allowed"
    elif not torch.equal(y, expected):
        wrong = y != expected
        return chosen.path, f"floats: {int(wrong.sum())} of {wrong.numel()} differ"

    fixed = activation.fixed_zero_point
    z_x = activation.qmax // 3 if fixed is None else fixed
    x = torch.randint(0, activation.qmax + 1, (m, k), device="cuda") - z_x
    x[:, 0], x[:, -1] = (
        (-z_x, activation.qmax - z_x) if fixed is None else (z_x - activation.qmax, activation.qmax - z_x)
    )
    if fixed is not None:
        x = x.clamp(z_x - activation.qmax or -1, activation.qmax - z_x)
        x[:, 0] = z_x - activation.qmax or -1
    weight = [packed, torch.ones_like(scale), *zeros]
    y = cuda.run(chosen, problem, x.float(), cuda.prepare(weight, scheme, k), None)
    z_w = (zero if zeros else torch.full_like(zero, weight_format.fixed_zero_point or 0)).repeat_interleave(
        scheme.group_size or k, 1
    )[:, :k]
    expected = (x.double() @ (codes - z_w).double().t()).float()
    parts = (x + z_x).double() @ (codes - z_w).double().abs().t()  # what fp32 has to hold on the way
    if float(parts.max()) >= 2**24:
        return chosen.path, None  # not comparable
    if not torch.equal(y, expected):
        wrong = y != expected
        return (
            chosen.path,
            f"integers: {int(wrong.sum())} of {wrong.numel()} differ, by up to {(y - expected).abs().max()}",
        )
    return chosen.path, None


def run(cases: list[dict], seconds: float) -> tuple[Counter, list[dict]]:
    torch.manual_seed(cases[0]["seed"])
    paths: Counter = Counter()
    failures = []
    started = time.monotonic()
    for case in cases:
        if time.monotonic() - started > seconds:
            break
        try:
            path, wrong = check(case)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # other processes share the GPU
        except Exception as error:
            path, wrong = "error", f"{type(error).__name__}: {error}"[:400]
        paths[path] += 1
        if wrong:
            failures.append({**case, "path": path, "wrong": wrong})
            print(json.dumps(failures[-1]), flush=True)
            if "CUDA" in wrong and "error" in wrong.lower():
                break  # the context is lost
    return paths, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop drawing cases after this long")
    parser.add_argument("--jobs", type=int, default=8, help="processes; 0: this one")
    parser.add_argument("--largest", type=float, default=1.5e10, help="m * n * k of a case")
    parser.add_argument("--bits", type=int, action="append", choices=sorted(set(BITS)), help="of the activations; all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of the code, where the tree has no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    cases = [{**draw(rng, args.largest, args.bits), "seed": args.seed + i} for i in range(args.cases)]
    started = time.time()
    if args.jobs:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(run, [cases[i :: args.jobs] for i in range(args.jobs)], [args.seconds] * args.jobs))
    else:
        parts = [run(cases, args.seconds)]
    paths = sum((part[0] for part in parts), Counter())
    failures = [failure for part in parts for failure in part[1]]
    record = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": args.commit or commit_of_code(),
        "seconds": time.time() - started,
        "cases": sum(paths.values()),
        "paths": dict(paths),
        "failures": failures,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['cases']} cases, {len(failures)} failures, {dict(paths)}, {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
