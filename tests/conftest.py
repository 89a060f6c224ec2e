"""Tests never use the network, and compute with one thread: their tensors are tiny, a thread pool is 3x slower."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when Transformers is imported

import torch

torch.set_num_threads(1)
