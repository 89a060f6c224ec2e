import hashlib
import json
import random
import string
import struct
import sys
import types

import pytest
import torch

from abq_llm import data
from abq_llm.data import TokenSet, calibration_tokens, evaluation_tokens
from abq_llm.errors import AbqError
from tests.tiny import BOS, EOS, tiny_model, tiny_tokenizer

TEXT = " = Title = \n \n One two\u2028three .\n\n Four ; five .\n"
ROWS = [" = Title = \n", "", " One two\u2028three .\n", "", " Four ; five .\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def long_text(length=5000):
    ids = torch.randint(0, 26, (length,), generator=torch.Generator().manual_seed(0))
    return "".join(string.ascii_lowercase[i] for i in ids.tolist())


def ids_of(text, tokenizer):
    return torch.tensor(tokenizer(text)["input_ids"])


# --- files


def test_rows_are_joined_as_those_of_wikitext(tmp_path, tokenizer):
    path = tmp_path / "a.raw"
    path.write_text(TEXT, encoding="utf-8")
    expected = ids_of("\n\n".join(ROWS), tokenizer)
    windows = evaluation_tokens(path, tokenizer, seqlen=len(expected))
    assert torch.equal(windows.tokens[0], expected)
    assert windows.name == "a.raw"


def test_windows_tile_the_text(tmp_path, tokenizer):
    text = long_text(1000)
    (tmp_path / "a.txt").write_text(text)
    windows = evaluation_tokens(str(tmp_path / "a.txt"), tokenizer, seqlen=30).tokens
    assert windows.dtype == torch.int64
    assert windows.shape == (33, 30)
    assert torch.equal(windows.flatten(), ids_of(text, tokenizer)[:990])
    limited = evaluation_tokens(tmp_path / "a.txt", tokenizer, seqlen=30, limit=4).tokens
    assert torch.equal(limited, windows[:4])


def test_segments_are_seeded_pieces_of_the_text(tmp_path, tokenizer):
    text = long_text()
    (tmp_path / "a.txt").write_text(text)
    first, again, other = (
        calibration_tokens(tmp_path / "a.txt", tokenizer, samples=12, seqlen=40, seed=seed) for seed in (3, 3, 4)
    )
    assert first.tokens.shape == (12, 40)
    starts = [text.find(tokenizer.decode(row)) for row in first.tokens]
    assert min(starts) >= 0
    assert len(set(starts)) > 6
    assert any(start % 40 for start in starts)
    assert first.sha256 == again.sha256
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 != other.sha256


def test_a_text_of_just_seqlen_tokens_is_enough(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdefgh")
    tokens = calibration_tokens(tmp_path / "a.txt", tokenizer, samples=2, seqlen=8, seed=0).tokens
    assert tokenizer.batch_decode(tokens) == ["abcdefgh"] * 2
    for draw in (calibration_tokens, evaluation_tokens):
        options = {"samples": 2, "seed": 0} if draw is calibration_tokens else {}
        with pytest.raises(AbqError, match=r"a\.txt: 8 tokens, need at least 9"):
            draw(tmp_path / "a.txt", tokenizer, seqlen=9, **options)


def test_jsonl_documents_are_joined_by_a_blank_line(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first\\nline", "url": 1}\n\n{"text": "second"}\n')
    tokens = evaluation_tokens(path, tokenizer, seqlen=len("first\nline\n\nsecond")).tokens
    assert tokenizer.decode(tokens[0]) == "first\nline\n\nsecond"


def test_special_tokens_only_where_the_tokenizer_puts_them(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    (tmp_path / "a.txt").write_text(long_text(300))
    tokens = evaluation_tokens(tmp_path / "a.txt", tokenizer, seqlen=50).tokens
    assert (tokens == BOS).nonzero().tolist() == [[0, 0]]


def test_no_warning_about_long_texts(tmp_path, tokenizer, caplog, capfd):
    (tmp_path / "a.txt").write_text(long_text())
    evaluation_tokens(tmp_path / "a.txt", tiny_tokenizer(), seqlen=10)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text in it"),
        ("a.txt", b" \n\n \n", "no text in it"),
        ("a.txt", b"good\n\xff\xfe", "not UTF-8 text .* at byte 5"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ':2: not an object with a "text" string'),
        ("a.jsonl", b'{"text": 3}\n', ':1: not an object with a "text" string'),
        ("a.jsonl", b'[\n"text"\n]\n', ":1: not a line of JSON"),
        ("a.jsonl", b"\n", "no text in it"),
    ],
)
def test_bad_files(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AbqError, match=message) as error:
        evaluation_tokens(tmp_path / name, tokenizer, seqlen=1)
    assert str(tmp_path / name) in str(error.value)


def test_missing_files(tmp_path, tokenizer):
    with pytest.raises(AbqError, match="wikitext: no such file, and it is not one of 'wikitext2'"):
        evaluation_tokens("wikitext", tokenizer)
    with pytest.raises(AbqError, match="not a file"):
        calibration_tokens(tmp_path, tokenizer, samples=1, seqlen=1, seed=0)


# --- lengths


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"samples": 0, "seqlen": 8}, "samples is 0"),
        ({"samples": 1, "seqlen": -2}, "seqlen is -2"),
        ({"samples": 1, "seqlen": 257}, "seqlen is 257, the model takes at most 256 tokens"),
    ],
)
def test_bad_lengths(tokenizer, model, lengths, message):
    with pytest.raises(AbqError, match=message):
        calibration_tokens("self", tokenizer, seed=0, model=model, **lengths)


