"""Cost of calibrating: a model, or one decoder block of LLaMA-7B's shape with random weights. Writes one
JSON record.

    python benchmarks/calibration_cost.py --scheme W4A4 --epochs 20 --out benchmarks/results/NAME.json   # 7B block
    python benchmarks/calibration_cost.py --model MODEL --calib FILE --blocks 2 --method abq:rounding=False --out ...

Times are of one run. `training_seconds` is what grows with the epochs; the rest (both streams, statistics, searches,
packing) does not.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from abq_llm.cli.common import commit_of_code, read_method
from abq_llm.data import TokenSet, calibration_tokens
from abq_llm.models import load_model
from abq_llm.quantize import quantize

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 1,
    "vocab_size": 1024,  # the embedding is no part of a block
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calib")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--method", default="abq", help="With options: abq:rounding=False.")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--autocast", choices=("none", "bfloat16"), default="none")
    parser.add_argument("--offload", action="store_true", help="streams in host memory, as on a small GPU")
    parser.add_argument("--commit", help="Of the code, where the tree has no git history.")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        model, tokenizer = load_model(args.model)
        total = len(model.model.layers)
        model.model.layers = model.model.layers[: args.blocks]
        tokens = calibration_tokens(args.calib, tokenizer, samples=args.samples, seqlen=args.seqlen, seed=0)
    else:
        total = 32
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_7B, dtype=torch.bfloat16)).to(torch.bfloat16).eval()
        tokens = TokenSet("random", torch.randint(0, LLAMA_7B["vocab_size"], (args.samples, args.seqlen)))
    marks: list[float] = []

    def progress(block: int, blocks: int, loss: float | None, message: str) -> None:
        if message.startswith("epoch") and block == 0:
            marks.append(time.monotonic())
        if message == "done":
            print(f"block {block + 1}/{blocks} loss {loss}", flush=True)

    autocast = None if args.autocast == "none" else torch.bfloat16
    report = quantize(
        model,
        args.scheme,
        read_method(args.method, args.epochs),
        tokens,
        batch_size=args.batch,
        autocast=autocast,
        offload=args.offload or None,
        progress=progress,
    )
    blocks = len(report.block_losses)
    per_epoch = (marks[-1] - marks[0]) / (len(marks) - 1)
    training = per_epoch * args.epochs * blocks
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "commit": args.commit or commit_of_code(),
        "arguments": {
            key: Path(value).name if key in ("model", "calib") and value else str(value)
            for key, value in vars(args).items()
            if key not in ("out", "commit")
        },
        "blocks_measured": blocks,
        "blocks_of_the_model": total,
        "seconds": report.seconds,
        "seconds_per_epoch_and_block": per_epoch,
        "training_seconds": training,
        "other_seconds": report.seconds - training,
        "peak_memory_bytes": report.peak_memory_bytes,
        "paper_budget_seconds_for_the_model": (report.seconds - training) / blocks * total + per_epoch * 20 * total,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
