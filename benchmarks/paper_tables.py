"""The paper's three tables in miniature, by `abq compare`: weight-only, weight-activation, zero-shot.

    python benchmarks/paper_tables.py --model MODEL --calib TRAIN.raw --calib C4.jsonl --out benchmarks/results/NAME \
        -- --ppl TEST.raw --ppl HELD_OUT_C4.jsonl --task-path DIR --samples 32 --seqlen 512 --epochs 10 --batch-size 4 \
        --seeds 0,1,2 --jobs 6

For each calibration text, all eight schemes are compared with all methods, the zero-shot tasks only at the two
schemes that the paper has them for; what follows `--` goes to `abq compare`. Writes, for each text, NAME_TEXT.json
(every run and the means over the seeds), NAME_TEXT.png and the tables NAME_TEXT.md. Finished runs are kept in
NAME_cells: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tables import comparison, zero_shot

from abq_llm.evaluation import comparison_plot
from abq_llm.evaluation.comparison import UNQUANTIZED
from abq_llm.methods import METHODS

ZERO_SHOT = ("W4A4", "W2*A8")
TABLES = {
    "Weight-only": ("W4A16", "W3A16", "W2A16", "W2*A16"),
    "Weights and activations": ("W6A6", "W4A4", "W2A8", "W2*A8"),
}
TASKS = "piqa,arc_easy,arc_challenge,boolq,hellaswag,winogrande"


def compare(model: str, schemes: list[str], options: list[str], out: Path) -> dict:
    """What `abq compare` writes as JSON."""
    command = [sys.executable, "-c", "from abq_llm.cli import main; main()", "compare", model, "--json", str(out)]
    for scheme in schemes:
        command += ["-s", scheme]
    subprocess.run([*command, *options], check=True)
    record = json.loads(out.read_text())
    out.unlink()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", action="append", required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="Path without a suffix.")
    parser.add_argument("options", nargs="*", help="Of abq compare, after --.")
    args = parser.parse_args()
    options = list(args.options)
    task_path = []
    if "--task-path" in options:
        at = options.index("--task-path")
        task_path, options = options[at : at + 2], options[:at] + options[at + 2 :]

    others = [scheme for schemes in TABLES.values() for scheme in schemes if scheme not in ZERO_SHOT]
    for calib in args.calib:
        name = f"{args.out.name}_{Path(calib).stem.replace('.', '_')}"
        shared = ["--methods", args.methods, "--calib", calib, "-o", f"{args.out}_cells", *options]
        partial = args.out.with_name(f"{name}.partial.json")
        partial.parent.mkdir(parents=True, exist_ok=True)
        record = compare(args.model, others, shared, partial)
        scored = compare(args.model, list(ZERO_SHOT), [*shared, "--tasks", args.tasks, *task_path], partial)
        rows = [*_quantized(record["over_seeds"]), *scored["over_seeds"]]  # the unquantized model is in both
        rows.sort(key=lambda row: row["method"] != UNQUANTIZED)
        tables = [f"### {title}\n\n{comparison(rows, schemes)}" for title, schemes in TABLES.items()]
        tables.append(f"### Zero-shot\n\n{zero_shot(scored['over_seeds'])}")
        result = {
            "command": [Path(word).name if Path(word).exists() else word for word in sys.argv],
            "model": record["model"],
            "calibration": Path(calib).name,
            "over_seeds": rows,
            "rows": [*_quantized(record["rows"]), *scored["rows"]],
            "failures": [*record["failures"], *scored["failures"]],
        }
        args.out.with_name(f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_name(f"{name}.md").write_text("\n\n".join(tables) + "\n")
        title = f"{record['model']}, calibrated on {Path(calib).name}"
        comparison_plot.draw(rows, args.out.with_name(f"{name}.png"), title=title)


def _quantized(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["method"] != UNQUANTIZED]


if __name__ == "__main__":
    main()
