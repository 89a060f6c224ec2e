import copy
import math

import pytest
import torch

from abq_llm.architectures import QueryKeyPair
from abq_llm.calibration.block import input_statistics
from abq_llm.calibration.transforms import apply, block_parameters, consumers, initial_log_scale
from abq_llm.errors import AbqError
from abq_llm.evaluation import evaluate
from abq_llm.integer_only import integer_only
from abq_llm.methods import method_by_name
from abq_llm.methods.i_llm import ILlm
from abq_llm.quantize import quantize
from tests.blocks import calibration, first_block, random_tokens
from tests.tiny import VARIANTS, tiny_model


def learned(scheme="W4A8", **options):
    """-> the task and the block's parameters before and after."""
    task = first_block(tiny_model(), scheme)
    before = {name: tensor.clone() for name, tensor in block_parameters(task.block).items()}
    ILlm(**options).quantize_block(task)
    return task, before, block_parameters(task.block)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_starts_from_smoothquants_scale_at_every_pair(variant, alpha):
    model_type, overrides = VARIANTS[variant]
    task = first_block(tiny_model(model_type, **overrides))
    before = block_parameters(copy.deepcopy(task.block))
    peaks, expected = input_statistics(task, task.fp_stream).peak, dict(before)
    for pair in task.architecture.pairs:
        log_s = initial_log_scale(pair, before, peaks, task.head_dim, alpha)
        expected = apply(pair, expected, log_s, task.head_dim)
    ILlm(epochs=0, alpha=alpha).quantize_block(task)
    torch.testing.assert_close(block_parameters(task.block), expected, rtol=1e-5, atol=1e-6)
    moved = {name for pair in task.architecture.pairs for name in consumers(pair)}
    assert all(not torch.equal(before[f"{name}.weight"], expected[f"{name}.weight"]) for name in moved)


@pytest.mark.parametrize(("scheme", "learns"), [("W4A8", True), ("W4A8KV4", True), ("W4A16", False)])
def test_queries_and_keys_are_learned_where_integer_only_inference_can_follow(scheme, learns):
    (_, before, start), (task, _, after) = learned(scheme, epochs=0), learned(scheme, epochs=2)
    (pair,) = (pair for pair in task.architecture.pairs if isinstance(pair, QueryKeyPair))
    norm = "input_layernorm.weight"  # whose scale the columns of q and k also have
    rows = [block[f"{pair.key}.weight"] * block[norm] for block in (before, start, after)]
    assert all(((x / y).log().abs().max() > 1e-3) == learns for x, y in zip(rows[1:], rows[:-1], strict=True))


def test_training_lowers_the_held_out_loss():
    losses = [learned("W4A4", epochs=epochs)[0].block_loss for epochs in (0, 8)]
    assert losses[1] < 0.9 * losses[0]


def test_it_keeps_what_it_started_from_if_training_diverges():
    messages = []
    task = first_block(tiny_model(), report=lambda message, loss: messages.append(message))
    ILlm(epochs=1, lr=math.inf).quantize_block(task)
    assert any("not finite" in message for message in messages) and math.isfinite(task.block_loss)
    torch.testing.assert_close(block_parameters(task.block), learned(epochs=0)[2])


def test_integer_only_inference_keeps_what_it_gains():
    original, kl = tiny_model(), {}
    for method in ("rtn", "i_llm"):
        model = copy.deepcopy(original)
        quantize(model, "W4A4", method, calibration(), device="cpu", batch_size=4, epochs=4)
        with integer_only(model):
            kl[method] = evaluate(model, random_tokens(16, 32, seed=99), original, batch_size=8).kl
    assert kl["i_llm"] < 0.7 * kl["rtn"]


@pytest.mark.parametrize("options", [{"epochs": -1}, {"alpha": 1.5}, {"alpha": math.nan}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(AbqError, match=r"epochs must be >= 0, alpha in 0\.\.1"):
        method_by_name("i_llm", **options)
