"""AffineQuant (Ma, Li, Zheng, Ling, Xiao, Wang, Wen, Chao, Ji, ICLR 2024, arXiv:2403.12544).

OmniQuant whose scale may be a matrix, where one can be folded away:

    argmin || W X - Q(W A) A^-1 X ||^2          A = diag(s) (I + P), for each head between v and o

A is opened by a gradual mask: only its diagonal in the first epoch, then one band beside it after the other,

    |i - j| <= e / (epochs - 1) (d - 1)         in epoch e = 0, 1, ...

It stays strictly diagonally dominant and so invertible (Levy-Desplanques): the rows of P are kept below one
(`calibration.affine`), and a stability factor makes its entries move slower than s. Behind norms A is diagonal; why,
and what else differs, is in docs/methods/affinequant.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from abq_llm.calibration.affine import mixed_heads
from abq_llm.calibration.block import BlockTask
from abq_llm.calibration.learned import LearnedWeights
from abq_llm.calibration.reconstruct import Group
from abq_llm.calibration.transforms import Parameters
from abq_llm.errors import AbqError
from abq_llm.methods.omniquant import initial_transformation, reconstruct_output
from abq_llm.quantizers import QParams


@dataclass(frozen=True)
class AffineQuant:
    """Options. The defaults are those of the published code for W4A4."""

    name: ClassVar[str] = "affinequant"
    needs_data: ClassVar[bool] = True

    epochs: int = 20
    lwc: bool = True  # learn clips; off: min-max grids
    alpha: float = 0.5  # where s starts: act^alpha / w^(1 - alpha)
    stability: float = 0.1  # how much slower P moves than s; 0: no matrices
    aug_loss: bool = False  # a second target: what the fp block makes of the quantized stream
    lr_lwc: float = 1e-2
    lr_let: float = 5e-3

    def __post_init__(self) -> None:
        if self.epochs < 0 or not 0 <= self.alpha <= 1 or not self.stability >= 0:
            raise AbqError(f"{self}: epochs and stability must be >= 0, alpha in 0..1")

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        weights, d = LearnedWeights(task), task.head_dim
        vectors = initial_transformation(task, weights, self.alpha)
        if self.lwc:
            vectors.clip = weights.full_ranges()
        for pair in vectors.balance:
            if heads := mixed_heads(pair, weights.parameters, d):
                vectors.mix[pair] = torch.zeros(heads, d, d, device=task.device)
        mask = torch.zeros(d, d, device=task.device)

        def open_mask(epoch: int) -> None:
            mask.copy_(gradual_mask(d, epoch, self.epochs))

        def quantized() -> Parameters:  # entries that the mask has not opened are 0, so the mask stops gradients only
            return weights.quantized(replace(vectors, mix={pair: P * mask for pair, P in vectors.mix.items()}))

        groups = [
            Group((*vectors.balance.values(), *vectors.shift.values()), self.lr_let),
            Group(tuple(vectors.mix.values()), self.lr_let * self.stability),
            Group(tuple(vectors.clip.values()), self.lr_lwc),
        ]
        reconstruct_output(task, groups, quantized, self.epochs, aug_loss=self.aug_loss, before_epoch=open_mask)
        return weights.fold(vectors)


def gradual_mask(d: int, epoch: int, epochs: int) -> Tensor:
    """bool [d, d]: the entries of P that may move in an epoch (from 0): none in the first, all in the last of more."""
    distance = (torch.arange(d)[:, None] - torch.arange(d)).abs()
    return (distance > 0) & (distance * max(epochs - 1, 1) <= epoch * (d - 1))
