"""Gemma 2 and 3 (text): LLaMA's linears between norms before and after attention and MLP, which multiply by 1 + weight.

No scale passes the norms behind attention and MLP: one per channel would change the mean square that they divide by.
Gemma 2 caps attention scores (tanh): queries and keys still meet only in their product.
"""

from __future__ import annotations

from dataclasses import replace

from abq_llm.architectures.llama import LLAMA
from abq_llm.architectures.table import NormPair, QueryKeyPair

GEMMA2 = replace(
    LLAMA,
    pairs=(
        NormPair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), offset=1.0),
        NormPair("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), offset=1.0),
        *(pair for pair in LLAMA.pairs if not isinstance(pair, NormPair)),
    ),
)

# Queries and keys have norms per head, as in Qwen3. But 2^n (1 + weight) - 1 is no number that bf16 holds, so no scale
# can move between them without loss.
GEMMA3 = replace(GEMMA2, pairs=tuple(pair for pair in GEMMA2.pairs if not isinstance(pair, QueryKeyPair)))
