import pytest
import torch

from abq_llm.modules import FalconAttention, adapt
from tests.blocks import random_tokens
from tests.tiny import VARIANTS, tiny_model


@pytest.mark.parametrize(("variant", "kv_heads"), [("falcon", 1), ("falcon-new", 2), ("falcon-rw", 4)])
@torch.no_grad()
def test_it_computes_the_same_and_caches_no_copies(variant, kv_heads):
    model_type, overrides = VARIANTS[variant]
    model, adapted = tiny_model(model_type, **overrides), tiny_model(model_type, **overrides)
    adapt(adapted)
    tokens = random_tokens(2, 12)
    expected, ours = (m(tokens, use_cache=True) for m in (model, adapted))
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert ours.past_key_values.layers[0].keys.shape == (2, kv_heads, 12, 16)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in adapted.state_dict().items())
    assert type(adapted.transformer.h[1].self_attention) is FalconAttention
    assert adapted.config._attn_implementation == "abq"
