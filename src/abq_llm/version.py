"""The version, in the one place from which the build and the provenance of checkpoints take it."""

__version__ = "0.1.0"
