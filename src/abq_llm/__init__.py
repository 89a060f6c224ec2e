"""ABQ-LLM."""
