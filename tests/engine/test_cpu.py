"""The CPU engine against Transformers on the same packed model.

Both quantize activations, so that fp32 noise moves a few of them by a whole step, here as there: with A8 the logits
agree to the size of such a step, at A16, where nothing is rounded, to the rounding of fp16 caches and heads.
"""

import threading

import pytest
import torch

from abq_llm import attention
from abq_llm.engine.cpu import CpuEngine, unsupported
from abq_llm.errors import AbqError
from abq_llm.linear import set_backend
from abq_llm.quantize import quantize
from abq_llm.scheme import Scheme
from tests.tiny import VARIANTS, VOCAB, tiny_model

FAMILIES = ["llama", "llama-gqa-tied", "mistral", "qwen2", "qwen3"]


def packed(variant, scheme, **overrides):
    model_type, usual = VARIANTS[variant]
    windowless = {"sliding_window": None} if "sliding_window" in usual else {}
    model = tiny_model(model_type, **{**usual, **windowless, "head_dim": 32, **overrides})
    quantize(model, scheme, "rtn", device="cpu")
    return model


def text(count, seed=0):
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, tokens):
    return model(tokens[None]).logits[0]


@pytest.fixture
def halves(monkeypatch):
    """Transformers with keys, values and the head in fp16, as the engine holds them."""
    quantizer = attention.fake_quantize_dynamic

    def rounded(x, fmt):
        return x.half().float() if fmt is None else quantizer(x, fmt)

    monkeypatch.setattr(attention, "fake_quantize_dynamic", rounded)

    def with_half_head(model):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.half().float())
        return model

    return with_half_head