def test_bad_limit(tokenizer):
    with pytest.raises(AbqError, match="limit is 0"):
        evaluation_tokens("self", tokenizer, limit=0)


# --- the model's own text


def test_self_is_seeded_and_held_out(tokenizer, model):
    first, again = (calibration_tokens("self", tokenizer, samples=3, seqlen=9, seed=5, model=model) for _ in "ab")
    other = calibration_tokens("self", tokenizer, samples=3, seqlen=9, seed=6, model=model)
    held_out = evaluation_tokens("self", tokenizer, limit=3, seqlen=9, seed=5, model=model)
    assert first.tokens.shape == held_out.tokens.shape == (3, 9)
    assert first.sha256 == again.sha256
    assert len({first.sha256, other.sha256, held_out.sha256}) == 3
    assert not first.tokens.is_inference()  # such tokens cannot be used in training


def test_self_needs_the_model(tokenizer):
    with pytest.raises(AbqError, match="pass the model"):
        calibration_tokens("self", tokenizer, samples=1, seqlen=4, seed=0)


def test_self_starts_from_bos_and_goes_on(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[EOS] = 4 * model.lm_head.weight[EOS]  # it would be drawn often
    model.generation_config.eos_token_id = [EOS, 7]
    tokens = calibration_tokens("self", tokenizer, samples=20, seqlen=30, seed=0, model=model).tokens
    assert tokens[:, 0].eq(BOS).all()
    assert not torch.isin(tokens[:, 1:], torch.tensor([*tokenizer.all_special_ids, 7])).any()
    assert tokens[:, 1].unique().numel() > 5


def test_self_without_bos_starts_from_ordinary_tokens(model):
    tokenizer = tiny_tokenizer(100)  # the model's ids from 100 on mean nothing to it
    tokenizer.bos_token = None
    tokens = calibration_tokens("self", tokenizer, samples=40, seqlen=10, seed=0, model=model).tokens
    assert tokens.max() < 100
    assert not torch.isin(tokens, torch.tensor([0, EOS])).any()
    assert tokens[:, 0].unique().numel() > 20


def test_self_batches_are_bounded(tokenizer, model, monkeypatch):
    monkeypatch.setattr(data, "SELF_BATCH_TOKENS", 24)
    rows = []

    def count(module, args, inputs):
        rows.append(len(inputs["input_ids"]))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    tokens = calibration_tokens("self", tokenizer, samples=5, seqlen=12, seed=0, model=model).tokens
    handle.remove()
    assert tokens.shape == (5, 12)
    assert set(rows) == {2, 1}
    assert len(rows) == 3 * 11


def test_self_follows_the_distribution_of_the_model(tokenizer, model):
    """Frequencies of the second token against the model's own probabilities given BOS (chi-squared, 3 sigma)."""
    samples = 4000
    tokens = calibration_tokens("self", tokenizer, samples=samples, seqlen=2, seed=0, model=model).tokens
    with torch.no_grad():
        logits = model(torch.tensor([[BOS]])).logits[0, 0]
    logits[tokenizer.all_special_ids] = -torch.inf
    expected = samples * logits.softmax(-1)
    counts = tokens[:, 1].bincount(minlength=len(expected))
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum())
    assert freedom > 20
    assert chi2 < freedom + 3 * (2 * freedom) ** 0.5


def test_self_uses_the_whole_prefix(tokenizer, model):
    """The text is likelier under the model than the same tokens shuffled: the cache is fed in order."""
    tokens = calibration_tokens("self", tokenizer, samples=16, seqlen=60, seed=0, model=model).tokens
    shuffled = tokens[:, torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(59)])]
    with torch.no_grad():
        own, random = (model(ids, labels=ids).loss.item() for ids in (tokens, shuffled))
        log_p = model(tokens).logits[:, :-1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    assert own == pytest.approx(entropy, abs=0.25)
    assert random > own + 0.5


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (1 - 2**-24, 3)])
def test_extreme_draws_are_possible_tokens(monkeypatch, u, token):
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, u))
    logits = torch.tensor([[-torch.inf, 0, -torch.inf, 0, -torch.inf]])
    assert data._draw(logits, torch.Generator()).tolist() == [[token]]


