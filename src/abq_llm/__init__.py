"""ABQ-LLM: quantize a language model to any WpAq, pack it, run the packed integers."""

from __future__ import annotations

import importlib
from typing import Any

import abq_llm.integrations.transformers  # noqa: F401  (registers the packed format with Transformers)

__version__ = "0.1.0"
__all__ = ["Scheme", "__version__", "load", "quantize", "save"]

_HOMES = {"Scheme": "scheme", "quantize": "quantize", "load": "checkpoint", "save": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"abq_llm.{_HOMES[name]}"), name)
        globals()[name] = value  # `quantize` is also the name of its module, which the import has just put here
        return value
    raise AttributeError(f"module 'abq_llm' has no attribute {name!r}")
