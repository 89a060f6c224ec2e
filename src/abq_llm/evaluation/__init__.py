"""How good a model is: perplexity and divergence from a reference model."""

from abq_llm.evaluation.perplexity import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
