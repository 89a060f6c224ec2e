"""Draw records of `abq bench kernels` as one plot. A row of a later record takes the place of the same row before.

cd benchmarks/results
python ../plot_kernels.py kernels_h100.json kernels_prefill_h100.json --out ../../docs/images/kernels_h100.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from abq_llm.evaluation import kernel_plot
from abq_llm.evaluation.kernel_speed import Row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    records = [json.loads(path.read_text()) for path in args.records]
    (device,) = {record["device"] for record in records}
    rows = {}
    for record in records:
        for values in record["rows"]:
            row = Row(**(values | {"us_range": tuple(values["us_range"])}))
            rows[row.kernel, row.scheme, row.m, row.n, row.k] = row
    bandwidth = max(record["bandwidth_gb_per_s"] for record in records) * 1e9
    kernel_plot.draw(list(rows.values()), bandwidth, args.out, title=device)


if __name__ == "__main__":
    main()
