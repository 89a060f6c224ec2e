"""Decode and prefill of one model by the CPU engine and by llama.cpp, taking turns. Writes one JSON record.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python
    python benchmarks/cpu_llama_cpp.py --gguf MODEL.gguf --work DIR --out benchmarks/results/NAME.json

Both start from the same .gguf file: ours rounded to nearest with a head of 8 bits, theirs requantized by llama.cpp
itself. In each round every pair runs one after the other on the same random tokens; a figure is the median over all
rounds. Timed are a prompt, and tokens written one by one behind a shorter one; logits of the last token each time,
sampling left out. Bytes are those of all matrices that a token reads, the head included and norms left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch

import abq_llm
from abq_llm.cli.common import commit_of_code
from abq_llm.devices import device_name
from abq_llm.engine.cpu import CpuEngine
from abq_llm.linear import QuantLinear
from abq_llm.models import load_model
from abq_llm.quantize import quantize

PAIRS = (("W4A8", "Q4_K_M"), ("W3A8", "Q3_K_M"), ("W2A8", "Q2_K"), ("W2A8", "TQ2_0"), ("W8A8", "Q8_0"))
HEAD_BITS = 8
SEED = 0


class Ours:
    """A packed model in the CPU engine."""

    def __init__(self, source: Path, scheme: str, work: Path, capacity: int) -> None:
        directory = work / scheme
        if not directory.is_dir():
            model, tokenizer = load_model(source)
            quantize(model, scheme, "rtn", device="cpu", head_bits=HEAD_BITS)
            abq_llm.save(model, directory, tokenizer=tokenizer)
        model, _ = abq_llm.load(directory, dtype=torch.float32)
        packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
        self.bytes = sum(tensor.nbytes for module in packed for tensor in module.packed_weight())
        self.weights = sum(module.in_features * module.out_features for module in packed)
        self._engine = CpuEngine(model, capacity)

    def start(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._engine.truncate(0)

    def step(self, tokens: torch.Tensor) -> None:
        self._engine(tokens)


class Theirs:
    """A model of llama.cpp, with its defaults: memory-mapped, its own layouts of weights, cache in fp16."""

    def __init__(self, source: Path, kind: str, work: Path, capacity: int) -> None:
        path = work / f"{kind}.gguf"
        if not path.is_file():
            half = work / "F16.gguf"
            if not half.is_file():
                _requantize(source, half, "F16")
            _requantize(half, path, kind)
        tensors = [tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2]
        self.bytes = sum(int(tensor.n_bytes) for tensor in tensors)
        self.weights = sum(int(tensor.n_elements) for tensor in tensors)
        self.types = {name: sum(tensor.tensor_type.name == name for tensor in tensors) for name in _names(tensors)}
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = capacity
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        assert self._context

    def start(self, threads: int) -> None:
        llama_cpp.llama_set_n_threads(self._context, threads, threads)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def step(self, tokens: torch.Tensor) -> None:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens.tolist())
        batch = llama_cpp.llama_batch_get_one(ids, len(tokens))
        assert llama_cpp.llama_decode(self._context, batch) == 0
        assert llama_cpp.llama_get_logits_ith(self._context, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where both sides' files go, and stay")
    parser.add_argument("--pair", action="append", metavar="SCHEME:TYPE", help=f"default: {PAIRS}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--behind", type=int, default=32, help="tokens before those that are written")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--commit", help="of the code, where there is no git history")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    _silence()
    capacity = max(args.prompt, args.behind + args.tokens)
    pairs = [tuple(pair.split(":")) for pair in args.pair] if args.pair else PAIRS
    every = [int(threads) for threads in args.threads.split(",")]
    rows = []
    for scheme, kind in pairs:
        sides = {
            "ours": Ours(args.gguf, scheme, args.work, capacity),
            "theirs": Theirs(args.gguf, kind, args.work, capacity),
        }
        seconds: dict[tuple[str, int, str], list[float]] = {}
        for _ in range(args.rounds):
            for threads in every:
                for name, side in sides.items():
                    for what, times in _round(side, threads, args).items():
                        seconds.setdefault((name, threads, what), []).extend(times)
        for threads in every:
            row: dict[str, Any] = {"ours": scheme, "theirs": kind, "threads": threads}
            for what, count in (("prefill", args.prompt), ("decode", 1)):
                for name in sides:
                    times = seconds[name, threads, what]
                    row[f"{name}_{what}_tokens_per_s"] = count / statistics.median(times)
                    row[f"{name}_{what}_best"] = count / min(times)
                row[f"{what}_ratio"] = row[f"ours_{what}_tokens_per_s"] / row[f"theirs_{what}_tokens_per_s"]
            for name, side in sides.items():
                row[f"{name}_bytes"], row[f"{name}_bits_per_weight"] = side.bytes, 8 * side.bytes / side.weights
            row["theirs_types"] = sides["theirs"].types
            rows.append(row)
            print(json.dumps(row), flush=True)
    torch.set_num_threads(max(every))
    record = {
        "device": device_name(torch.device("cpu")),
        "versions": {
            "abq_llm": abq_llm.__version__,
            "torch": torch.__version__,
            "llama_cpp_python": llama_cpp.__version__,
        },
        "llama_cpp": llama_cpp.llama_print_system_info().decode(),
        "commit": args.commit or commit_of_code(),
        "model": args.gguf.name,
        "head_bits": HEAD_BITS,
        **{name: getattr(args, name) for name in ("rounds", "prompt", "behind", "tokens")},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def _round(side: Ours | Theirs, threads: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a prompt, and of each token written."""
    ids = torch.from_numpy(np.random.default_rng(SEED).integers(0, 32000, args.prompt + args.tokens))
    side.start(threads)
    side.step(ids[:16])  # wakes the threads
    side.start(threads)
    prefill = _seconds(side.step, ids[: args.prompt])
    side.start(threads)
    side.step(ids[: args.behind])
    decode = [_seconds(side.step, ids[args.prompt + i : args.prompt + i + 1]) for i in range(args.tokens)]
    return {"prefill": [prefill], "decode": decode}


def _seconds(step: Callable[[torch.Tensor], None], tokens: torch.Tensor) -> float:
    started = time.perf_counter()
    step(tokens)
    return time.perf_counter() - started


def _requantize(source: Path, target: Path, kind: str) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) == 0


def _names(tensors: list[Any]) -> list[str]:
    return sorted({tensor.tensor_type.name for tensor in tensors})


@llama_cpp.llama_log_callback
def _ignore(level: int, text: bytes, data: Any) -> None:
    """Takes llama.cpp's log."""


def _silence() -> None:
    llama_cpp.llama_log_set(_ignore, ctypes.c_void_p())


if __name__ == "__main__":
    main()
