"""Falcon: LayerNorm, attention beside the MLP, multi-query attention or few key heads, q, k, v in one linear.

GELU stands between the linears of the MLP: no scale passes through it, so dense_4h_to_h has no pair.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from abq_llm.architectures.table import Architecture, NormPair, QueryKeyPair, ValueOutputPair, fused

QKV, UP = "self_attention.query_key_value", "mlp.dense_h_to_4h"


def falcon(config: PreTrainedConfig) -> Architecture:
    d, new = config.head_dim, config.new_decoder_architecture
    kv_heads = config.num_kv_heads if new or not config.multi_query else 1
    # Each key head stands with its value head behind the query heads that it serves.
    query, key, value = fused(QKV, config.num_attention_heads // kv_heads * d, d, d)
    norms: tuple[NormPair, ...]
    if new and config.num_ln_in_parallel_attn != 1:
        norms = NormPair("ln_attn", (QKV,)), NormPair("ln_mlp", (UP,))
    elif new or config.parallel_attn:
        norms = (NormPair("input_layernorm", (QKV, UP)),)
    else:
        norms = NormPair("input_layernorm", (QKV,)), NormPair("post_attention_layernorm", (UP,))
    return Architecture(
        blocks="transformer.h",
        attention="self_attention",
        linears=(QKV, "self_attention.dense", UP, "mlp.dense_4h_to_h"),
        pairs=(
            *norms,
            QueryKeyPair(query, key, rotary=float(not config.alibi)),
            ValueOutputPair(value, "self_attention.dense"),
        ),
        compensated=("mlp.dense_4h_to_h",),
    )
