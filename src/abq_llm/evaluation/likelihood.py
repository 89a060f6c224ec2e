"""How likely a model finds a continuation of a text: what multiple-choice tasks compare."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from abq_llm.errors import AbqError
from abq_llm.evaluation.logits import has_separate_head, in_rows, logits_at

BATCH_TOKENS = 8192  # of a forward pass, with padding

Tokens = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]  # context, continuation


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
    """log p(continuation | context) in nats, and whether every token of the continuation is the likeliest one.

    The definition is that of lm-evaluation-harness: the context is cut at its start where both together are longer
    than the model takes, and nothing is divided by a length. Requests run in batches of about one length, padded on
    the right, where no token sees it; those that differ in the last token only, such as "yes" and "no" after one
    question, share one forward pass. Log-probabilities are computed in float32 and summed in float64.

    Args:
        requests: token ids of contexts and continuations, both without padding and not empty.
        max_length: how many tokens the model takes.
        batch_tokens: of a forward pass, with padding; a single longer request runs alone.
        progress: called with the number of requests that each batch has answered.

    Raises:
        AbqError: an empty context or continuation, or a continuation longer than `max_length`.
    """
    sharing: dict[Tokens, list[int]] = defaultdict(list)
    for index, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise AbqError(
                f"request {index} has a context of {len(context)} tokens and a continuation of {len(continuation)}, "
                f"expected at least one in each and at most {max_length} in the second"
            )
        sharing[(*context, *continuation)[:-1][-max_length:]].append(index)
    results: dict[int, tuple[float, bool]] = {}
    separate_head = bool(sharing) and has_separate_head(model, torch.tensor([next(iter(sharing))]))
    for inputs in _batches(sorted(sharing, key=len, reverse=True), batch_tokens):
        answers = [[requests[index][1] for index in sharing[each]] for each in inputs]
        scores = _score(model, inputs, answers, separate_head)
        indices = [index for each in inputs for index in sharing[each]]
        results.update(zip(indices, scores, strict=True))
        if progress is not None:
            progress(len(indices))
    return [results[index] for index in range(len(requests))]


def _batches(inputs: list[Tokens], batch_tokens: int) -> Iterator[list[Tokens]]:
    """`inputs`, longest first, in batches that have at most `batch_tokens` once padded."""
    start = 0
    while start < len(inputs):
        count = max(1, batch_tokens // len(inputs[start]))
        yield inputs[start : start + count]
        start += count


def _score(
    model: PreTrainedModel, inputs: list[Tokens], answers: list[list[Sequence[int]]], separate_head: bool
) -> list[tuple[float, bool]]:
    """(log-likelihood, greedy) of each of answers[i], which end one token after inputs[i]; in their order."""
    length = len(inputs[0])
    tokens = torch.zeros(len(inputs), length, dtype=torch.int64)
    predicting = torch.zeros_like(tokens, dtype=torch.bool)
    for row, each in enumerate(inputs):
        tokens[row, : len(each)] = torch.tensor(each)
        predicting[row, len(each) - max(map(len, answers[row])) : len(each)] = True

    # Of each predicting position: the token that each answer has there, 0 where it has none.
    choices = torch.zeros(len(inputs), length, max(map(len, answers)), dtype=torch.int64)
    for row, each in enumerate(inputs):
        for column, answer in enumerate(answers[row]):
            choices[row, len(each) - len(answer) : len(each), column] = torch.tensor(answer)
    chosen = in_rows(choices[predicting].to(model.device))

    log_p, greedy = [], []
    for logits, ids in zip(logits_at(model, tokens, predicting, separate_head), chosen, strict=True):
        log_q = logits.float().log_softmax(-1)
        log_p.append(log_q.gather(1, ids).double())
        greedy.append(log_q.argmax(-1, keepdim=True) == ids)
    rows_of = predicting.sum(1).tolist()
    streams = torch.cat(log_p).cpu().split(rows_of), torch.cat(greedy).cpu().split(rows_of)
    return [
        (float(values[-len(answer) :, column].sum()), bool(likeliest[-len(answer) :, column].all()))
        for several, values, likeliest in zip(answers, *streams, strict=True)
        for column, answer in enumerate(several)
    ]
