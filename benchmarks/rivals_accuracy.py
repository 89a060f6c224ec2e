"""Other quantizers on the same tokens and windows: llm-compressor's GPTQ, GPTQModel, AutoRound. Writes one JSON record.

    python benchmarks/rivals_accuracy.py --model MODEL --scheme W4A16g64 --scheme W3A16g64 --calib TRAIN.raw \
        --ppl TEST.raw --samples 8 --seqlen 256 --windows 3 --tokens tokens.safetensors --envs DIR \
        --out benchmarks/results/NAME.json

Each rival is installed from PyPI into an environment of its own, DIR/RIVAL, by the first run; there it quantizes the
model in its own way, and `abq_llm.evaluation.evaluate` compares the result with the unquantized model. The tokens are
drawn once, as `abq compare` draws them (the same seed gives it the same), and written to a file that is used again.
What is in the record already is kept, and only what is missing is run.
Weight-only schemes, the only ones that all of them have: asymmetric, W<bits>A16g<size>. Their other settings stay as
their authors set them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PACKAGES = {
    "llmcompressor": ("llmcompressor==0.14.0.1",),
    "auto-round": ("auto-round==0.16.1",),
    "gptqmodel": ("gptqmodel==7.6.0",),
}
OURS = ("gguf", "rich")  # what abq_llm imports and a rival may lack

# --- in a rival's environment ---


def llmcompressor(folder: str, tokens: torch.Tensor, bits: int, group_size: int, device: str):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=bits, strategy="group", group_size=group_size, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model = open_model(folder, device)
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )
    return model


def auto_round(folder: str, tokens: torch.Tensor, bits: int, group_size: int, device: str):
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    fit = AutoRound(
        open_model(folder, device),
        AutoTokenizer.from_pretrained(folder),
        scheme={"bits": bits, "group_size": group_size, "sym": False, "data_type": "int"},
        dataset=[{"input_ids": row[None]} for row in tokens],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map=device,
    )
    return fit.quantize()[0].float().to(device)  # it computes in 16 bits, and leaves blocks on the CPU


def gptqmodel(folder: str, tokens: torch.Tensor, bits: int, group_size: int, device: str):
    # Its default is half of the cores, and it fails with one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model = GPTQModel.load(folder, QuantizeConfig(bits=bits, group_size=group_size, sym=False), device=device)
    model.quantize(rows, batch_size=1)
    with tempfile.TemporaryDirectory() as saved:
        model.save(saved)
        return GPTQModel.load(saved, backend=BACKEND.TORCH, device=device).model


def open_model(folder: str, device: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def run(args: argparse.Namespace) -> dict:
    """Quantize and evaluate, here."""
    from abq_llm.evaluation import evaluate
    from abq_llm.scheme import Scheme

    (text,) = args.scheme
    scheme = Scheme.parse(text)
    if scheme.activation is not None or scheme.kv is not None or scheme.weight is None or not scheme.group_size:
        raise SystemExit(f"{scheme}: the rivals have weight-only schemes with groups, such as W4A16g64")
    if scheme.weight.balanced:
        raise SystemExit(f"{scheme}: the rivals have no balanced grids")
    tokens = load_file(args.tokens)
    quantizer = {"llmcompressor": llmcompressor, "auto-round": auto_round, "gptqmodel": gptqmodel}[args.inside]
    started = time.monotonic()
    model = quantizer(args.model, tokens["calibration"], scheme.weight.bits, scheme.group_size, args.device)
    seconds = time.monotonic() - started
    reference = open_model(args.model, args.device)
    texts = {name: windows for name, windows in tokens.items() if name != "calibration"}
    return {
        "rival": args.inside,
        "scheme": str(scheme),
        "versions": {name: version(name) for name in (args.inside, "torch", "transformers")},
        "seconds": seconds,
        "texts": {name: asdict(evaluate(model.eval(), windows, reference)) for name, windows in texts.items()},
    }


# --- from ours ---


def draw_tokens(args: argparse.Namespace, model, tokenizer) -> None:
    from abq_llm.data import calibration_tokens, evaluation_tokens

    drawn = calibration_tokens(args.calib, tokenizer, samples=args.samples, seqlen=args.seqlen, seed=args.seed)
    texts = [evaluation_tokens(text, tokenizer, limit=args.windows) for text in args.ppl]
    save_file({"calibration": drawn.tokens, **{text.name: text.tokens for text in texts}}, args.tokens)


def environment(rival: str, folder: Path) -> Path:
    """The Python of a rival's environment, made if it is not there."""
    python = folder / rival / "bin" / "python"
    if not python.exists():
        print(f"{rival}: installing into {folder / rival}", flush=True)
        own_torch = f"torch=={torch.__version__.split('+')[0]}"  # pinned: an open range makes pip fetch gigabytes
        subprocess.run([sys.executable, "-m", "venv", str(folder / rival)], check=True)
        for packages in ([own_torch, "setuptools", "wheel"], [own_torch, *PACKAGES[rival], *OURS]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scheme", action="append", required=True)
    parser.add_argument("--rival", action="append", choices=list(PACKAGES), help="Default: all.")
    parser.add_argument("--calib")
    parser.add_argument("--ppl", action="append", default=[])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--envs", type=Path, default=Path("rivals"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", help="What to call the model; default: its file's name.")
    parser.add_argument("--inside", choices=list(PACKAGES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.inside:
        args.out.write_text(json.dumps(run(args)))
        return

    import abq_llm
    from abq_llm.data import TokenSet
    from abq_llm.devices import device_name
    from abq_llm.models import load_model

    model, tokenizer = load_model(args.model)
    if not Path(args.tokens).exists():
        draw_tokens(args, model, tokenizer)
    tokens = {name: TokenSet(name, each) for name, each in load_file(args.tokens).items()}
    result = {
        "device": device_name(torch.device(args.device)),
        "model": args.name or Path(args.model).name,
        "tokens": {name: {"shape": list(each.tokens.shape), "sha256": each.sha256} for name, each in tokens.items()},
        "rows": [],
        "failures": [],
    }
    if args.out.exists():
        result["rows"] = json.loads(args.out.read_text())["rows"]
    done = {(row["scheme"], row["rival"]) for row in result["rows"]}
    wanted = [(scheme, rival) for scheme in args.scheme for rival in args.rival or PACKAGES]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        for scheme, rival in [each for each in wanted if each not in done]:
            out = Path(folder) / f"{scheme}_{rival}.json"
            tokens_file, script = Path(args.tokens).resolve(), Path(__file__).resolve()
            same = ["--scheme", scheme, "--tokens", str(tokens_file), "--device", args.device, "--out", str(out)]
            command = [str(script), "--inside", rival, "--model", f"{folder}/model", *same]
            source = str(Path(abq_llm.__file__).resolve().parent.parent)
            try:
                python = environment(rival, args.envs)
                environ = {**os.environ, "PYTHONPATH": source}
                subprocess.run([python.absolute(), *command], check=True, env=environ, cwd=folder)  # some leave logs
            except subprocess.CalledProcessError as error:
                result["failures"].append({"scheme": scheme, "rival": rival, "exit_code": error.returncode})
                print(f"{scheme} {rival}: failed", flush=True)
            else:
                result["rows"].append(json.loads(out.read_text()))
                print(json.dumps(result["rows"][-1]), flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
