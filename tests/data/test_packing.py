import numpy as np
import pytest
import torch

from zoo.data import ByteTokenizer, Packed, open_corpus, tokenize
from zoo.data.tokens import Tokens

RNG = np.random.default_rng()


def tokens_of(documents, tokenizer=None):
    """Documents as one row of tokens, by a plain loop."""
    tokenizer = tokenizer or ByteTokenizer()
    ids, size, starts = [], [], []
    for text, (row, width) in zip(documents, tokenizer.encode(documents)):
        assert text
        starts.append(len(ids))
        ids += [tokenizer.start, *row.tolist(), tokenizer.end]
        size += [-1, *width.tolist(), -1]
    return Tokens(np.array(ids), np.array(size), np.array(starts))


def random_documents(count=12):
    return ["".join(RNG.choice(list("abcdef\n"), RNG.integers(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 1000])
def test_every_token_but_a_documents_first_is_predicted_once(length):
    documents = random_documents()
    packed = Packed(tokens_of(documents), length, pad=258, tail=True)
    predicted = [t for i in range(len(packed)) for t in packed[i]["labels"].tolist() if t != -100]
    assert predicted == [t for text in documents for t in [*text.encode(), 257]]


@pytest.mark.parametrize("length", [1, 7, 16, 1000])
def test_target_bytes_add_up_to_the_text(length):
    documents = random_documents()
    packed = Packed(tokens_of(documents), length, pad=258, tail=True)
    size = torch.cat([packed[i]["target_bytes"] for i in range(len(packed))])
    labels = torch.cat([packed[i]["labels"] for i in range(len(packed))])
    assert size.clamp(min=0).sum() == sum(len(text.encode()) for text in documents)
    # The end of a document is predicted, but is no text.
    assert (size[labels == 257] == -1).all()
    assert (size[labels == -100] == -1).all()


def test_positions_restart_with_documents_and_sequences():
    packed = Packed(tokens_of(["abc", "d", "efgh"]), 6, pad=258, tail=True)
    s, e, p = 256, 257, 258
    a, b, c, d, f, g, h = b"a", b"b", b"c", b"d", b"f", b"g", b"h"
    first, second, third = packed[0], packed[1], packed[2]
    assert first["input_ids"].tolist() == [s, *a, *b, *c, e, s]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 4, 0]
    assert first["labels"].tolist() == [*a, *b, *c, e, -100, *d]
    assert second["input_ids"].tolist() == [*d, e, s, *b"e", *f, *g]
    assert second["position_ids"].tolist() == [0, 1, 0, 1, 2, 3]
    assert second["labels"].tolist() == [e, -100, *b"e", *f, *g, *h]
    assert third["input_ids"].tolist() == [*h, e, p, p, p, p]
    assert third["position_ids"].tolist() == [0, 1, 0, 1, 2, 3]
    assert third["labels"].tolist() == [e, -100, -100, -100, -100, -100]


def test_training_sequences_are_full_and_blank_ones_count_nowhere():
    tokens = tokens_of(random_documents())
    packed = Packed(tokens, 16, pad=258)
    assert len(packed) == (len(tokens.ids) - 1) // 16
    assert all((packed[i]["input_ids"] != 258).all() for i in range(len(packed)))
    assert (packed[-1]["labels"] == -100).all()
    assert (packed[-1]["input_ids"] == 258).all()


def test_too_little_text_for_one_sequence_is_an_error():
    with pytest.raises(ValueError, match="do not fill one sequence of 64"):
        Packed(tokens_of(["short"]), 64, pad=258)


def test_tokens_on_disk_are_those_of_a_plain_loop(tmp_path, monkeypatch):
    for i, text in enumerate(random_documents(30)):
        (tmp_path / f"{i:02}.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("")
    corpus = open_corpus(str(tmp_path))
    documents = [text for text in corpus.documents("train") if text]
    expected = tokens_of(documents)
    for _ in range(2):  # written, then read from the cache
        tokens = tokenize(corpus, "train", ByteTokenizer())
        for name in ("ids", "size", "starts"):
            assert getattr(tokens, name).tolist() == getattr(expected, name).tolist()
        monkeypatch.setattr("zoo.data.tokens._write", lambda *_: 1 / 0)


def test_a_split_without_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="nothing to val on"):
        tokenize(open_corpus(str(tmp_path / "a.txt")), "val", ByteTokenizer())
