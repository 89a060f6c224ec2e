import math

import pytest
import torch

from abq_llm.errors import AbqError
from abq_llm.evaluation import evaluate, logits
from tests.tiny import VARIANTS, VOCAB, tiny_model


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def naive(model, tokens, reference):
    """(perplexity, kl, agreement) token by token, in float64 from whole logits."""
    nll, kl, agreed = [], [], []
    for window in tokens:
        log_q = model(window[None]).logits[0].double().log_softmax(-1)
        log_p = reference(window[None]).logits[0].double().log_softmax(-1)
        for position in range(len(window) - 1):
            nll.append(-log_q[position, window[position + 1]].item())
            kl.append((log_p[position].exp() * (log_p[position] - log_q[position])).sum().item())
            agreed.append(log_p[position].argmax().item() == log_q[position].argmax().item())
    return math.exp(sum(nll) / len(nll)), sum(kl) / len(kl), sum(agreed) / len(agreed)


@pytest.mark.parametrize("variant", [*VARIANTS.values(), ("gemma2", {"head_dim": 16})], ids=[*VARIANTS, "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_equals_the_definition(variant, batch_size, tokens, monkeypatch):
    monkeypatch.setattr(logits, "ROWS", 7)  # divides neither a window's 19 positions nor a batch's 38
    model_type, overrides = variant
    model = tiny_model(model_type, **overrides)
    reference = tiny_model(model_type, **overrides)
    with torch.no_grad():
        reference.get_input_embeddings().weight += 0.02 * torch.randn(VOCAB, 64, generator=torch.Generator())
    result = evaluate(model, tokens, reference, batch_size=batch_size)
    ppl, kl, agreement = naive(model, tokens, reference)
    assert result.perplexity == pytest.approx(ppl, rel=1e-5)
    assert result.kl == pytest.approx(kl, rel=1e-4)
    assert 0 < result.top1_agreement < 1  # else the next line could not fail
    assert result.top1_agreement == pytest.approx(agreement)
    assert result.tokens == 3 * 19


@torch.no_grad()
def test_the_normalisation_of_the_published_scripts_gives_the_same_number(tokens):
    """They weight the mean loss of seqlen - 1 tokens by seqlen, then divide by windows * seqlen: both cancel."""
    model, seqlen, nlls = tiny_model(), tokens.shape[1], []
    for window in tokens:
        logits = model(window[None]).logits[0, :-1]
        nlls.append(torch.nn.functional.cross_entropy(logits, window[1:]) * seqlen)
    legacy = torch.exp(torch.stack(nlls).sum() / (len(tokens) * seqlen))
    assert evaluate(model, tokens).perplexity == pytest.approx(legacy.item(), rel=1e-6)


def test_without_reference(tokens):
    result = evaluate(tiny_model(), tokens)
    assert (result.kl, result.top1_agreement) == (None, None)
    assert result.perplexity == evaluate(tiny_model(), tokens, tiny_model(seed=1)).perplexity


def test_a_model_does_not_diverge_from_itself(tokens):
    result = evaluate(tiny_model(), tokens, tiny_model())
    assert (result.kl, result.top1_agreement) == (0, 1)


def test_kl_is_from_the_reference_to_the_model(tokens):
    model, reference = tiny_model(), tiny_model(seed=1)
    forward, backward = evaluate(model, tokens, reference).kl, evaluate(reference, tokens, model).kl
    assert forward == pytest.approx(naive(model, tokens, reference)[1], rel=1e-4)
    assert abs(forward - backward) > 1e-3 * forward


def test_a_uniform_model_has_the_vocabulary_as_perplexity(tokens):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert evaluate(model, tokens).perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_logits_exist_only_in_chunks(tokens, monkeypatch):
    monkeypatch.setattr(logits, "ROWS", 5)
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // VOCAB))
    evaluate(model, tokens[:, :20])
    assert max(seen[2:]) == 5  # the first two are the probe of 8 tokens
    assert sum(seen[2:]) == 3 * 19


def test_models_of_different_dtypes(tokens):
    result = evaluate(tiny_model().bfloat16(), tokens, tiny_model())
    assert 0 < result.kl < 0.1


def test_progress(tokens):
    calls = []
    evaluate(tiny_model(), tokens, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 3), (3, 3)]


def test_a_non_finite_window_is_named(tokens):
    model = tiny_model()
    tokens[tokens == 5] = 6
    tokens[2, 3] = 5
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    for batch_size in (1, 3):
        with pytest.raises(AbqError, match="likelihood is not finite in window 2"):
            evaluate(model, tokens, batch_size=batch_size)
    with pytest.raises(AbqError, match="KL divergence from the reference is not finite in window 2"):
        evaluate(tiny_model(), tokens, model)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"int64 \[3\]"),
        (torch.zeros(3, 1, dtype=torch.int64), r"\[3, 1\]"),
        (torch.zeros(0, 8, dtype=torch.int64), r"\[0, 8\]"),
        (torch.zeros(3, 8, dtype=torch.int32), "int32"),
    ],
)
def test_bad_tokens(bad, message):
    with pytest.raises(AbqError, match=message):
        evaluate(tiny_model(), bad)


def test_bad_batch_size(tokens):
    with pytest.raises(AbqError, match="batch_size is 0"):
        evaluate(tiny_model(), tokens, batch_size=0)


def test_different_vocabularies(tokens):
    with pytest.raises(AbqError, match="vocabulary of 128, the reference of 130"):
        evaluate(tiny_model(), tokens, tiny_model(vocab_size=130))
