"""The attention function "abq" for Transformers: SDPA over keys and values quantized per token and head.

Keys are quantized after RoPE, as a cache would hold them. A model is told to use it by `config._attn_implementation
= "abq"`; each attention module's `kv_format` says how many bits (absent: none). Quantizing twice changes no code, so
it does not matter that a Transformers cache keeps the values and this function quantizes them on every read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from abq_llm.quantizers import fake_quantize_dynamic
from abq_llm.scheme import IntFormat

NAME = "abq"


def register() -> None:
    """Make "abq" an attention implementation of Transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [B, heads, T, d], key and value [B, kv_heads, S, d] -> [B, T, heads, d]."""
    fmt: IntFormat | None = getattr(module, "kv_format", None)
    key, value = fake_quantize_dynamic(key, fmt), fake_quantize_dynamic(value, fmt)
    if (records := getattr(module, "attention_records", None)) is not None:
        usual, scaling = query.shape[-1] ** -0.5, kwargs.get("scaling")
        records.append((query if scaling in (None, usual) else query * (scaling / usual), key))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def set_kv_format(model: nn.Module, fmt: IntFormat | None) -> None:
    """Quantize the keys and values of every attention module of `model` to `fmt` (None: leave them alone)."""
    for module in attention_modules(model):
        module.kv_format = fmt  # type: ignore[assignment]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that call the attention function: Transformers gives each of them `is_causal` and a layer index."""
    return [module for module in model.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx")]


@contextmanager
def record_attention(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within, each call of `module` appends its (query, key) as they meet: RoPE'd, keys quantized.

    Their product is still to be divided by sqrt(d), also where the module has scaled its queries by then (OPT).
    """
    records: list[tuple[Tensor, Tensor]] = []
    module.attention_records = records  # type: ignore[assignment]
    try:
        yield records
    finally:
        del module.attention_records
