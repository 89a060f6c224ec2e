"""Records of `abq bench kernels` as a Markdown table: a line for each kernel and scheme, a column for each shape and M.

cd benchmarks/results
python ../kernel_tables.py kernels_7b_h100.json -n 11008x4096 -m 1 -m 16 -m 2048
python ../kernel_tables.py kernels_7b_h100.json -n 11008x4096 -m 2048 --figure tops
"""

from __future__ import annotations

import itertools

import kernel_records

from abq_llm.evaluation.kernel_speed import Row

FIGURES = {
    "us": "{:.3g}",
    "tops": "{:,.0f}",
    "ratio_to_fp16": "{:.2f}",
    "fraction_of_bandwidth_floor": "{:.0%}",
    "first_call_seconds": "{:.3g}",
}


def table(rows: list[Row], figure: str) -> str:
    """Columns by shape, then M, in the order in which they come; a cell without a row is empty."""
    shapes = list(dict.fromkeys((row.n, row.k) for row in rows))
    tokens = sorted({row.m for row in rows})
    values = {(row.kernel, row.scheme, (row.n, row.k), row.m): getattr(row, figure) for row in rows}
    columns = list(itertools.product(shapes, tokens))
    header = "".join(f" {n}×{k}, M = {m} |" for (n, k), m in columns)
    lines = [f"| {figure} | |{header}", "|---|---|" + "---|" * len(columns)]
    for kernel, scheme in dict.fromkeys((row.kernel, row.scheme) for row in rows):
        cells = [values.get((kernel, scheme, shape, m)) for shape, m in columns]
        texts = ["" if value is None else FIGURES[figure].format(value) for value in cells]
        lines.append(f"| {kernel} | {scheme.replace('*', chr(92) + '*')} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = kernel_records.parser(__doc__)
    parser.add_argument("--figure", choices=FIGURES, default="us")
    options = parser.parse_args()
    print(table(kernel_records.read(options).rows, options.figure))


if __name__ == "__main__":
    main()
