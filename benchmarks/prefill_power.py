"""What a GPU's clock and power are while products of many tokens follow each other. Writes a JSON record.

    python benchmarks/prefill_power.py --scheme W2A8 --scheme W8A8 --out benchmarks/results/prefill_power_h100.json

For every scheme, and for fp16 and int8 by torch: a graph of products is replayed for some seconds, and nvidia-smi is
asked for the clock of the multiprocessors and the power drawn. A clock below the highest at the highest power means
that power bounds the product: then every instruction counts, even one that would fit beside the products.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from abq_llm.cli.common import commit_of_code
from abq_llm.evaluation.kernels_compared import ours
from abq_llm.scheme import Scheme

CALLS = 50  # in a graph
INTERVAL = 0.1  # seconds from one question to the next


def ask(*fields: str) -> list[float]:
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    return [
        float(value) for value in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
    ]


def watch(call: Callable[[], object], seconds: float) -> dict:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    seen: list[list[float]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(INTERVAL):
            seen.append(ask("clocks.sm", "power.draw"))

    thread = threading.Thread(target=sample)
    thread.start()
    replays, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        graph.replay()
        torch.cuda.synchronize()
        replays += 1
    done.set()
    thread.join()
    steady = seen[len(seen) // 2 :]
    return {
        "us": spent / replays / CALLS * 1e6,
        "sm_mhz": statistics.median(clock for clock, _ in steady),
        "watts": statistics.median(power for _, power in steady),
        "samples": len(steady),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", action="append", required=True)
    parser.add_argument("--shape", type=int, nargs=3, default=(2048, 11008, 4096), metavar=("M", "N", "K"))
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--commit", help="of the code, where the tree has no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    m, n, k = args.shape
    device = torch.device("cuda", 0)
    x = torch.randn(m, k, device=device).half()
    dense = torch.randn(n, k, device=device).half()
    codes, weight = (
        torch.randint(-128, 128, (m, k), device=device).char(),
        torch.randint(-8, 8, (n, k), device=device).char(),
    )
    calls: dict[str, Callable[[], object]] = {
        "torch-fp16": lambda: torch.nn.functional.linear(x, dense),
        "torch-int8": lambda: torch._int_mm(codes, weight.t()),
    }
    for name in args.scheme:
        kernel = ours("cuda", Scheme.parse(name))
        calls[name] = partial(kernel.linear, x, kernel.load(n, k, device).weight)
    highest_mhz, limit = ask("clocks.max.sm", "power.limit")
    rows = []
    for name, call in calls.items():
        rows.append({"product": name, **watch(call, args.seconds)})
        rows[-1]["tops"] = 2e-6 * m * n * k / rows[-1]["us"]
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": args.commit or commit_of_code(),
        "shape": {"m": m, "n": n, "k": k},
        "highest_sm_mhz": highest_mhz,
        "power_limit_watts": limit,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
