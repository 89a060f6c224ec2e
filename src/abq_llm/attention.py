"""The attention function "abq" for Transformers: SDPA over keys and values quantized per token and head.

Keys are quantized after RoPE, as a cache would hold them. A model is told to use it by `config._attn_implementation
= "abq"`; each attention module's `kv_format` says how many bits (absent: none). Quantizing twice changes no code, so
it does not matter that a Transformers cache keeps the values and this function quantizes them on every read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from abq_llm.quantizers import fake_quantize_dynamic
from abq_llm.scheme import IntFormat

NAME = "abq"


class AttentionRecord(NamedTuple):
    """What met in one call of an attention module: the arguments of `attention_scores`."""

    query: Tensor  # [B, heads, T, d], RoPE'd, scaled as if the product were divided by sqrt(d)
    key: Tensor  # [B, kv_heads, S, d], RoPE'd, quantized
    mask: Tensor | None
    softcap: float | None


def register() -> None:
    """Make "abq" an attention implementation of Transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, T, d], key and value [B, kv_heads, S, d] -> [B, T, heads, d]."""
    fmt: IntFormat | None = getattr(module, "kv_format", None)
    key, value = fake_quantize_dynamic(key, fmt), fake_quantize_dynamic(value, fmt)
    records = getattr(module, "attention_records", None)
    if records is not None or softcap is not None:
        usual, scaling = query.shape[-1] ** -0.5, kwargs.get("scaling")
        scaled = query if scaling in (None, usual) else query * (scaling / usual)
        record = AttentionRecord(scaled, key, attention_mask, softcap)
        if records is not None:
            records.append(record)
        if softcap is not None:
            probabilities = attention_scores(*record).softmax(-1).to(value.dtype)
            return (probabilities @ _repeat(value, query)).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def attention_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, softcap: float | None, rows: Tensor | None = None
) -> Tensor:
    """fp32 [B, heads, T, S], the logarithms of the attention map up to a constant in each row.

    Args:
        query, key: [B, heads, T, d] and [B, kv_heads, S, d]; their product is divided by sqrt(d).
        mask: as for SDPA, [B or 1, heads or 1, T, S]: True where to look, or to be added; None: causal.
        softcap: c of c tanh(. / c) on the scores, which SDPA does not have (Gemma 2).
        rows: int64 [R], only these of the T rows.
    """
    tokens = query.shape[2]
    if rows is None:
        rows = torch.arange(tokens, device=query.device)
    scores = query[:, :, rows].float() @ _repeat(key, query).float().transpose(-1, -2) / query.shape[-1] ** 0.5
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is None and tokens == 1:  # at the end of what is cached: it sees everything
        return scores
    mask = torch.arange(key.shape[2], device=rows.device) <= rows[:, None] if mask is None else mask[:, :, rows]
    nothing = torch.finfo(scores.dtype).min  # not -inf: a row of padding, which sees nothing, would become NaN
    return scores.masked_fill(~mask, nothing) if mask.dtype == torch.bool else scores + mask


def _repeat(per_kv_head: Tensor, query: Tensor) -> Tensor:
    """[B, kv_heads, S, d] -> [B, heads, S, d]: each kv head serves heads / kv_heads neighbouring query heads."""
    return per_kv_head.repeat_interleave(query.shape[1] // per_kv_head.shape[1], 1)


def set_kv_format(model: nn.Module, fmt: IntFormat | None) -> None:
    """Quantize the keys and values of every attention module of `model` to `fmt` (None: leave them alone)."""
    for module in attention_modules(model):
        module.kv_format = fmt  # type: ignore[assignment]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that call the attention function: Transformers gives each of them `is_causal` and a layer index."""
    return [module for module in model.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx")]


@contextmanager
def record_attention(module: nn.Module) -> Iterator[list[AttentionRecord]]:
    """Within, each call of `module` appends its record."""
    records: list[AttentionRecord] = []
    module.attention_records = records  # type: ignore[assignment]
    try:
        yield records
    finally:
        del module.attention_records
