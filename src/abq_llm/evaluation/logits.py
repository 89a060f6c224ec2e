"""Logits of some positions of a batch, a few rows at a time: whole ones of a large vocabulary would fill the memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

ROWS = 256  # positions whose logits exist at the same time: 256 x 128k x 4 bytes = 125 MiB per temporary


def in_rows(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`values` [rows, ...] cut like the logits of `logits_at`."""
    return values.split(ROWS)


def logits_at(
    model: PreTrainedModel, tokens: torch.Tensor, where: torch.Tensor, separate_head: bool
) -> Iterator[torch.Tensor]:
    """Logits of the positions `where` (bool [batch, seqlen]) of `tokens` (int64 [batch, seqlen]), in row-major order.

    Yields:
        chunks [at most ROWS, vocabulary], in the dtype and on the device of the model.
    """
    inputs = {"input_ids": tokens.to(model.device), "use_cache": False}
    where = where.to(model.device)
    if separate_head:
        head = model.get_output_embeddings()
        return (head(rows) for rows in in_rows(model.base_model(**inputs)[0][where]))
    return iter(in_rows(model(**inputs).logits[where]))


@torch.inference_mode()
def has_separate_head(model: PreTrainedModel, tokens: torch.Tensor) -> bool:
    """Whether logits are exactly the output embedding of the last hidden states, so that it can be applied in chunks.

    Not so where logits are scaled or capped afterwards (Gemma 2, Cohere, Granite ...); tried out on a few of `tokens`
    (int64 [batch, seqlen]) rather than looked up, so that it holds for every architecture.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    inputs = {"input_ids": tokens[:1, :8].to(model.device), "use_cache": False}
    hidden = model.base_model(**inputs)[0]
    return torch.equal(head(hidden), model(**inputs).logits)
