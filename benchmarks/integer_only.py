"""Integer-only inference against the normal mode of the same packed checkpoint. Writes one JSON record.

    python benchmarks/integer_only.py --model MODEL --text TEST.raw --calib TRAIN.raw \
        --row W8A8:rtn --row W8A8:i_llm --out benchmarks/results/NAME.json

A row is SCHEME:METHOD. The modes of each:

    normal      as `abq eval` runs it
    fake        float products of rounded operands: the same roundings in another order, so what chance alone does
    integer     `--integer-only`
    unsmoothed  integer, gate and up not smoothed against each other
    wide        integer, 16 bits in place of 8 where the paper's operators round

`from_normal` is KL(normal || mode) and top-1 agreement with the normal mode, `kl` is KL(fp32 || mode).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import transformers
from accuracy import FakeQuantLinear
from reference_backend import twin
from torch import nn

import abq_llm
from abq_llm.cli.common import commit_of_code
from abq_llm.data import calibration_tokens, evaluation_tokens
from abq_llm.evaluation import evaluate
from abq_llm.integer_only import integer_only
from abq_llm.methods import METHODS
from abq_llm.models import load_model


def packed(row: str, args: argparse.Namespace) -> nn.Module:
    """Quantized, saved and loaded again."""
    scheme, method = row.split(":")
    model, tokenizer = load_model(args.model, dtype=torch.float16)
    tokens = None
    if METHODS[method].needs_data:
        tokens = calibration_tokens(args.calib, tokenizer, samples=args.samples, seqlen=args.seqlen, seed=0)
    report = abq_llm.quantize(model, scheme, method, tokens, device="cpu", batch_size=2, epochs=args.epochs)
    with tempfile.TemporaryDirectory() as directory:
        abq_llm.save(model, Path(directory) / "packed", tokenizer=tokenizer, provenance=report.provenance)
        return abq_llm.load(Path(directory) / "packed", dtype=torch.float32, backend="reference")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calib")
    parser.add_argument("--row", action="append", required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    fp32, tokenizer = load_model(args.model, dtype=torch.float32)
    windows = evaluation_tokens(args.text, tokenizer, seqlen=args.window, limit=args.windows)
    result = {
        "device": f"{platform.processor() or platform.machine()}, {args.threads} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "abq_llm": abq_llm.__version__,
        },
        "commit": commit_of_code(),
        "arguments": {
            name: Path(value).name if name in ("model", "calib") else value
            for name, value in vars(args).items()
            if name not in ("row", "text", "out")
        },
        "text": {"name": windows.name, "windows": list(windows.tokens.shape), "sha256": windows.sha256},
        "fp32_perplexity": evaluate(fp32, windows.tokens).perplexity,
        "rows": [],
    }
    for row in args.row:
        normal = packed(row, args)
        model = copy.deepcopy(normal)
        modes: dict[str, tuple[nn.Module, AbstractContextManager]] = {
            "normal": (model, nullcontext()),
            "fake": (twin(normal, FakeQuantLinear), nullcontext()),
            "integer": (model, integer_only(model)),
            "unsmoothed": (model, integer_only(model, smooth=False)),
            "wide": (model, integer_only(model, bits=16)),
        }
        record: dict[str, object] = {"row": row}
        for mode, (network, context) in modes.items():
            with context:
                own = evaluate(network, windows.tokens, normal)
                kl = evaluate(network, windows.tokens, fp32).kl if mode in ("normal", "integer") else None
            record[mode] = {
                "perplexity": own.perplexity,
                "kl": kl,
                "from_normal": {"kl": own.kl, "top1_agreement": own.top1_agreement},
            }
            print(row, mode, json.dumps(record[mode]), flush=True)
        result["rows"].append(record)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
