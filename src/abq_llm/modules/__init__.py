"""Our modules in place of those of Transformers that keep weights or attention out of reach."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.falcon import modeling_falcon
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from abq_llm import attention
from abq_llm.modules.experts import LinearExperts
from abq_llm.modules.falcon import FalconAttention

__all__ = ["FalconAttention", "LinearExperts", "adapt"]


def adapt(model: PreTrainedModel) -> None:
    """Give `model`, on any device, the modules of this package, in place; it computes the same."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MixtralExperts):
            model.set_submodule(name, LinearExperts(module))
        elif isinstance(module, modeling_falcon.FalconAttention):
            module.__class__ = FalconAttention  # the same parameters and attributes, another forward
            model.config._attn_implementation = attention.NAME
