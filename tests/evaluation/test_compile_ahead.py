"""Compiling ahead: what runs, and that a failure there is left for the measurement to report."""

import torch

from abq_llm.evaluation.compile_ahead import compile_ahead
from abq_llm.evaluation.kernels_compared import ours, torch_fp16, torch_int8
from abq_llm.scheme import Scheme

CPU = torch.device("cpu")


def test_ours_run_and_those_that_do_not_compile_are_left_out():
    seen = []
    kernels = [torch_fp16(), torch_int8(), ours("reference", Scheme.parse("W2*A8"))]
    refused = ours("cuda", Scheme.parse("W4A8"))
    compile_ahead([*kernels, refused], [(8, 32)], [1, 3], CPU, 1, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
