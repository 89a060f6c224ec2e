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
    """RTN beside the mean and standard deviation over the seeds of abq."""
    runs = defaultdict(list)
    for row in record["rows"]:
        runs[row["row"]].append(row)
    texts = list(record["texts"])
    print("| scheme | bits/weight | " + " | ".join(f"{text}: rtn | abq" for text in texts) + " | seeds |")
    print("|---|---|" + "---|---|" * len(texts) + "---|")
    print("| fp32 | 32 | " + " | ".join(f"{record['fp32_perplexity'][text]:.2f} | " for text in texts) + " | |")
    for key, rows in runs.items():
        scheme, method = key.split(":")[:2]
        if method == "rtn":
            continue
        rtn, cells = runs[f"{scheme}:rtn"][0], []
        for text in texts:
            cells.append(f"{rtn[text]['perplexity']:.2f}, {rtn[text]['kl']:.4f}, {rtn[text]['top1_agreement']:.3f}")
            figures = [[row[text][k] for row in rows] for k in ("perplexity", "kl", "top1_agreement")]
            ppl, kl, top1 = map(statistics.mean, figures)
            spread = statistics.stdev(figures[0]) if len(rows) > 1 else 0.0
            cells.append(f"**{ppl:.2f}** ± {spread:.2f}, {kl:.4f}, {top1:.3f}")
        print(f"| {scheme} | {rows[0]['bits_per_weight']:.2f} | " + " | ".join(cells) + f" | {len(rows)} |")


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
