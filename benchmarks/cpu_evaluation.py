"""How long evaluation takes: 2048 tokens by the CPU backend and by the fp32 model. Writes one JSON record.

    OMP_WAIT_POLICY=passive python benchmarks/cpu_evaluation.py --model MODEL --out benchmarks/results/NAME.json

Both are the Transformers model, forward and logits of all tokens included, taking turns; the median of some rounds.
Random tokens: only the time counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from abq_llm.cli.common import commit_of_code
from abq_llm.devices import device_name
from abq_llm.linear import set_backend
from abq_llm.models import load_model
from abq_llm.quantize import quantize

SCHEMES = ("W8A8", "W4A8g64", "W4A4", "W2*A8g64", "W4A16g64")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scheme", action="append", help=f"default: {' '.join(SCHEMES)}")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--commit", help="of the code, where there is no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    original, _ = load_model(args.model, dtype=torch.float32)
    models: dict[str, PreTrainedModel] = {"fp32": original.eval()}
    for scheme in args.scheme or SCHEMES:
        models[scheme] = copy.deepcopy(original)
        quantize(models[scheme], scheme, "rtn", device="cpu")
        set_backend(models[scheme], "cpu")
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(original.config.vocab_size, (1, args.seqlen), generator=random)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model(tokens, use_cache=False)
            if turn:  # the first one lays the weights out
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {
            "scheme": name,
            "seconds": median,
            "range": [min(seconds[name]), max(seconds[name])],
            "ratio_to_fp32": median / medians["fp32"],
        }
        for name, median in medians.items()
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    record = {
        "device": device_name(torch.device("cpu")),
        "versions": {"torch": torch.__version__},
        "commit": args.commit or commit_of_code(),
        "model": Path(args.model).name,
        "tokens": args.seqlen,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
