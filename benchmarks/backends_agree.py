"""Perplexity of packed checkpoints by one backend and by the reference, on the same device. Writes one JSON record.

    python benchmarks/backends_agree.py --model MODEL --ppl TEST.raw --scheme W8A8 --scheme 'W2*A8g64' \
        --method gptq --calib TRAIN.raw --backend cuda --out benchmarks/results/NAME.json

`agree`: equal to three decimals. `reversed_groups`, for schemes with groups and quantized activations, is the
reference with the groups' fp32 terms added last to first: how far apart two orders of one sum are, which is all that a
backend may differ in. Some activation then rounds to the next code, and the next layers see it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

import abq_llm
from abq_llm import kernels
from abq_llm.cli.common import commit_of_code
from abq_llm.data import calibration_tokens, evaluation_tokens
from abq_llm.evaluation import evaluate
from abq_llm.kernels import reference
from abq_llm.methods import method_by_name
from abq_llm.models import load_model
from abq_llm.packing import pack_planes, unpack_planes
from abq_llm.quantize import quantize
from abq_llm.scheme import Scheme

REVERSED = "reversed_groups"


class ReversedGroups:
    """The reference backend, whose groups come in the opposite order."""

    available = staticmethod(reference.available)

    @staticmethod
    def prepare(weight: list[torch.Tensor], scheme: Scheme, in_features: int) -> list[torch.Tensor]:
        packed, *by_group = weight
        codes = unpack_planes(packed, in_features)
        reordered = pack_planes(_last_group_first(codes, scheme), scheme.planes)
        return [reordered, *(table.flip(1) for table in by_group)]

    @staticmethod
    def linear(x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
        return reference.linear(_last_group_first(x, scheme), weight, bias, scheme)


def _last_group_first(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """x [..., K], K a multiple of the group size."""
    return x.unflatten(-1, (-1, scheme.group_size)).flip(-2).flatten(-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ppl", required=True)
    parser.add_argument("--scheme", action="append", required=True)
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--calib", help="for a method that needs data: 32 samples of 512 tokens")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the code, where the tree has no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    kernels.BACKENDS[REVERSED] = ReversedGroups
    method = method_by_name(args.method)
    rows = []
    for scheme in args.scheme:
        model, tokenizer = load_model(args.model, dtype=torch.float16)
        text = evaluation_tokens(args.ppl, tokenizer, seqlen=2048, limit=args.windows)
        data = calibration_tokens(args.calib, tokenizer, samples=32, seqlen=512, seed=0) if method.needs_data else None
        quantize(model, scheme, method, data, device=args.device)
        row: dict = {"scheme": scheme, "method": method.name, "windows": len(text.tokens)}
        parsed = Scheme.parse(scheme)
        backends = [args.backend, "reference"]
        if parsed.group_size and parsed.activation:
            backends.append(REVERSED)
        with tempfile.TemporaryDirectory() as directory:
            packed = Path(directory) / "packed"
            abq_llm.save(model, packed, tokenizer=tokenizer)
            for backend in backends:
                model, _ = abq_llm.load(packed, dtype=torch.float32, device=args.device, backend=backend)
                started = time.perf_counter()
                row[backend] = evaluate(model, text.tokens).perplexity
                row[f"{backend}_seconds"] = time.perf_counter() - started
        row["agree"] = round(row[args.backend], 3) == round(row["reference"], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    record = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": args.commit or commit_of_code(),
        "model": Path(args.model).name,
        "text": Path(args.ppl).name,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