# --- data sets of the hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`; calls holds what was asked for."""
    calls = []
    documents = ["short", *(long_text(60 + n)[n:] + str(n) for n in range(6))]

    def load_dataset(repository, **options):
        calls.append((repository, options))
        return {"text": ROWS * 20 if repository == "Salesforce/wikitext" else documents}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return types.SimpleNamespace(calls=calls, documents=documents)


def test_wikitext2(hub, tokenizer):
    text = ids_of("\n\n".join(ROWS * 20), tokenizer)
    windows = evaluation_tokens("wikitext2", tokenizer, seqlen=16, limit=3)
    assert torch.equal(windows.tokens, text[:48].view(3, 16))
    calibration = calibration_tokens("wikitext2", tokenizer, samples=2, seqlen=16, seed=0)
    assert calibration.tokens.shape == (2, 16)
    assert windows.name == calibration.name == "wikitext2"
    assert [(name, options["split"]) for name, options in hub.calls] == [
        ("Salesforce/wikitext", "test"),
        ("Salesforce/wikitext", "train"),
    ]


def test_c4_calibration_takes_one_segment_of_each_long_document(hub, tokenizer):
    tokens = calibration_tokens("c4", tokenizer, samples=6, seqlen=50, seed=0).tokens
    segments = tokenizer.batch_decode(tokens)
    found = {n for n, document in enumerate(hub.documents) for text in segments if text in document}
    assert len(segments) == 6
    assert all(any(text in document for document in hub.documents) for text in segments)
    assert found >= {1, 6}
    assert "c4-train" in str(hub.calls)
    with pytest.raises(AbqError, match="c4: 6 documents are longer than 50 tokens, need 7"):
        calibration_tokens("c4", tokenizer, samples=7, seqlen=50, seed=0)


def test_c4_evaluation_joins_the_first_documents(hub, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "C4_EVALUATION_DOCUMENTS", 3)
    text = ids_of(" ".join(hub.documents[:3]), tokenizer)
    tokens = evaluation_tokens("c4", tokenizer, seqlen=10).tokens
    assert torch.equal(tokens.flatten(), text[: len(text) // 10 * 10])
    assert "c4-validation" in str(hub.calls)


def test_legacy_c4_draws_as_the_published_scripts(hub, tokenizer):
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            ids = tokenizer(hub.documents[random.randint(0, len(hub.documents) - 1)])["input_ids"]
            if len(ids) > 50:
                break
        start = random.randint(0, len(ids) - 50 - 1)
        expected.append(ids[start : start + 50])
    windows = evaluation_tokens("c4-legacy", tokenizer, seqlen=50)
    assert (windows.name, windows.tokens.tolist()) == ("c4-legacy", expected)
    assert evaluation_tokens("c4-legacy", tokenizer, seqlen=50, limit=3).tokens.tolist() == expected[:3]
    assert "c4-validation" in str(hub.calls)


def test_legacy_c4_gives_up_where_no_document_is_long_enough(hub, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "C4_LEGACY_TRIES", 20)
    with pytest.raises(AbqError, match="c4-legacy: of 20 random documents, 0 are longer than 5000 tokens"):
        evaluation_tokens("c4-legacy", tokenizer, seqlen=5000)


def test_datasets_not_installed(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AbqError, match=r"'wikitext2' needs the package 'datasets'.*'self'"):
        evaluation_tokens("wikitext2", tokenizer)


def test_offline(hub, tokenizer, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    with pytest.raises(AbqError, match=r"'c4' cannot be downloaded \(no network\): pass a text file .* 'self'"):
        evaluation_tokens("c4", tokenizer)


# --- the hash


def test_hash_covers_shape_and_values():
    tokens = torch.arange(6).view(2, 3)
    reshaped, changed = tokens.view(3, 2), tokens.clone()
    changed[1, 2] += 2**40
    hashes = {TokenSet("x", each).sha256 for each in (tokens, reshaped, changed)}
    assert len(hashes) == 3
    assert TokenSet("other name", tokens.t().contiguous().t()).sha256 in hashes
    little_endian = struct.pack("<8q", 2, 3, *range(6))  # the shape, then the values
    assert TokenSet("x", tokens).sha256 == hashlib.sha256(little_endian).hexdigest()


def test_jsonl_lines_end_at_newlines_only(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert evaluation_tokens(tmp_path / "a.jsonl", tokenizer, seqlen=3).tokens.shape == (1, 3)
