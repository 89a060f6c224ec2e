"""Phi-3 and Phi-4: LLaMA's block with q, k, v in one linear and gate, up in another; RoPE may turn a part of a head."""

from __future__ import annotations

from transformers import PreTrainedConfig

from abq_llm.architectures.table import Architecture, LinearPair, NormPair, QueryKeyPair, ValueOutputPair, fused


def phi3(config: PreTrainedConfig) -> Architecture:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    query, key, value = fused("self_attn.qkv_proj", heads, kv_heads, kv_heads)
    _, up = fused("mlp.gate_up_proj", config.intermediate_size, config.intermediate_size)
    return Architecture(
        blocks="model.layers",
        attention="self_attn",
        linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        pairs=(
            NormPair("input_layernorm", ("self_attn.qkv_proj",)),
            QueryKeyPair(query, key, rotary=config.rope_parameters.get("partial_rotary_factor", 1.0)),
            ValueOutputPair(value, "self_attn.o_proj"),
            NormPair("post_attention_layernorm", ("mlp.gate_up_proj",)),
            LinearPair(up, "mlp.down_proj"),
        ),
        compensated=("mlp.down_proj",),
    )
