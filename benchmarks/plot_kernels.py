"""Draw records of `abq bench kernels` as one plot.

cd benchmarks/results
python ../plot_kernels.py kernels_7b_h100.json -s W16A16 -s W8A8 -s W2A8 --out ../../docs/images/kernels_h100.png
"""

from __future__ import annotations

from pathlib import Path

import kernel_records

from abq_llm.evaluation import kernel_plot


def main() -> None:
    parser = kernel_records.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    records = kernel_records.read(options)
    kernel_plot.draw(records.rows, records.bandwidth, options.out, title=records.device)


if __name__ == "__main__":
    main()
