"""KL(unquantized ‖ quantized) of a few methods at each scheme of records with the rows of `abq compare`, as a PNG.

python benchmarks/plot_accuracy.py benchmarks/results/paper_smollm2_h100_wiki_train_head.json \
    benchmarks/results/rivals_ours_h100.json docs/images/smollm2_kl.png
"""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {  # colour, marker
    "rtn": ("#9aa0a6", "o"),
    "gptq": ("#34a853", "^"),
    "awq": ("#f29900", "v"),
    "omniquant": ("#a142f4", "s"),
    "abq:rounding=False": ("#8ab4f8", "D"),
    "abq": ("#1a73e8", "D"),
}


def main(*sources: str, target: str) -> None:
    rows = []
    for source in sources:
        with open(source) as file:
            record = json.load(file)
        rows += [row for row in record["rows"] if row["method"] in METHODS]
    text = next(text for text in rows[0]["kl"] if "wiki" in text)
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    figure, axes = plt.subplots(figsize=(8.5, 3.4), layout="constrained")
    for i, (method, (colour, marker)) in enumerate(METHODS.items()):
        aside = (i - (len(METHODS) - 1) / 2) * 0.11
        points = [(schemes.index(row["scheme"]) + aside, row["kl"][text]) for row in rows if row["method"] == method]
        axes.scatter(*zip(*points, strict=True), c=colour, marker=marker, s=24, label=method, zorder=2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(schemes)), schemes)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("KL(fp16 ‖ quantized), nats")
    axes.set_title(f"{record['model']}, WikiText-2 test: lower is better, one point a seed", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=len(METHODS))
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:-1], target=sys.argv[-1])