@pytest.mark.parametrize("scheme", ["W4A16g32", "W8A16", "W3A16KV8", "W4A16KV4g32", "W2*A16KV3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(level, halves, family, scheme):
    """A cache of integers may round a key the other way: then one step of 2^-4 or 2^-3 of its range, in one key."""
    model = packed(family, scheme)
    tokens = text(50)
    got = CpuEngine(model, 50)(tokens, every=True)
    torch.testing.assert_close(got, logits_of(halves(model), tokens), rtol=0, atol=2e-3 if "KV" not in scheme else 0.3)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8g32", "W2*A8KV8", "W8A6"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_quantized_activations_logits_are_near(level, halves, family, scheme):
    model = packed(family, scheme)
    tokens = text(50)
    got, expected = CpuEngine(model, 50)(tokens, every=True), logits_of(halves(model), tokens)
    assert (got - expected).square().mean().sqrt() < 0.03 * expected.std()
    assert (got - expected).abs().median() < 2e-3


def test_symmetric_grids(level):
    model = tiny_model(head_dim=32)
    scheme = Scheme.parse("W4A8KV8", weight_symmetric=True, activation_symmetric=True)
    quantize(model, scheme, "rtn", device="cpu")
    tokens = text(30)
    got, expected = CpuEngine(model, 30)(tokens, every=True), logits_of(model, tokens)
    assert (got - expected).square().mean().sqrt() < 0.03 * expected.std()


@pytest.mark.parametrize("scheme", ["W4A8", "W4A8KV8", "W4A16KV4"])
def test_one_by_one_is_all_at_once(level, scheme):
    """To the last bit: a token's integers do not depend on its neighbours, nor does the order of its sums."""
    engine = CpuEngine(packed("qwen3", scheme, max_position_embeddings=512), 300)
    tokens = text(300)
    together = engine(tokens, every=True)  # more than one chunk
    engine.truncate(0)
    assert torch.equal(engine(tokens), together[-1])
    engine.truncate(270)
    alone = torch.stack([engine(token[None]) for token in tokens[270:]])
    assert torch.equal(alone, together[270:])
    assert engine.length == 300


def test_threads_change_nothing(level):
    engine = CpuEngine(packed("llama", "W4A8"), 20)
    tokens = text(20)
    expected = engine(tokens, every=True)
    before = torch.get_num_threads()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            engine.truncate(0)
            assert torch.equal(engine(tokens, every=True), expected)
    finally:
        torch.set_num_threads(before)


def test_greedy_text_is_that_of_transformers(level):
    model = packed("llama-gqa-tied", "W8A16")
    prompt = text(7)
    output = model.generate(prompt[None], max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    written = []
    found = CpuEngine(model, 47).generate(prompt, 40, write=written.append)
    assert found == output[0, 7:].tolist() == written


def test_generation_stops():
    model = packed("llama", "W4A8")
    found = CpuEngine(model, 47).generate(text(7), 20)
    assert CpuEngine(model, 47).generate(text(7), 20, stop={found[3]}) == found[: found.index(found[3]) + 1]


@pytest.mark.parametrize(
    ("rope", "shape"),
    [
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, {}),
        (
            {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            {},
        ),
        (None, {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 16}),
        (None, {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 80}),
    ],
    ids=["linear", "llama3", "six queries a key", "heads of 80"],
)
def test_positions_and_heads(level, halves, rope, shape):
    model = packed("llama", "W8A16", **shape, **({"rope_parameters": rope} if rope else {}))
    tokens = text(40)
    got = CpuEngine(model, 40)(tokens, every=True)
    torch.testing.assert_close(got, logits_of(halves(model), tokens), rtol=0, atol=2e-3)


def test_engines_run_side_by_side():
    model = packed("llama", "W4A8")
    expected = CpuEngine(model, 60).generate(text(20), 40)
    found = [None] * 4

    def run(i):
        found[i] = CpuEngine(model, 60).generate(text(20), 40)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_what_has_no_engine_says_why(monkeypatch):
    assert "model type 'opt' is none of llama, mistral" in unsupported(packed("opt", "W4A8"))
    assert unsupported(tiny_model()) == "its linears are not packed"
    assert unsupported(packed("llama", "W4A8", hidden_act="gelu")) == "activation 'gelu' is not 'silu'"
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert unsupported(packed("llama", "W4A8", rope_parameters=dynamic)).startswith("RoPE of type 'dynamic'")
    assert unsupported(packed("llama", "W4A8", head_dim=24)) == "head_dim 24 is not a multiple of 16"
    assert unsupported(packed("llama", "W4A8KV4", head_dim=16)) == "head_dim 16 is not a multiple of 32"
    model = packed("mistral", "W4A8", sliding_window=100)
    assert unsupported(model, 100) is None
    assert unsupported(model, 101) == "101 tokens are more than its 100 positions"
    set_backend(model, "reference")
    assert unsupported(model) == "its backend is 'reference'"
    set_backend(model, "auto")
    monkeypatch.setenv("ABQ_CPU_LEVEL", "sse9")
    assert "'sse9'" in unsupported(model)


def test_tokens_that_do_not_fit_are_refused():
    engine = CpuEngine(packed("llama", "W4A8"), 8)
    engine(text(5))
    with pytest.raises(AbqError, match="4 tokens after 5: the engine was made for 8"):
        engine(text(4))
    with pytest.raises(AbqError, match="0 tokens after 5"):
        engine(text(0))
    with pytest.raises(AbqError, match="cannot go back to 6 tokens: there are 5"):
        engine.truncate(6)
    with pytest.raises(AbqError, match="the CPU engine cannot run this model: its linears are not packed"):
        CpuEngine(tiny_model(), 8)


def test_a_model_that_is_used_up_gives_the_same_logits(level):
    """Also with an embedding that fp16 holds exactly, and the head is."""
    model = packed("llama-gqa-tied", "W4A8g32").half().float()
    tokens = text(20)
    expected = CpuEngine(model, 20)(tokens, every=True)
    got = CpuEngine(model, 20, use_up=True)(tokens, every=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert model.model.layers[0].mlp.down_proj.weight_packed.numel() == 0
