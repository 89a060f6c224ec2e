"""Fast decoding on one device: a whole model in one native call a token. Transformers runs what has no engine."""
