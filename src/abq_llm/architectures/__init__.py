"""One small table per model family: which norm or linear feeds which linears. Every method uses the same tables."""

from __future__ import annotations

from dataclasses import MISSING, fields

from abq_llm.architectures.llama import LLAMA, QWEN2
from abq_llm.architectures.opt import OPT
from abq_llm.architectures.qwen3 import QWEN3
from abq_llm.architectures.table import Architecture, LinearPair, NormPair, QueryKeyPair, ValueOutputPair
from abq_llm.errors import AbqError

__all__ = ["Architecture", "LinearPair", "NormPair", "QueryKeyPair", "ValueOutputPair", "architecture_of"]

TABLES: dict[str, Architecture] = {name: table for table in (LLAMA, QWEN2, QWEN3, OPT) for name in table.model_types}


def architecture_of(model_type: str) -> Architecture:
    """The table for a `config.model_type`.

    Raises:
        AbqError: there is none; says what one needs.
    """
    if model_type not in TABLES:
        known = ", ".join(TABLES)
        needs = ", ".join(field.name for field in fields(Architecture) if field.default is MISSING)
        raise AbqError(
            f"unsupported architecture {model_type!r}; supported: {known} (a table for it needs {needs}: "
            "docs/adding-a-model.md)"
        )
    return TABLES[model_type]
