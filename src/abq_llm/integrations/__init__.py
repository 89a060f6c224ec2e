"""Other people's programs that can run our checkpoints."""
