import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data import ByteTokenizer, SubwordTokenizer, open_corpus, open_tokenizer
from zoo.data import tokenizer as tokenizer_module
from zoo.data.corpus import Corpus
from zoo.data.tokenizer import PIECE, cut, open_or_learn_words

TEXTS = [
    "",
    "a",
    "def f(x):\n\treturn x  # grüße, 你好 🎉\n",
    "  two leading spaces",
    "trailing \n\n",
    "<|start|> is text",
]


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    words = ["router", "expert", "token", "grün", "λ", "while", "return"]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(400)))
    return open_corpus(str(tmp_path / "text.txt"))


@pytest.fixture
def bpe(corpus):
    return open_tokenizer("bpe:300", corpus)


def wordpiece():
    """A tokenizer that drops and joins text on the way: lower case, no spaces, unknown words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", "a", "b", "##a", "##b", "c"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return SubwordTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]"))


def test_bytes_are_the_utf8_of_the_text():
    tokenizer = ByteTokenizer()
    for text, (ids, size) in zip(TEXTS, tokenizer.encode(TEXTS)):
        assert ids.tolist() == list(text.encode())
        assert size.tolist() == [1] * len(ids)
        assert tokenizer.decode(ids.tolist()) == text
    assert {tokenizer.start, tokenizer.end, tokenizer.pad} == {256, 257, 258}


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_bytes_of_tokens_add_up_to_the_text_for_lossy_tokenizers(text):
    tokenizer = wordpiece()
    [(ids, size)] = tokenizer.encode([text])
    assert len(ids) == len(size)
    assert (size >= 0).all()
    assert not len(ids) or size.sum() == len(text.encode())


def test_bytes_of_learnt_tokens_are_those_of_what_they_spell(bpe):
    for text, (ids, size) in zip(TEXTS, bpe.encode(TEXTS)):
        assert size.sum() == len(text.encode())
        assert bpe.decode(ids.tolist()) == text
        if text.isascii() and len(ids):
            assert size.tolist() == [len(bpe.decode([i])) for i in ids.tolist()]


def test_text_that_spells_a_special_token_is_text(bpe):
    [(ids, _)] = bpe.encode(["<|start|><|end|>"])
    assert bpe.start not in ids
    assert bpe.end not in ids


def test_learning_is_deterministic_and_cached(corpus, cache, monkeypatch, tmp_path):
    first = open_tokenizer("bpe:300", corpus)
    monkeypatch.setenv("MOE_ZOO_CACHE", str(tmp_path / "another"))
    assert open_tokenizer("bpe:300", corpus).fingerprint == first.fingerprint
    assert open_tokenizer("bpe:280", corpus).fingerprint != first.fingerprint
    assert 259 < first.vocab_size <= 300  # this text has no more pairs to merge than that
    [file] = cache.rglob("tokenizer.json")
    monkeypatch.setenv("MOE_ZOO_CACHE", str(cache))
    before = file.stat().st_mtime_ns
    open_tokenizer("bpe:300", corpus)
    assert file.stat().st_mtime_ns == before


def test_a_failure_while_learning_leaves_nothing_in_the_cache(corpus, cache, monkeypatch):
    monkeypatch.setattr("zoo.data.tokenizer._train_bpe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_tokenizer("bpe:300", corpus)
    assert not [p for p in cache.rglob("*") if p.is_file()]
    assert list((cache / "bpe").iterdir()) == []


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_tokenizer_loads_in_transformers_with_the_same_ids(kind, bpe, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    tokenizer.save_pretrained(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    again = open_tokenizer(str(tmp_path / "saved"))
    for text, (ids, size) in zip(TEXTS[:5], tokenizer.encode(TEXTS[:5])):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
        [(ids_again, size_again)] = again.encode([text])
        assert ids_again.tolist() == ids.tolist()
        assert size_again.sum() == size.sum()
    assert (again.start, again.end, again.pad) == (tokenizer.start, tokenizer.end, tokenizer.pad)
    assert again.vocab_size == tokenizer.vocab_size


def test_unknown_tokenizers_and_sizes_are_explained(corpus):
    with pytest.raises(ValueError, match="unknown tokenizer 'byte'; did you mean bytes"):
        open_tokenizer("byte")
    with pytest.raises(ValueError, match="at least 260"):
        open_tokenizer("bpe:100", corpus)
    with pytest.raises(ValueError, match="no-such"):
        open_tokenizer("/tmp/no-such/folder")


def test_words_are_learnt_by_name_and_other_names_need_no_texts():
    def texts():
        return ["a cat, a dog", "a dog"]

    def none():
        raise AssertionError("no texts are needed")

    assert open_or_learn_words("words", texts).vocab_size == 4 + 4
    few = open_or_learn_words("words:2", texts)
    assert few.vocab_size == 4 + 2
    assert few.decode(few.encode(["a cat dog"])[0][0].tolist()) == "a dog"
    assert open_or_learn_words("bytes", none).fingerprint == "bytes"
    with pytest.raises(ValueError, match="expected words:SIZE"):
        open_or_learn_words("words:x", none)


def test_every_id_is_below_the_size_of_a_vocabulary_with_gaps():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "a": 40, "b": 7}
    backend = Backend(models.WordLevel(words, unk_token="b"))
    tokenizer = SubwordTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
    [(ids, _)] = tokenizer.encode(["a"])
    assert ids.tolist() == [40]
    assert tokenizer.vocab_size == 41


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="a9.' \n\r\té\u2028", max_size=300))
def test_a_long_text_is_encoded_in_parts_as_it_is_whole(text):
    """The reference: the backend on the whole text; parts of few letters, so that there are many."""
    fast = open_tokenizer("bpe:300", Corpus("", "parts", lambda split: iter(["a9 é.\n'aa\n\n a99 9\n" * 40])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE", 3)
        patch.setattr(tokenizer_module, "GROUP", 20)
        assert "".join(cut(text)) == text
        [(ids, size), (again, _)] = fast.encode([text, "a\nb" * 20 + text])
        second = fast.backend.encode("a\nb" * 20 + text, add_special_tokens=False).ids
    assert ids.tolist() == fast.backend.encode(text, add_special_tokens=False).ids
    assert again.tolist() == second
    assert size.sum() == len(text.encode())


def test_parts_are_only_for_tokenizers_that_split_at_line_feeds(bpe):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(["<s>", "▁", "a", "\n", "▁a"])}
    backend = Tokenizer(models.BPE(letters, [("▁", "a")]))  # as Llama 2's: every text begins with a space
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    other = SubwordTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    text = "a\n" * PIECE
    [(ids, _)] = other.encode([text])
    assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids
    assert len(cut(text)) == 2


def test_documents_are_neither_truncated_nor_padded(bpe):
    bpe.backend.enable_truncation(4)
    bpe.backend.enable_padding(length=9, pad_id=bpe.pad)
    saved = SubwordTokenizer(bpe.fast)
    [(ids, _), (short, _)] = saved.encode(["router expert token while return " * 3, "a"])
    assert saved.decode(ids) == "router expert token while return " * 3
    assert len(short) == 1
