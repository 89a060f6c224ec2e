"""Perplexity of packed checkpoints by one backend and by the reference, on the same device. Writes one JSON record.

    python benchmarks/backends_agree.py --model MODEL --ppl TEST.raw --scheme W8A8 --scheme W4A4 \
        --backend cuda --out benchmarks/results/NAME.json

Weights are rounded to nearest: what is compared is arithmetic, not a method. `agree`: equal to three decimals.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import torch

import abq_llm
from abq_llm.data import evaluation_tokens
from abq_llm.evaluation import evaluate
from abq_llm.methods import method_by_name
from abq_llm.models import load_model
from abq_llm.quantize import quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ppl", required=True)
    parser.add_argument("--scheme", action="append", required=True)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the code, where the tree has no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    rows = []
    for scheme in args.scheme:
        model, tokenizer = load_model(args.model, dtype=torch.float16)
        text = evaluation_tokens(args.ppl, tokenizer, seqlen=2048, limit=args.windows)
        quantize(model, scheme, method_by_name("rtn"), None, device=args.device)
        row: dict = {"scheme": scheme, "windows": len(text.tokens)}
        with tempfile.TemporaryDirectory() as directory:
            packed = Path(directory) / "packed"
            abq_llm.save(model, packed, tokenizer=tokenizer)
            for backend in (args.backend, "reference"):
                model, _ = abq_llm.load(packed, dtype=torch.float32, device=args.device, backend=backend)
                started = time.perf_counter()
                row[backend] = evaluate(model, text.tokens).perplexity
                row[f"{backend}_seconds"] = time.perf_counter() - started
        row["agree"] = round(row[args.backend], 3) == round(row["reference"], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    commit = args.commit or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit,
        "model": Path(args.model).name,
        "text": Path(args.ppl).name,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
