"""ABQ-LLM: quantize a language model to any WpAq, pack it, run the packed integers."""

import abq_llm.integrations.transformers  # noqa: F401  (registers the packed format with Transformers)
from abq_llm.checkpoint import load, save
from abq_llm.quantize import quantize
from abq_llm.scheme import Scheme
from abq_llm.version import __version__

__all__ = ["Scheme", "__version__", "load", "quantize", "save"]
