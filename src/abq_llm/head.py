"""The output head in few bits: rounded to nearest in groups of 64, and its input left alone.

On a small model the head is a large part of what a token reads (SmolLM2-135M: half, beside a body of 4 bits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from abq_llm.errors import AbqError
from abq_llm.linear import QuantLinear
from abq_llm.quantizers import choose_qparams, to_groups
from abq_llm.scheme import Scheme

HEAD_BITS = (*range(1, 9), 16)


def head_scheme(bits: int) -> Scheme:
    """The scheme of a head of that many bits, 1..8."""
    return Scheme.parse(f"W{bits}A16g64")


def head_name(model: Any) -> str:
    """The name of the module that makes the logits."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


@torch.no_grad()
def quantize_head(model: Any, bits: int, scale_dtype: torch.dtype) -> None:
    """Pack the output head of `model` in place; 16 leaves it. A head that was the embedding no longer is.

    Raises:
        AbqError: `bits` is not in `HEAD_BITS`.
    """
    if bits not in HEAD_BITS:
        raise AbqError(f"{bits} bits of the head are not in 1..8 or 16")
    if bits == 16:
        return
    head, scheme = model.get_output_embeddings(), head_scheme(bits)
    assert scheme.weight is not None
    qparams = choose_qparams(to_groups(head.weight, scheme.group_size), scheme.weight, scale_dtype=scale_dtype)
    packed = QuantLinear.from_linear(head, qparams, scheme, scale_dtype)
    model.set_submodule(head_name(model), packed)
    untie(model)


def untie(model: Any) -> None:
    """Tell Transformers that the head has weights of its own."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def head_bits(model: Any) -> int:
    """Bits of the head's weights; 16 if it is not packed."""
    head: nn.Module = model.get_output_embeddings()
    return head.scheme.weight.bits if isinstance(head, QuantLinear) and head.scheme.weight else 16
