"""Markdown tables from the records under benchmarks/results, as they stand in README and docs.

python benchmarks/tables.py accuracy benchmarks/results/smollm2_h100.json benchmarks/results/smollm2_w2_h100.json
python benchmarks/tables.py ablation benchmarks/results/smollm2_ablation_h100.json
python benchmarks/tables.py integer benchmarks/results/integer_only_cpu.json
python benchmarks/tables.py rivals benchmarks/results/rivals_*.json
python benchmarks/tables.py field benchmarks/results/paper_smollm2_h100_wiki_train_head.json \
    benchmarks/results/rivals_ours_h100.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict


def accuracy(record: dict) -> None:
    """RTN beside the mean and standard deviation over the seeds of abq, on each text."""
    runs, texts = _runs(record), list(record["texts"])
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
            cells.append(f"{short(rtn['perplexity'])} (KL {short(rtn['kl'])})")
            cells.append(f"{_spread(rows, text, 'perplexity')} (KL {short(_mean(rows, text, 'kl'))})")
        print("| " + " | ".join(cells) + " |")


def ablation(record: dict) -> None:
    """One line a row: what was switched off, and the figures on each text, over the seeds."""
    texts = list(record["texts"])
    print("| scheme | switched off | " + " | ".join(f"{text}: perplexity | KL | top-1" for text in texts) + " |")
    print("|---|---|" + "---|---|---|" * len(texts))
    for key, rows in _runs(record).items():
        scheme, _, *options = key.split(":")
        cells = [scheme, ", ".join(options).replace("=False", "") or "-"]
        for text in texts:
            kl, agreement = _mean(rows, text, "kl"), _mean(rows, text, "top1_agreement")
            cells += [_spread(rows, text, "perplexity"), short(kl), f"{agreement:.3f}"]
        print("| " + " | ".join(cells) + " |")


def integer(record: dict) -> None:
    """One line a mode: what `integer_only.py` measured, from fp32 and from the normal mode of the checkpoint."""
    print("| checkpoint | mode | perplexity | KL from fp32 | KL from normal | top-1 as normal |")
    print("|---|---|---|---|---|---|")
    for row in record["rows"]:
        for mode, figures in row.items():
            if mode != "row":
                kl, own = figures["kl"], figures["from_normal"]
                cells = [
                    row["row"].replace(":", " "),
                    mode,
                    short(figures["perplexity"]),
                    "" if kl is None else short(kl),
                ]
                cells += ["", ""] if mode == "normal" else [short(own["kl"]), f"{own['top1_agreement']:.3f}"]
                print("| " + " | ".join(cells) + " |")


def rivals(record: dict) -> None:
    """What `rivals_accuracy.py` measured, and `abq compare` on the same tokens: one line a scheme and system, the best
    on the first text first.
    """
    runs = defaultdict(list)
    for row in record["rows"]:
        if "rival" in row:
            runs[row["scheme"], f"{row['rival']} {row['versions'][row['rival']]}"].append(row["texts"])
        elif row["method"] != "fp":
            figures = {text: {key: row[key][text] for key in ("perplexity", "kl")} for text in row["perplexity"]}
            runs[row["scheme"], f"ours: {row['method']}"].append(figures)
    texts = sorted(next(iter(runs.values()))[0], reverse=True)
    print("| scheme | system | " + " | ".join(f"{text}: perplexity (KL)" for text in texts) + " |")
    print("|---|---|" + "---|" * len(texts))
    best_first = sorted(runs.items(), key=lambda each: _mean(each[1], texts[0], "perplexity"))
    for (scheme, system), rows in sorted(best_first, key=lambda each: each[0][0], reverse=True):
        cells = [f"{_spread(rows, text, 'perplexity')} ({short(_mean(rows, text, 'kl'))})" for text in texts]
        print("| " + " | ".join([scheme, system, *cells]) + " |")


def field(record: dict) -> None:
    """Of the rows of `abq compare`: round to nearest, the best other method, and abq, perplexity on each text; abq is
    bold where it is the best.
    """
    runs = defaultdict(list)
    for row in record["rows"]:
        figures = {text: {"perplexity": value} for text, value in row["perplexity"].items()}
        runs[row["scheme"], row["method"]].append(figures | {"bits": row["bits_per_weight"]})
    texts = sorted(record["rows"][0]["perplexity"], reverse=True)
    unquantized = runs.pop(("W16A16", "fp"))[0]
    print("| | bits/weight | " + " | ".join(f"{text}: rtn | best other | abq" for text in texts) + " |")
    print("|---|---|" + "---|---|---|" * len(texts))
    print("| fp16 | 16 | " + " | ".join(f"| | {short(unquantized[text]['perplexity'])}" for text in texts) + " |")
    for scheme in dict.fromkeys(scheme for scheme, _ in runs):
        others = [name for s, name in runs if s == scheme and name.split(":")[0] not in ("rtn", "abq")]
        cells = [scheme, f"{runs[scheme, 'abq'][0]['bits']:.2f}"]
        for text in texts:
            best = min(others, key=lambda name: _mean(runs[scheme, name], text, "perplexity"))
            rtn, other, ours = (_spread(runs[scheme, name], text, "perplexity") for name in ("rtn", best, "abq"))
            first = _mean(runs[scheme, "abq"], text, "perplexity") < _mean(runs[scheme, best], text, "perplexity")
            cells += [rtn, f"{other} ({best})", f"**{ours}**" if first else ours]
        print("| " + " | ".join(cells) + " |")


def _runs(record: dict) -> dict[str, list[dict]]:
    """Row -> its runs, one for each seed."""
    runs = defaultdict(list)
    for row in record["rows"]:
        runs[row["row"]].append(row)
    return runs


def _mean(rows: list[dict], text: str, figure: str) -> float:
    return statistics.mean(row[text][figure] for row in rows)


def _spread(rows: list[dict], text: str, figure: str) -> str:
    """Mean ± standard deviation; the figure itself if there is one seed."""
    values = [row[text][figure] for row in rows]
    mean = statistics.mean(values)
    return short(mean) + (f" ± {short(statistics.stdev(values), mean)}" if len(values) > 1 else "")


def short(x: float, like: float | None = None) -> str:
    """`x` to as many places as a figure of the size of `like`, or of its own, deserves; M is a million."""
    size = x if like is None else like
    if size >= 100_000:
        return f"{x / 1e6:.2f}M"
    return f"{x:,.0f}" if size >= 1000 else f"{x:.1f}" if size >= 100 else f"{x:.2f}" if size >= 0.1 else f"{x:.4f}"


if __name__ == "__main__":
    records = []
    for path in sys.argv[2:]:
        with open(path) as file:
            records.append(json.load(file))
    merged = {**records[0], "rows": [row for record in records for row in record["rows"]]}
    {"accuracy": accuracy, "ablation": ablation, "integer": integer, "rivals": rivals, "field": field}[sys.argv[1]](
        merged
    )
