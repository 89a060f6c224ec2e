"""Experts that few calibration tokens reach."""

import pytest
import torch

from abq_llm.calibration.experts import rare_experts_shown_all, routed_tokens
from abq_llm.linear import QuantLinear
from abq_llm.methods import METHODS
from abq_llm.quantize import quantize
from tests.blocks import calibration, first_block
from tests.tiny import VARIANTS, tiny_model


@torch.no_grad()
def model_that_shuns_expert_3():
    model_type, overrides = VARIANTS["mixtral"]
    model = tiny_model(model_type, **overrides)
    model.get_input_embeddings().weight.add_(20)  # so that what the routers see is positive
    for layer in model.model.layers:
        layer.mlp.gate.weight[3] = -1
    return model


def test_tokens_are_counted_as_they_are_routed():
    task = first_block(tiny_model("mixtral", num_local_experts=4))
    seen = dict.fromkeys(range(4), 0)
    for index, expert in enumerate(task.experts):
        expert.register_forward_pre_hook(
            lambda _, args, index=index: seen.update({index: seen[index] + len(args[0])}), prepend=True
        )
    counts = routed_tokens(task, task.experts, task.fp_stream).tolist()
    assert counts == [*seen.values()] and sum(counts) == 2 * 128 and min(counts) > 0


def test_those_with_fewer_tokens_than_inputs_see_all_for_a_while_and_are_named():
    messages = []
    task = first_block(model_that_shuns_expert_3(), samples=16, report=lambda message, _: messages.append(message))
    expected = task.fp_output
    with rare_experts_shown_all(task):
        assert 3 in task.experts.shown_all
        torch.testing.assert_close(task.forward_stream(task.fp_stream, quantized=False), expected, rtol=1e-5, atol=1e-5)
    assert not task.experts.shown_all
    (message,) = messages
    assert message.startswith("block 0: few of the 512 tokens reach experts ") and "3 (0)" in message


@pytest.mark.parametrize("stream", ["fp_stream", "quantized_stream"])
def test_both_streams_must_reach_an_expert(stream):
    task = first_block(tiny_model("mixtral", num_local_experts=4), samples=32)
    with rare_experts_shown_all(task):
        assert not task.experts.shown_all
    setattr(task, stream, getattr(task, stream)[:3])
    with rare_experts_shown_all(task):
        assert task.experts.shown_all


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_an_expert_without_tokens(method):
    model, messages = model_that_shuns_expert_3(), []
    quantize(
        model,
        "W3A8g32",
        method,
        calibration(16, 32),
        device="cpu",
        batch_size=4,
        epochs=1,
        progress=lambda block, blocks, loss, message: messages.append(message),
    )
    reports = [message for message in messages if "shown all" in message]
    assert len(reports) == (2 if METHODS[method].needs_data else 0) and all("3 (0)" in report for report in reports)
    for layer in model.model.layers:
        for linear in (layer.mlp.experts[3].w1, layer.mlp.experts[3].w2):
            assert isinstance(linear, QuantLinear) and linear.dequantize().isfinite().all()


def test_what_it_is_shown_calibrates_it():
    """GPTQ rounds to nearest what no input has reached."""
    models = {}
    for method in ("gptq", "rtn"):
        models[method] = model_that_shuns_expert_3()
        quantize(models[method], "W3A16", method, calibration(16, 32), device="cpu", batch_size=4)
    ours, nearest = (model.model.layers[0].mlp.experts[3].w1.weight_packed for model in models.values())
    assert not torch.equal(ours, nearest)
