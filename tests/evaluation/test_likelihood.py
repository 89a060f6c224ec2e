import pytest
import torch

from abq_llm.errors import AbqError
from abq_llm.evaluation import logits
from abq_llm.evaluation.likelihood import log_likelihoods
from tests.tiny import VARIANTS, VOCAB, tiny_model

LONGEST = 24


def ids(length, seed):
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def requests():
    """Of many lengths, two that share all but the last token, three that do not fit, and one asked twice."""
    mixed = [(ids(length, length), ids(1 + length % 4, 100 + length)) for length in (5, 1, 9, 17, 3, 22, 7)]
    shared = ids(6, 50)
    return [*mixed, (shared, [7]), (shared, [8]), (shared[:4], [*shared[4:], 9]), (ids(40, 60), ids(3, 61)), mixed[0]]


@torch.no_grad()
def naive(model, context, continuation):
    """One request alone, token by token, in float64."""
    tokens = (context + continuation)[-LONGEST - 1 :]
    log_p = model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)[-len(continuation) :]
    value = sum(row[token].item() for row, token in zip(log_p, continuation, strict=True))
    return value, log_p.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("variant", [*VARIANTS.values(), ("gemma2", {"head_dim": 16})], ids=[*VARIANTS, "gemma2"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_equals_the_definition(variant, batch_tokens, requests, monkeypatch):
    monkeypatch.setattr(logits, "ROWS", 3)
    model_type, overrides = variant
    model = tiny_model(model_type, **overrides)
    results = log_likelihoods(model, requests, max_length=LONGEST, batch_tokens=batch_tokens)
    for (value, greedy), request in zip(results, requests, strict=True):
        expected = naive(model, *request)
        assert value == pytest.approx(expected[0], rel=1e-5)
        assert greedy is expected[1]


def test_greedy_continuations_are_recognised():
    model, context, written = tiny_model(), ids(5, 0), []
    for _ in range(3):
        with torch.no_grad():
            written.append(model(torch.tensor([context + written])).logits[0, -1].argmax().item())
    wrong = [*written[:2], (written[2] + 1) % VOCAB]
    results = log_likelihoods(model, [(context, written), (context, wrong)], max_length=LONGEST)
    assert [greedy for _, greedy in results] == [True, False]


def test_answers_of_one_token_share_a_pass():
    model, sizes = tiny_model(), []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(output[0].shape), with_kwargs=True
    )
    log_likelihoods(model, [(ids(6, 0), [token]) for token in range(5)], max_length=LONGEST)
    assert sizes[2:] == [(1, 6, 64)]  # the first two probe the head


def test_progress_counts_requests(requests):
    counts = []
    log_likelihoods(tiny_model(), requests, max_length=LONGEST, batch_tokens=30, progress=counts.append)
    assert sum(counts) == len(requests) and len(counts) > 2


def test_nothing_to_do():
    assert log_likelihoods(tiny_model(), [], max_length=LONGEST) == []


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [1] * 25)])
def test_requests_without_an_answer_are_refused(context, continuation):
    message = rf"request 1 has a context of {len(context)} tokens and a continuation of {len(continuation)}"
    with pytest.raises(AbqError, match=message):
        log_likelihoods(tiny_model(), [([1], [2]), (context, continuation)], max_length=LONGEST)
