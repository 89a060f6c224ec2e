"""LLaMA and the families that share its block: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

from __future__ import annotations

from abq_llm.architectures.table import Architecture, LinearPair, NormPair, QueryKeyPair, ValueOutputPair

LLAMA = Architecture(
    blocks="model.layers",
    attention="self_attn",
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    pairs=(
        NormPair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        QueryKeyPair("self_attn.q_proj", "self_attn.k_proj"),
        ValueOutputPair("self_attn.v_proj", "self_attn.o_proj"),
        NormPair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        LinearPair("mlp.up_proj", "mlp.down_proj"),
    ),
    compensated=("mlp.down_proj",),
)
