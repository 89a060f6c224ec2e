"""The reference backend against fake quantization, and its time against the fp32 model. Writes one JSON record.

    python benchmarks/reference_backend.py --model MODEL --text TEST.raw --out benchmarks/results/NAME.json

Each scheme is rounded to nearest and evaluated three ways on the same windows: packed; fake-quantized with the scales
applied after a float64 product of the integer differences (the order of the integer contract); and fake-quantized as
usual, with an fp32 product of dequantized operands. The first two must agree to the last bit. The third rounds
elsewhere, which moves a few activations across a rounding boundary in each layer: its distance is what fp32 noise
alone does to the figure.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path

import torch
from accuracy import FakeQuantLinear
from torch import Tensor, nn

from abq_llm.data import evaluation_tokens
from abq_llm.evaluation import evaluate
from abq_llm.linear import QuantLinear, set_backend
from abq_llm.models import load_model
from abq_llm.quantize import quantize
from abq_llm.quantizers import choose_qparams, from_groups, to_groups
from abq_llm.quantizers import quantize as to_codes


class ContractLinear(nn.Module):
    """Integer differences as float64, multiplied in float64, scaled in the order of the contract."""

    def __init__(self, packed: QuantLinear) -> None:
        super().__init__()
        scheme = packed.scheme
        self.activation, self.bias = scheme.activation, packed.bias
        self.scale = packed.weight_scale.float()
        grouped = to_groups(packed.dequantize().double(), scheme.group_size) / self.scale.double()[..., None]
        self.differences = from_groups(grouped.round(), packed.in_features)
        self.size = scheme.group_size or packed.in_features

    def forward(self, x: Tensor) -> Tensor:
        qparams = choose_qparams(x, self.activation)
        differences = to_codes(x, qparams, self.activation).double() - qparams.zero_point
        y = torch.zeros(*x.shape[:-1], len(self.scale))
        for group, (a, b) in enumerate(
            zip(differences.split(self.size, -1), self.differences.split(self.size, 1), strict=True)
        ):
            y += (a @ b.t()).float() * self.scale[:, group]
        y *= qparams.scale
        return y if self.bias is None else y + self.bias


def twin(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A copy of `model` with every `QuantLinear` replaced."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, kind(module))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--schemes", default="W8A8,W4A16g64,W6A6,W4A4,W2*A8g64")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = load_model(args.model, dtype=torch.float32)
    windows = evaluation_tokens(args.text, tokenizer, limit=args.windows)

    def timed(network: nn.Module) -> tuple[float, float]:
        started = time.perf_counter()
        perplexity = evaluate(network, windows.tokens).perplexity
        return perplexity, (time.perf_counter() - started) / len(windows.tokens)

    timed(model)
    perplexity, fp32_seconds = timed(model)
    result = {
        "device": f"{platform.processor() or platform.machine()}, {args.threads} threads",
        "torch": torch.__version__,
        "text": windows.name,
        "windows": list(windows.tokens.shape),
        "fp32": {"perplexity": perplexity, "seconds_per_window": fp32_seconds},
        "rows": [],
    }
    for scheme in args.schemes.split(","):
        packed = copy.deepcopy(model)
        quantize(packed, scheme, "rtn", device="cpu")
        set_backend(packed, "reference")
        perplexity, seconds = timed(packed)
        row = {
            "scheme": scheme,
            "packed": perplexity,
            "seconds_per_window": seconds,
            "ratio_to_fp32": seconds / fp32_seconds,
        }
        row["fake_fp32"] = timed(twin(packed, FakeQuantLinear))[0]
        if packed.model.layers[0].mlp.down_proj.scheme.activation is not None:
            row["fake_contract"] = timed(twin(packed, ContractLinear))[0]
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
