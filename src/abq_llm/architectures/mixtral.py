"""Mixtral: LLaMA's attention, and a router that sends each token to a few of many experts, each a SwiGLU MLP.

The linears of the experts are those of `modules.experts`: w1 is the gate, w3 the way up, w2 the way down. The router
reads the same norm as they do and stays in floating point.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from abq_llm.architectures.llama import LLAMA
from abq_llm.architectures.table import Architecture, LinearPair, NormPair


def mixtral(config: PreTrainedConfig) -> Architecture:
    experts = tuple(f"mlp.experts.{index}" for index in range(config.num_local_experts))
    entries = tuple(f"{expert}.{name}" for expert in experts for name in ("w1", "w3"))
    exits = tuple(f"{expert}.w2" for expert in experts)
    attention = tuple(name for name in LLAMA.linears if name.startswith(LLAMA.attention))
    return replace(
        LLAMA,
        linears=(*attention, *entries, *exits),
        pairs=(
            *LLAMA.pairs[:3],
            NormPair("post_attention_layernorm", entries, kept=("mlp.gate",)),
            *(LinearPair(f"{expert}.w3", f"{expert}.w2") for expert in experts),
        ),
        compensated=exits,
    )
