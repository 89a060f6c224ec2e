"""Qwen3: LLaMA's block with a norm per head on queries and keys."""

from __future__ import annotations

from dataclasses import replace

from abq_llm.architectures.llama import LLAMA
from abq_llm.architectures.table import QueryKeyPair

QWEN3 = replace(
    LLAMA,
    pairs=tuple(
        # The norms undo what happens to the rows of q_proj and k_proj: the scale moves between the norms' own weights.
        QueryKeyPair("self_attn.q_norm", "self_attn.k_norm") if isinstance(pair, QueryKeyPair) else pair
        for pair in LLAMA.pairs
    ),
)
