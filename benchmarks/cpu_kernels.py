"""One token by the CPU kernels at every width, from a core's L2 and from DRAM. Writes one JSON record.

    OMP_WAIT_POLICY=passive python benchmarks/cpu_kernels.py --out benchmarks/results/NAME.json

`abq bench kernels` times what a layer of a model costs, Python included, which is longer than a small product takes.
This calls the native function as often as a clock needs, quantization of the token included, and reports how fast it
passes codes: bytes of the packed weight and weights, a second. Beside them is what a plain sum reads from DRAM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from abq_llm.cli.common import commit_of_code
from abq_llm.devices import device_name
from abq_llm.evaluation.kernel_speed import read_bandwidth
from abq_llm.kernels import cpu
from abq_llm.kernels.cpu import native
from abq_llm.scheme import Scheme

COLUMNS = 4096
PLACES = {"L2": 2**20, "DRAM": 2**29}  # bytes of codes, for each thread in L2
ROUND_SECONDS, ROUNDS = 0.05, 7


def prepared(bits: int, size: int) -> tuple[Tensor, int]:
    """A random weight W<bits>A8 of about `size` bytes in the layout of the kernels, and its rows."""
    scheme = Scheme.parse(f"W{bits}A8")
    rows = size * 8 // (bits * COLUMNS) // 16 * 16
    random = torch.Generator().manual_seed(bits)
    planes = torch.randint(-(2**31), 2**31, (bits, rows, COLUMNS // 32), generator=random, dtype=torch.int32)
    scale = torch.full((rows, 1), 0.01, dtype=torch.float16)
    zero = torch.full((rows, 1), 1 << bits >> 1, dtype=torch.uint8)
    return cpu.prepare([planes, scale, zero], scheme, COLUMNS)[0], rows


def seconds(weight: Tensor, rows: int, threads: int) -> float:
    """Of a product with one token of 8 bits."""
    x, y = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(0)), torch.empty(rows)
    call, level = native.module().linear, native.level()
    addresses = (x.data_ptr(), 1, weight.data_ptr(), 0, 8, False, y.data_ptr(), threads)

    def timed(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            call(level, *addresses)
        return (time.perf_counter() - started) / calls

    calls = max(1, round(ROUND_SECONDS / timed(2)))
    return statistics.median(timed(calls) for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--commit", help="of the code, where there is no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows, bandwidth = [], {}
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        read_bandwidth.cache_clear()
        bandwidth[threads] = read_bandwidth(torch.device("cpu")) / 1e9
        for place, size in PLACES.items():
            for bits in range(1, 9):
                weight, count = prepared(bits, size * threads if place == "L2" else size)
                us = 1e6 * seconds(weight, count, threads)
                row = {
                    "scheme": f"W{bits}A8",
                    "weight_in": place,
                    "threads": threads,
                    "n": count,
                    "k": COLUMNS,
                    "us": us,
                }
                row["gb_per_s"], row["giga_weights_per_s"] = weight.nbytes / us / 1e3, count * COLUMNS / us / 1e3
                rows.append(row)
                print(json.dumps(row), flush=True)
    record = {
        "device": device_name(torch.device("cpu")),
        "level": native.level(),
        "read_bandwidth_gb_per_s": bandwidth,
        "versions": {"torch": torch.__version__},
        "commit": args.commit or commit_of_code(),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
