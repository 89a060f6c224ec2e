"""Tests never use the network, and compute with one thread: their tensors are tiny, a thread pool is 3x slower.

The native module is compiled from the sources at hand. Where that fails, the tests of tests/kernels/cpu fail with the
compiler's message, and the others go on without the backend.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when Transformers is imported

import torch

from tests import native

torch.set_num_threads(1)

try:
    os.environ.setdefault("ABQ_NATIVE_MODULE", str(native.build_module()))
except RuntimeError as error:
    os.environ["ABQ_NATIVE_MODULE"] = f"not built: {error}"
