"""Perplexity of a model and its divergence from a reference model, on the same windows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from abq_llm.errors import AbqError
from abq_llm.evaluation.logits import has_separate_head, in_rows, logits_at


@dataclass(frozen=True)
class Evaluation:
    """Figures over all predicted tokens.

    Attributes:
        perplexity: exp of the mean negative log-likelihood; inf where that overflows.
        kl: mean KL(reference || model) over the full vocabulary, in nats; None without a reference.
        top1_agreement: share of positions where both models rank the same token first; None without a reference.
        tokens: number of predicted tokens, seqlen - 1 per window.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    tokens: int


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    reference: PreTrainedModel | None = None,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predict every token of every window from the tokens before it in the same window.

    Log-probabilities are computed in float32 from the models' logits, a few positions at a time, and summed in
    float64. The two models may be on different devices and of different dtypes; they are compared on the model's.

    Args:
        tokens: int64 [windows, seqlen], seqlen at least 2.
        reference: usually the model before quantization; the same vocabulary.
        batch_size: windows per forward pass.
        progress: called after each batch with (windows done, windows in total).

    Raises:
        AbqError: `tokens` has another shape or dtype, the vocabularies differ, or a figure is not finite.
    """
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise AbqError(f"tokens are {tokens.dtype} {list(tokens.shape)}, expected int64 [windows >= 1, seqlen >= 2]")
    if batch_size < 1:
        raise AbqError(f"batch_size is {batch_size}, it must be at least 1")
    models = [model] if reference is None else [model, reference]
    separate_head = [has_separate_head(each, tokens) for each in models]

    nll = kl = torch.zeros((), dtype=torch.float64)
    agreed, windows, done = 0, len(tokens), 0
    for batch in tokens.split(batch_size):
        target = in_rows(batch[:, 1:].flatten().to(model.device))
        predicting = torch.ones_like(batch, dtype=torch.bool)
        predicting[:, -1] = False
        streams = [logits_at(each, batch, predicting, apart) for each, apart in zip(models, separate_head, strict=True)]
        row_nll, row_kl, same = [], [], []  # nothing is fetched from the device before the batch is done
        for ids, (logits, *expected) in zip(target, zip(*streams, strict=True), strict=True):
            log_q = logits.float().log_softmax(-1)
            row_nll.append(-log_q.gather(1, ids[:, None])[:, 0])
            if expected:
                divergence, agreement = _divergence(expected[0].to(model.device), log_q)
                row_kl.append(divergence)
                same.append(agreement)
        nll = nll + _finite_sum(row_nll, len(batch), done, "negative log-likelihood")
        if reference is not None:
            kl = kl + _finite_sum(row_kl, len(batch), done, "KL divergence from the reference")
            agreed += int(torch.cat(same).sum())
        done += len(batch)
        if progress is not None:
            progress(done, windows)

    count = windows * (tokens.shape[1] - 1)
    perplexity = float((nll / count).exp())
    if reference is None:
        return Evaluation(perplexity, None, None, count)
    return Evaluation(perplexity, float(kl / count), agreed / count, count)


def _divergence(reference_logits: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || model) in nats, float32 [rows], and whether both rank the same token first, bool [rows]."""
    if reference_logits.shape != log_q.shape:
        sizes = log_q.shape[-1], reference_logits.shape[-1]
        raise AbqError(f"the model has a vocabulary of {sizes[0]}, the reference of {sizes[1]}: nothing to compare")
    log_p = reference_logits.float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return kl, log_p.argmax(-1) == log_q.argmax(-1)


def _finite_sum(chunks: list[torch.Tensor], windows: int, first: int, what: str) -> torch.Tensor:
    """Sum of the float32 chunks, the rows of `windows` windows from number `first` on, as a float64 on the CPU."""
    sums = torch.cat(chunks).view(windows, -1).double().sum(1).cpu()
    if not (finite := sums.isfinite()).all():
        raise AbqError(f"the {what} is not finite in window {first + int((~finite).nonzero()[0])}")
    return sums.sum()
