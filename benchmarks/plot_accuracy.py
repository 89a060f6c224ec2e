"""KL(fp32 || quantized) of rtn and abq for each scheme of the records of accuracy.py, as a PNG.

python benchmarks/plot_accuracy.py benchmarks/results/smollm2_h100.json ... docs/images/smollm2_kl.png
"""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(*sources: str, target: str) -> None:
    rows = []
    for source in sources:
        with open(source) as file:
            record = json.load(file)
        rows += record["rows"]
    text = next(iter(record["texts"]))
    schemes = list(dict.fromkeys(row["row"].split(":")[0] for row in rows))
    figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    for method, colour, marker in (("rtn", "#9aa0a6", "o"), ("abq", "#1a73e8", "D")):
        points = [
            (schemes.index(row["row"].split(":")[0]), row[text]["kl"])
            for row in rows
            if row["row"].split(":")[1] == method
        ]
        axes.scatter(*zip(*points, strict=True), c=colour, marker=marker, s=36, label=method, zorder=2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(schemes)), schemes)
    axes.set_ylabel("KL(fp32 ‖ quantized), nats")
    axes.set_title("SmolLM2-135M-Instruct, WikiText-2 test: lower is better, one point a seed", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:-1], target=sys.argv[-1])
