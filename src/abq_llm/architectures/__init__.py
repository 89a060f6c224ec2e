"""One small table per model family: which norm or linear feeds which linears. Every method uses the same tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields

from transformers import PreTrainedConfig

from abq_llm.architectures.falcon import falcon
from abq_llm.architectures.gemma import GEMMA2, GEMMA3
from abq_llm.architectures.llama import LLAMA
from abq_llm.architectures.mixtral import mixtral
from abq_llm.architectures.opt import OPT
from abq_llm.architectures.phi3 import phi3
from abq_llm.architectures.qwen3 import QWEN3
from abq_llm.architectures.table import Architecture, LinearPair, NormPair, QueryKeyPair, Rows, ValueOutputPair
from abq_llm.errors import AbqError

__all__ = ["Architecture", "LinearPair", "NormPair", "QueryKeyPair", "Rows", "ValueOutputPair", "architecture_of"]

# `config.model_type` -> its table, or a function that makes it from the config: of fused linears, of experts
TABLES: dict[str, Architecture | Callable[[PreTrainedConfig], Architecture]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "opt": OPT,
    "falcon": falcon,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": phi3,
    "mixtral": mixtral,
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The table of a model with this config.

    Raises:
        AbqError: there is none, and what one needs; or the config is of a variant that the table does not fit.
    """
    name = config.model_type
    if name not in TABLES:
        known = ", ".join(TABLES)
        needs = ", ".join(field.name for field in fields(Architecture) if field.default is MISSING)
        raise AbqError(
            f"unsupported architecture {name!r}; supported: {known} (a table for it needs {needs}: "
            "docs/adding-a-model.md)"
        )
    entry = TABLES[name]
    table = entry if isinstance(entry, Architecture) else entry(config)
    for key, value in table.requires:
        if (found := getattr(config, key)) != value:
            raise AbqError(f"unsupported variant of {name!r}: {key} is {found!r}, supported is {value!r}")
    return table
