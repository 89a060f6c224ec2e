"""Accuracy of schemes and methods on one model: quantize, save packed, load packed, evaluate. Writes one JSON record.

    python benchmarks/accuracy.py --model MODEL --calib TRAIN.raw --ppl TEST.raw --ppl C4.jsonl \
        --row W8A8:rtn --row W4A4:abq --row W4A4:abq:dlc=False --seeds 0,1,2 --jobs 6 --out benchmarks/results/NAME.json

A row is SCHEME:METHOD[:OPTION=VALUE...] with the method's own options. Rows x seeds run as separate processes,
`--jobs` at a time on one device: small models leave a GPU mostly idle. With `--fake`, the fake-quantized twin of
each model (float products of rounded operands) is evaluated too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from abq_llm.cli.common import commit_of_code, read_method


class FakeQuantLinear(nn.Module):
    """The float twin of a `QuantLinear`: dequantized weight, input quantized and dequantized."""

    def __init__(self, packed) -> None:
        super().__init__()
        self.activation, self.bias = packed.scheme.activation, packed.bias
        self.weight = nn.Parameter(packed.dequantize(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        from abq_llm.quantizers import fake_quantize_dynamic

        return nn.functional.linear(fake_quantize_dynamic(x, self.activation), self.weight.to(x.dtype), self.bias)


@functools.cache
def reference_model(path: str, device: str):
    from abq_llm.models import load_model

    return load_model(path, dtype=torch.float32, device=device)[0]


def run(row: str, seed: int, args: argparse.Namespace) -> dict:
    import abq_llm
    from abq_llm.data import calibration_tokens, evaluation_tokens
    from abq_llm.evaluation import evaluate
    from abq_llm.linear import QuantLinear
    from abq_llm.models import load_model
    from abq_llm.quantize import quantize

    torch.set_num_threads(max(1, args.threads // args.jobs))
    scheme, _, label = row.partition(":")
    method = read_method(label, args.epochs)
    model, tokenizer = load_model(args.model, dtype=torch.float16)
    calibration = calibration_tokens(args.calib, tokenizer, samples=args.samples, seqlen=args.seqlen, seed=seed)
    report = quantize(model, scheme, method, calibration, device=args.device, seed=seed, batch_size=args.batch)
    record = {"row": row, "seed": seed, **{k: v for k, v in dataclasses.asdict(report).items() if k != "provenance"}}
    started = time.time()
    record["calibration_sha256"] = calibration.sha256
    with tempfile.TemporaryDirectory() as directory:
        abq_llm.save(model, Path(directory) / "packed", tokenizer=tokenizer, provenance=report.provenance)
        model, _ = abq_llm.load(
            Path(directory) / "packed", dtype=torch.float32, device=args.device, backend="reference"
        )
    reference = reference_model(args.model, args.device)
    for text in args.ppl:
        windows = evaluation_tokens(text, tokenizer, seqlen=2048, limit=args.windows)
        record[windows.name] = dataclasses.asdict(evaluate(model, windows.tokens, reference, batch_size=4))
    record["evaluation_seconds"] = time.time() - started
    if args.fake:
        for module_name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                model.set_submodule(module_name, FakeQuantLinear(module))
        for text in args.ppl[:1]:
            windows = evaluation_tokens(text, tokenizer, seqlen=2048, limit=args.windows)
            record["fake_quantized_perplexity"] = {
                windows.name: evaluate(model, windows.tokens, batch_size=4).perplexity
            }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--ppl", action="append", required=True)
    parser.add_argument("--row", action="append", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--commit", help="of the code, where the tree has no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    from abq_llm.data import evaluation_tokens
    from abq_llm.evaluation import evaluate
    from abq_llm.models import load_model

    started = time.time()
    model, tokenizer = load_model(args.model, dtype=torch.float32, device=args.device)
    sets = [evaluation_tokens(text, tokenizer, seqlen=2048, limit=args.windows) for text in args.ppl]
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": args.commit or commit_of_code(),
        "arguments": {
            k: str(Path(v).name) if k in ("model", "calib", "out") else v
            for k, v in vars(args).items()
            if k not in ("row", "ppl")
        },
        "texts": {s.name: {"windows": len(s.tokens), "sha256": s.sha256} for s in sets},
        "fp32_perplexity": {s.name: evaluate(model, s.tokens).perplexity for s in sets},
        "rows": [],
    }
    del model
    print("fp32", result["fp32_perplexity"], flush=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    jobs = [(row, seed) for row in args.row for seed in (seeds if row.split(":")[1] != "rtn" else seeds[:1])]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run, row, seed, args): (row, seed) for row, seed in jobs}
        for future in as_completed(futures):
            try:
                record = future.result()
            except Exception as error:
                print(*futures[future], "FAILED", repr(error), flush=True)
                continue
            result["rows"].append(record)
            figures = {
                n: tuple(round(record[n][k], 4) for k in ("perplexity", "kl", "top1_agreement"))
                for n in (s.name for s in sets)
            }
            print(f"{record['row']} seed {record['seed']} {record['seconds']:.0f} s", figures, flush=True)
            result["rows"].sort(key=lambda r: (args.row.index(r["row"]), r["seed"]))
            result["seconds"] = time.time() - started
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
