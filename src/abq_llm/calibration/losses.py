"""The two losses of ABQ-LLM (AAAI 2025, section 3.2).

    DLC:  -log cos(d_q, d_fp) - log cos(d_q, d*_fp)   d_fp, d*_fp: fp block on the fp and the quantized stream
    AKL:  KL(A_q || A_fp) + KL(A_fp || A_q)               per head and row of the attention map

The published code applies softmax to an already softmaxed, head-averaged map, which leaves the AKL term near zero;
here it is taken per head, on log-probabilities, and averaged over rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from abq_llm.attention import attention_scores


def dlc_loss(output: Tensor, *targets: Tensor) -> Tensor:
    """output and targets [B, T, H] -> scalar: minus the logs of the mean cosine over tokens, summed over targets."""
    cosines = [F.cosine_similarity(output.float(), target.float(), dim=-1).mean() for target in targets]
    return -torch.stack(cosines).clamp_min(1e-6).log().sum()


def relative_mse(output: Tensor, target: Tensor) -> Tensor:
    """output and target [B, T, H] -> scalar: squared error over squared size, per token, averaged."""
    output, target = output.float(), target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


def akl_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    rows: Tensor,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """(query [B, heads, T, d], key [B, kv_heads, T, d]) of both blocks, rows int64 [R] -> scalar.

    Both directions of the KL divergence at once, sum (p - q)(log p - log q), of attention maps with that mask and
    softcap (`attention.attention_scores`), averaged over batch, heads and the given rows.
    """
    log_q, log_p = (attention_scores(*pair, mask, softcap, rows).log_softmax(-1) for pair in (student, teacher))
    gap = torch.where(log_p.isfinite(), log_q - log_p, 0)
    return ((log_q.exp() - log_p.exp()) * gap).sum(-1).mean()
