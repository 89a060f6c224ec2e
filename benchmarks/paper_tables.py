"""The paper's three tables in miniature: weight-only, weights and activations, zero-shot; all methods.

    python benchmarks/paper_tables.py compute --model MODEL --calib TRAIN.raw --calib C4.jsonl \
        --ppl TEST.raw --ppl HELD_OUT_C4.jsonl --task-path DIR --cells CELLS --jobs 20 --seconds 600
    python benchmarks/paper_tables.py tables --cells CELLS --model NAME --out benchmarks/results/NAME \
        --images docs/images --doc docs/results.md

`compute` is `abq compare` for several calibration texts at once, on all GPUs: every method at every scheme of `TABLES`,
with the tasks at the schemes of `ZERO_SHOT`. All seeds of a text come before the next text, seed after seed, and what
takes long before what does not. It stops after --seconds or Ctrl-C; the same command goes on.

`tables` makes of whatever is in CELLS, for each calibration text, the record NAME_TEXT.json and the picture
NAME_TEXT.png, and puts the tables between the marks of --doc. What has not been computed is marked as missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import signal
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from tables import short

from abq_llm import kernels
from abq_llm.cli.common import commit_of_code, read_method
from abq_llm.cli.compare import compute_missing
from abq_llm.cli.eval import read_texts
from abq_llm.data import calibration_tokens
from abq_llm.devices import pick_devices
from abq_llm.errors import AbqError
from abq_llm.evaluation import comparison, comparison_plot
from abq_llm.evaluation.comparison import UNQUANTIZED, Record
from abq_llm.evaluation.comparison_jobs import Job, longest_first
from abq_llm.integrations.lm_eval import HarnessTasks
from abq_llm.methods import method_by_name
from abq_llm.scheme import Scheme

ZERO_SHOT = ("W4A4", "W2*A8")
TABLES = {
    "Weights only": ("W4A16", "W3A16", "W2A16", "W2*A16"),
    "Weights and activations": ("W6A6", "W4A4", "W2A8", "W2*A8"),
}
SCHEMES = tuple(scheme for schemes in TABLES.values() for scheme in schemes)
LINES = ("rtn", "smoothquant", "gptq", "awq", "omniquant", "affinequant", "i_llm", "abq:rounding=False", "abq")
MISSING = "missing"
TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    compute_parser = commands.add_parser("compute")
    compute_parser.set_defaults(run=compute)
    compute_parser.add_argument("--model", required=True)
    compute_parser.add_argument("--calib", action="append", required=True)
    compute_parser.add_argument("--ppl", action="append", required=True)
    compute_parser.add_argument("--task-path", type=Path, help="Without it, no zero-shot tasks.")
    compute_parser.add_argument("--schemes", default=",".join(SCHEMES))
    compute_parser.add_argument("--methods", default=",".join(LINES))
    compute_parser.add_argument("--seeds", default="0,1,2")
    compute_parser.add_argument("--samples", type=int, default=32)
    compute_parser.add_argument("--seqlen", type=int, default=512)
    compute_parser.add_argument("--epochs", type=int, default=5)
    compute_parser.add_argument("--batch-size", type=int, default=4)
    compute_parser.add_argument("--windows", type=int, help="The first so many of each text.")
    compute_parser.add_argument("--examples", type=int, help="The first so many of each task.")
    compute_parser.add_argument("--device", default="auto")
    compute_parser.add_argument("--backend", default="auto")
    compute_parser.add_argument("--jobs", type=int)
    compute_parser.add_argument("--seconds", type=int, default=0, help="Stop then.")
    compute_parser.add_argument("--commit", help="Of the code, where the tree has no git history.")
    tables_parser = commands.add_parser("tables")
    tables_parser.set_defaults(run=tables)
    tables_parser.add_argument("--model", required=True, help="What to call it.")
    tables_parser.add_argument("--seeds", default="0,1,2", help="Those that were asked for.")
    tables_parser.add_argument("--out", type=Path, required=True, help="Path without a suffix.")
    tables_parser.add_argument("--images", type=Path, help="Folder of the pictures; default: that of --out.")
    tables_parser.add_argument("--doc", type=Path)
    for each in (compute_parser, tables_parser):
        each.add_argument("--cells", type=Path, required=True, help="Folder of the results, one file each.")
    args = parser.parse_args()
    args.run(args)


# --- compute ---


def compute(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C
    signal.alarm(args.seconds)
    devices = pick_devices(args.device)
    network, tokenizer = comparison.open_base(args.model)
    setup = comparison.Setup(
        model=args.model,
        model_sha256=comparison.hash_model(network),
        device=devices[0],
        backend=kernels.choose_backend(args.backend, devices[0]),
        texts=tuple(read_texts(args.ppl, tokenizer, network, args.windows)),
        batch_size=args.batch_size,
        commit=args.commit or commit_of_code(),
    )
    tasks = HarnessTasks(TASKS, args.task_path, args.examples) if args.task_path else None
    jobs = ordered_jobs(args, tokenizer, setup, replace(setup, tasks=tasks))
    try:
        failures = compute_missing(jobs, args.cells, devices, args.jobs or len(devices))
    except AbqError as error:  # interrupted
        raise SystemExit(str(error)) from error
    if failures:
        raise SystemExit(f"{len(failures)} of {len(jobs)} failed")


def ordered_jobs(args: argparse.Namespace, tokenizer, setup: comparison.Setup, scored: comparison.Setup) -> list[Job]:
    """Every cell once, in the order in which they are to start; with the setup that has tasks where they are wanted."""
    methods = {label: read_method(label, args.epochs) for label in args.methods.split(",")}
    schemes = [Scheme.parse(scheme) for scheme in args.schemes.split(",")]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    tiers: dict[tuple[int, int], list[Job]] = defaultdict(list)
    for place, calib in enumerate(args.calib):
        draw = functools.partial(calibration_tokens, calib, tokenizer, samples=args.samples, seqlen=args.seqlen)
        for cell in comparison.cells(schemes, methods, seeds, functools.cache(lambda seed, draw=draw: draw(seed=seed))):
            job = cell, scored if cell.scheme in ("W16A16", *ZERO_SHOT) else setup
            tiers[place, seeds.index(cell.seed) if cell.method else 0].append(job)
    ordered = [job for tier in sorted(tiers) for job in longest_first(tiers[tier])]
    files = [comparison.file_of(args.cells, *job) for job in ordered]  # what needs no calibration is one for all texts
    return [job for index, job in enumerate(ordered) if files[index] not in files[:index]]


# --- tables ---


def tables(args: argparse.Namespace) -> None:
    records = [record for file in sorted(args.cells.glob("*.json")) if (record := comparison.read(file))]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    names = {about["name"] for record in records if (about := record["inputs"]["calibration"])}
    for calib in sorted(names):
        name = f"{args.out.name}_{Path(calib).stem.replace('.', '_')}"
        runs = runs_on(records, calib)
        rows = comparison.over_seeds(runs)
        wanted = [(scheme, method, seed) for scheme in SCHEMES for method in LINES for seed in seeds_of(method, seeds)]
        missing = [each for each in wanted if each not in {(r["scheme"], r["method"], r["seed"]) for r in runs}]
        write_record(args.out.with_name(f"{name}.json"), args.model, calib, runs, missing)
        title = f"{args.model}, calibrated on {calib}"
        comparison_plot.draw(rows, (args.images or args.out.parent) / f"{name}.png", title=title)
        if args.doc:
            parts = []
            for heading, schemes in TABLES.items():
                if any_calibrated(rows, schemes):
                    parts += [f"### {heading}", *perplexity_tables(rows, schemes)]
            if any_calibrated(rows, ZERO_SHOT):
                parts += ["### Zero-shot", *zero_shot_tables(rows)]
            put_between_marks(args.doc, name, "\n\n".join(parts))
        print(f"{name}: {len(runs)} runs, {len(missing)} missing")


def seeds_of(method: str, seeds: list[int]) -> list[int]:
    return seeds if method_by_name(method).needs_data else seeds[:1]


def runs_on(records: list[Record], calib: str) -> list[Record]:
    """Those of the tables calibrated on that text or on none, in their order."""
    found: dict[tuple[str, str, int], Record] = {}
    for record in records:
        if (record["inputs"]["calibration"] or {"name": calib})["name"] != calib:
            continue
        if record["method"] not in (UNQUANTIZED, *LINES) or record["scheme"] not in ("W16A16", *SCHEMES):
            continue
        key = record["scheme"], record["method"], record["seed"]
        if key in found and record["method"] != UNQUANTIZED:
            raise SystemExit(f"two results for {key}, of two runs with other options: keep one run in a folder")
        if key not in found or record["tasks"]:
            found[key] = record
    order = ["W16A16", *SCHEMES], [UNQUANTIZED, *LINES]
    return sorted(found.values(), key=lambda r: (order[0].index(r["scheme"]), order[1].index(r["method"]), r["seed"]))


def write_record(path: Path, model: str, calib: str, runs: list[Record], missing: list[tuple[str, str, int]]) -> None:
    """All runs, one on a line; what they have in common once."""
    inputs = [run["inputs"] for run in runs]
    shared = {key: value for key, value in inputs[-1].items() if all(each[key] == value for each in inputs[1:])}
    record = {
        "model": model,
        "calibration": calib,
        "device_names": sorted({run["device_name"] for run in runs}),
        "commits": sorted({run["commit"] or "" for run in runs}),
        "inputs": shared,
        "methods": {run["method"]: run["inputs"]["options"] for run in runs},
        "calibration_sha256": {
            str(run["seed"]): run["inputs"]["calibration"]["sha256"] for run in runs if run["inputs"]["calibration"]
        },
        "tasks": next((each["tasks"] for each in inputs if each["tasks"]), None),
        "missing": [" ".join(map(str, each)) for each in missing],
    }
    dropped = ("inputs", "device_name", "commit")
    lines = [json.dumps({key: value for key, value in run.items() if key not in dropped}) for run in runs]
    head = json.dumps(record, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n", encoding="utf-8")


def any_calibrated(rows: list[Record], schemes: tuple[str, ...]) -> bool:
    """Whether anything at these schemes depends on the calibration text."""
    return any(row["scheme"] in schemes and method_by_name(row["method"]).needs_data for row in rows)


def perplexity_tables(rows: list[Record], schemes: tuple[str, ...]) -> list[str]:
    """For each text, a line of a method under each scheme: perplexity, and KL from the unquantized model."""
    parts = []
    for text in rows[0]["perplexity"]:
        lines = {
            (row["scheme"], row["method"]): (row["perplexity"][text], _spread(row["perplexity"][text]), row["kl"][text])
            for row in rows
        }
        cells = {
            key: (-value["mean"] if value else None, f"{shown} ({short(kl['mean'])})" if value else shown)
            for key, (value, shown, kl) in lines.items()
            if key[1] != UNQUANTIZED
        }
        unquantized = lines["W16A16", UNQUANTIZED][1] if ("W16A16", UNQUANTIZED) in lines else MISSING
        parts.append(f"On {text}, where the unquantized model has {unquantized}:")
        parts.append(grid(list(schemes), cells, LINES))
    return parts


def zero_shot_tables(rows: list[Record]) -> list[str]:
    """For each scheme, a line of a method: acc_norm by task, or acc where there is no other, and their mean."""
    parts = []
    for scheme in ZERO_SHOT:
        cells = {}
        for row in rows:
            if row["scheme"] in (scheme, "W16A16"):
                scores = {task: row["tasks"].get(task) for task in TASKS}
                for task, score in scores.items():
                    cells[task, row["method"]] = _percent(score and (score["acc_norm"] or score["acc"]))
                cells["mean", row["method"]] = _percent(row["accuracy"])
        parts += [f"{scheme}:", grid([*TASKS, "mean"], cells, (UNQUANTIZED, *LINES))]
    return parts


Shown = tuple[float | None, str]  # the larger the better, and what stands in the table


def grid(columns: list[str], cells: dict[tuple[str, str], Shown], methods: tuple[str, ...]) -> str:
    """A Markdown table with a line for each method; the best of a column is bold if none is missing."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    best = {}
    for column in columns:  # of none, if some are missing
        values = [cells.get((column, method), (None, MISSING)) for method in LINES]
        if all(shown != MISSING for _, shown in values):
            best[column] = max((value for value, _ in values if value is not None), default=None)
    for method in methods:
        line = [method]
        for column in columns:
            value, shown = cells.get((column, method), (None, MISSING))
            bold = "**" if value is not None and value == best.get(column) and method != UNQUANTIZED else ""
            line.append(f"{bold}{shown}{bold}")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _spread(value: dict | None) -> str:
    """ "12.3 ± 0.4" over the seeds; the figure itself of one; "infinite" where it overflows."""
    if value is None:
        return "infinite"
    mean, std = value["mean"], value["std"]
    return short(mean) + ("" if std is None else f" ± {short(std, mean)}")


def _percent(value: dict | None) -> Shown:
    if value is None:
        return None, MISSING
    shown = f"{100 * value['mean']:.1f}" + ("" if value["std"] is None else f" ± {100 * value['std']:.1f}")
    return value["mean"], shown


def put_between_marks(doc: Path, name: str, text: str) -> None:
    """Replace what is between <!-- NAME --> and <!-- end --> in a document."""
    pattern = re.compile(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    old = doc.read_text(encoding="utf-8")
    if not pattern.search(old):
        raise SystemExit(f"{doc} has no <!-- {name} --> ... <!-- end -->")
    doc.write_text(pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", old), encoding="utf-8")


if __name__ == "__main__":
    main()
