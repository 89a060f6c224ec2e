"""OPT: LayerNorm and linears with biases, learned positions, ReLU."""

from __future__ import annotations

from abq_llm.architectures.table import Architecture, LinearPair, NormPair, QueryKeyPair, ValueOutputPair

OPT = Architecture(
    blocks="model.decoder.layers",
    attention="self_attn",
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "fc1",
        "fc2",
    ),
    pairs=(
        NormPair("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        QueryKeyPair("self_attn.q_proj", "self_attn.k_proj", rotary=0.0),
        ValueOutputPair("self_attn.v_proj", "self_attn.out_proj"),
        NormPair("final_layer_norm", ("fc1",)),
        LinearPair("fc1", "fc2"),  # relu(x / s) = relu(x) / s for s > 0
    ),
    compensated=("fc2",),
    requires=(
        ("do_layer_norm_before", True),  # OPT-350m: the norms follow the residual sum, their weights feed it as well
        ("activation_function", "relu"),  # Galactica: GELU
        ("layer_norm_elementwise_affine", True),
    ),
)
