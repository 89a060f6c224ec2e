"""Mixtral's experts as linears that can be quantized: Transformers holds those of a block in two 3-D parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts


class Expert(nn.Module):
    """w2(act(w1(x)) * w3(x)), with the names of Mixtral's checkpoints."""

    def __init__(self, act_fn: nn.Module, gate_up: Tensor, down: Tensor) -> None:
        """Linears whose weights are views: gate_up [2 I, H], down [H, I]."""
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.w1, self.w3, self.w2 = (_linear(weight) for weight in (gate, up, down))
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, H] -> [tokens, H]."""
        y: Tensor = self.w2(self.act_fn(self.w1(x)) * self.w3(x))
        return y


class LinearExperts(nn.ModuleList):
    """The experts of a block. `shown_all` are those that run on every token, though what they make of a token counts
    only where it was routed to them: so can calibration see more of an expert than its share.
    """

    shown_all: frozenset[int] = frozenset()

    def __init__(self, fused: MixtralExperts) -> None:
        weights = zip(fused.gate_up_proj, fused.down_proj, strict=True)
        super().__init__(Expert(fused.act_fn, gate_up, down) for gate_up, down in weights)

    @property
    def in_features(self) -> int:
        """H."""
        return self.get_parameter("0.w1.weight").shape[1]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, H], top_k_index and top_k_weights [tokens, k] -> [tokens, H]."""
        total = torch.zeros_like(hidden_states)
        for index in sorted(self.shown_all.union(top_k_index.unique().tolist())):
            token, place = torch.where(top_k_index == index)
            if index in self.shown_all:
                y = self[index](hidden_states)[token]
            else:
                y = self[index](hidden_states[token])
            total.index_add_(0, token, (y * top_k_weights[token, place, None]).to(total.dtype))
        return total


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    return linear
