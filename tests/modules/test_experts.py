import pytest
import torch
from safetensors import safe_open
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from abq_llm import checkpoint
from abq_llm.modules import LinearExperts, adapt
from abq_llm.quantize import quantize
from tests.tiny import VARIANTS, tiny_model


@pytest.fixture
def fused():
    """The experts of Transformers: 4 of 64 -> 96 -> 64."""
    model_type, overrides = VARIANTS["mixtral"]
    model = tiny_model(model_type, **overrides)
    return model.model.layers[0].mlp.experts


def routed(tokens=40, dtype=torch.float32):
    """Arguments of a forward: hidden states, and two experts with their weights for each token; never expert 2."""
    draw = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.tensor([0, 1, 3])[torch.randperm(3, generator=draw)[:2]] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=draw).to(dtype)
    return torch.randn(tokens, 64, generator=draw).to(dtype), experts, weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
@torch.no_grad()
def test_they_compute_what_the_fused_ones_do(fused, dtype, tolerance):
    fused = fused.to(dtype)
    expected = fused(*routed(dtype=dtype)).float()
    ours = LinearExperts(fused)(*routed(dtype=dtype)).float()
    assert (ours - expected).norm() < tolerance * expected.norm()


def test_their_weights_are_those_in_memory_already(fused):
    ours = LinearExperts(fused)
    storages = {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()}
    assert storages == {fused.gate_up_proj.untyped_storage().data_ptr(), fused.down_proj.untyped_storage().data_ptr()}
    assert torch.equal(torch.cat([ours[3].w1.weight, ours[3].w3.weight]), fused.gate_up_proj[3])
    assert torch.equal(ours[3].w2.weight, fused.down_proj[3])


@torch.no_grad()
def test_experts_that_are_shown_all_tokens_put_out_the_same(fused):
    ours, seen = LinearExperts(fused), {}
    for index, expert in enumerate(ours):
        expert.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: len(args[0])}))
    arguments = routed()
    counts = [int((arguments[1] == index).sum()) for index in range(4)]
    expected = ours(*arguments)
    assert seen == {0: counts[0], 1: counts[1], 3: counts[3]} and counts[2] == 0
    ours.shown_all = frozenset({1, 2})
    torch.testing.assert_close(ours(*arguments), expected, rtol=1e-5, atol=1e-5)
    assert seen == {0: counts[0], 1: 40, 2: 40, 3: counts[3]}


def test_a_model_is_adapted_once():
    model_type, overrides = VARIANTS["mixtral"]
    model = tiny_model(model_type, **overrides)
    adapt(model)
    experts = model.model.layers[1].mlp.experts
    adapt(model)
    assert isinstance(experts, LinearExperts) and model.model.layers[1].mlp.experts is experts
    assert not any(isinstance(module, MixtralExperts) for module in model.modules())


def test_a_checkpoint_has_the_names_of_mixtrals_own(tmp_path):
    model_type, overrides = VARIANTS["mixtral"]
    model = tiny_model(model_type, **overrides).bfloat16()
    quantize(model, "W4A8g32", "rtn", device="cpu")
    checkpoint.save(model, tmp_path / "first")
    checkpoint.load(tmp_path / "first")[0].save_pretrained(tmp_path / "again")
    all_names = [safe_open(tmp_path / out / "model.safetensors", "pt").keys() for out in ("first", "again")]
    assert all_names[0] == all_names[1]
    with safe_open(tmp_path / "first" / "model.safetensors", "pt") as file:
        names = {name for name in all_names[0] if ".layers.0.block" in name}
        router = file.get_tensor("model.layers.0.block_sparse_moe.gate.weight")
    tensors = ("weight_packed", "weight_scale", "weight_zero_point")
    linears = {
        f"experts.{index}.{name}.{tensor}" for index in range(4) for name in ("w1", "w2", "w3") for tensor in tensors
    }
    assert names == {f"model.layers.0.block_sparse_moe.{name}" for name in {"gate.weight", *linears}}
    original = tiny_model(model_type, **overrides).bfloat16().model.layers[0].mlp.gate.weight
    assert router.dtype == torch.bfloat16 and torch.equal(router, original)
