"""Packed checkpoints of a LLaMA-shaped model of 1.1 billion random weights, for `abq bench decode`: only speed counts.

    python benchmarks/random_model.py --tokenizer MODEL --scheme W2A8 --scheme W4A8 --out DIR

The shape is TinyLlama's; the vocabulary is that of the tokenizer, which a checkpoint has to have.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import abq_llm
from abq_llm.models import load_model
from abq_llm.quantize import quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a model whose tokenizer goes along")
    parser.add_argument("--scheme", action="append", required=True)
    parser.add_argument("--head-bits", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    _, tokenizer = load_model(args.tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    original = LlamaForCausalLM(config)
    for scheme in args.scheme:
        model = copy.deepcopy(original)
        quantize(model, scheme, "rtn", device="cpu", head_bits=args.head_bits)
        abq_llm.save(model, args.out / scheme, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
