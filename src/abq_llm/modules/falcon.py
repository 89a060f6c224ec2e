"""Falcon's attention through the attention function "abq": Transformers has it call SDPA by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.models.falcon import modeling_falcon

from abq_llm.attention import attention


class FalconAttention(modeling_falcon.FalconAttention):
    """As its parent, for inference; keys and values are cached once for all query heads that they serve."""

    num_kv_heads: int

    @property
    def num_key_value_groups(self) -> int:
        """How many query heads share a key head."""
        return self.num_heads // self.num_kv_heads

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, H] -> [B, T, H]; the mask holds the biases of ALiBi, if the model has them."""
        groups = self.num_key_value_groups
        heads = self.query_key_value(hidden_states).unflatten(-1, (self.num_kv_heads, groups + 2, self.head_dim))
        query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in heads.split([groups, 1, 1], 3))
        if alibi is None:
            assert position_embeddings is not None
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        else:
            attention_mask = attention_mask.to(query.dtype)  # calibration runs the blocks of a bf16 model in fp32
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        mixed, _ = attention(self, query, key, value, attention_mask)
        return self.dense(mixed.flatten(2)), None
