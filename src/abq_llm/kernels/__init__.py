"""The op `abq_llm::linear`, its fake, and the choice of the backend that computes it.

A backend turns the canonical packed weight into its own layout once (`prepare`) and multiplies by it (`linear`). All
backends compute the same integers (docs/architecture.md, "The integer contract"); `reference` is the definition.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from abq_llm.errors import AbqError
from abq_llm.kernels import cpu, cuda, reference
from abq_llm.scheme import Scheme


class Backend(Protocol):
    """What a module under `kernels/` offers. Register it in `BACKENDS`, fastest first."""

    def available(self, device: torch.device) -> str | None:
        """None if this backend can run on `device`, else the reason why not."""

    def prepare(self, weight: list[Tensor], scheme: Scheme, in_features: int) -> list[Tensor]:
        """[weight_packed, weight_scale, (weight_zero_point)] as on disk -> whatever `linear` wants to be given."""

    def linear(self, x: Tensor, weight: list[Tensor], bias: Tensor | None, scheme: Scheme) -> Tensor:
        """x [M, K] -> [M, N] in the dtype of x."""


BACKENDS: dict[str, Backend] = {"cuda": cuda, "cpu": cpu, "reference": reference}


def choose_backend(name: str, device: torch.device) -> str:
    """The name of the backend to use: `name` itself if it can run on `device`, or for "auto" the first that can."""
    if name == "auto":
        return next(candidate for candidate, backend in BACKENDS.items() if backend.available(device) is None)
    if name not in BACKENDS:
        raise AbqError(f"unknown backend {name!r}; this installation has {', '.join(BACKENDS)}")
    if reason := BACKENDS[name].available(device):
        raise AbqError(f"backend {name!r} cannot run on {device}: {reason}")
    return name


@torch.library.custom_op("abq_llm::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    out_features: int,
    scheme: str,
    weight_symmetric: bool,
    activation_symmetric: bool,
    backend: str,
) -> Tensor:
    """Quantized linear layer: x [..., K] -> [..., out_features] in the dtype of x.

    `weight` is what `BACKENDS[backend].prepare` returned.
    """
    parsed = Scheme.parse(scheme, weight_symmetric=weight_symmetric, activation_symmetric=activation_symmetric)
    with torch.autocast(x.device.type, enabled=False):
        y = BACKENDS[backend].linear(x.reshape(-1, x.shape[-1]), weight, bias, parsed)
    return y.view(*x.shape[:-1], out_features)


@linear.register_fake
def _(x, weight, bias, out_features, scheme, weight_symmetric, activation_symmetric, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], out_features)
