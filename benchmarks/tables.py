"""Markdown tables from the records under benchmarks/results, as they stand in README and docs.

python benchmarks/tables.py accuracy benchmarks/results/smollm2_h100.json
python benchmarks/tables.py ablation benchmarks/results/smollm2_ablation_cpu.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict


def accuracy(record: dict) -> None:
    """RTN beside the mean and standard deviation over the seeds of abq, on each text."""
    runs = defaultdict(list)
    for row in record["rows"]:
        runs[row["row"]].append(row)
    texts = list(record["texts"])
    print("| | bits/weight | " + " | ".join(f"{text}: rtn | abq" for text in texts) + " |")
    print("|---|---|" + "---|---|" * len(texts))
    print("| fp32 | 32 | " + " | ".join(f"| {record['fp32_perplexity'][text]:.2f}" for text in texts) + " |")
    for key, rows in runs.items():
        scheme, method = key.split(":")[:2]
        if method == "rtn":
            continue
        cells = [scheme, f"{rows[0]['bits_per_weight']:.2f}"]
        for text in texts:
            rtn = runs[f"{scheme}:rtn"][0][text]
            cells.append(f"{_short(rtn['perplexity'])} (KL {_short(rtn['kl'])})")
            perplexities, kl = (
                [row[text]["perplexity"] for row in rows],
                statistics.mean(row[text]["kl"] for row in rows),
            )
            mean, spread = statistics.mean(perplexities), statistics.stdev(perplexities)
            cells.append(f"{_short(mean)} ± {_short(spread)} (KL {_short(kl)})")
        print("| " + " | ".join(cells) + " |")


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.1f}" if x >= 100 else f"{x:.2f}" if x >= 0.1 else f"{x:.4f}"


def ablation(record: dict) -> None:
    """One line a row: what was switched off, and the figures on each text."""
    texts = list(record["texts"])
    print("| scheme | switched off | " + " | ".join(f"{text}: perplexity | KL | top-1" for text in texts) + " |")
    print("|---|---|" + "---|---|---|" * len(texts))
    for row in record["rows"]:
        scheme, _, *options = row["row"].split(":")
        figures = [f"{row[t]['perplexity']:.2f} | {row[t]['kl']:.4f} | {row[t]['top1_agreement']:.3f}" for t in texts]
        print(f"| {scheme} | {', '.join(options).replace('=False', '') or '-'} | " + " | ".join(figures) + " |")


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        {"accuracy": accuracy, "ablation": ablation}[sys.argv[1]](json.load(file))
