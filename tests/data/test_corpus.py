import gzip
import json
import os
import re
import sysconfig
import tracemalloc
from pathlib import Path

import pytest

from zoo.data import SPLITS, open_corpus
from zoo.data.corpus import split_of


def everything(corpus):
    return {split: list(corpus.documents(split)) for split in SPLITS}


def folder_of(tmp_path, count):
    folder = tmp_path / "text"
    for i in range(count):
        path = folder / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}\n" * 20)
    return folder


def test_standard_library_is_the_interpreters_own_source_without_tests():
    corpus = open_corpus("stdlib")
    splits = everything(corpus)
    root = Path(sysconfig.get_path("stdlib"))
    texts = {text for split in splits.values() for text in split}
    assert (root / "argparse.py").read_bytes().decode() in texts
    assert sum(len(s) for s in splits.values()) > 400
    size = sum(len(t.encode()) for t in texts)
    assert 5e6 < size < 3e7
    # The description gives version, files and bytes.
    assert f"{sum(len(s) for s in splits.values())} files" in corpus.description
    assert sysconfig.get_python_version() in corpus.description


def test_each_document_is_in_one_split_and_order_does_not_matter(tmp_path):
    folder = folder_of(tmp_path, 60)
    splits = everything(open_corpus(str(folder)))
    numbers = sorted(int(text.split()[1]) for split in splits.values() for text in split)
    assert numbers == list(range(60))
    assert all(splits.values())
    for i in range(60):
        key = f"part{i % 3}/{i}.txt"
        assert f"document {i}\n" * 20 in splits[split_of(key)]


def test_a_split_depends_on_relative_paths_only(tmp_path):
    first = everything(open_corpus(str(folder_of(tmp_path / "a", 40))))
    second = everything(open_corpus(str(folder_of(tmp_path / "elsewhere", 40))))
    assert first == second


def test_one_file_is_cut_in_three_and_nothing_is_lost(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(1000)))
    splits = everything(open_corpus(str(file)))
    assert "".join(splits[s][0] for s in SPLITS) == file.read_text()
    assert splits["train"][0].endswith("\n")
    assert 0.85 < len(splits["train"][0]) / len(file.read_text()) < 0.95


def test_glob_patterns_and_several_sources(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.md").write_text("b" * 100)
    (tmp_path / "c.py").write_text("c" * 100)
    corpus = open_corpus([str(tmp_path / "*.txt"), str(tmp_path / "b.md")])
    text = "".join("".join(documents) for documents in everything(corpus).values())
    assert set(text) == {"a", "b"}
    assert len(text) == 200


def test_binary_and_hidden_files_of_a_folder_are_left_out(tmp_path):
    (tmp_path / "good.txt").write_text("good" * 10)
    (tmp_path / "image.bin").write_bytes(b"\0\1\2" * 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    text = "".join("".join(d) for d in everything(open_corpus(str(tmp_path))).values())
    assert text == "good" * 10


def test_json_lines_hold_one_document_each(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(50)))
    splits = everything(open_corpus(str(file), text_column="body"))
    assert sorted(t for s in splits.values() for t in s) == sorted(f"text {i}" for i in range(50))


def test_json_lines_end_where_json_says(tmp_path):
    texts = [f"text {i} a\u2028b\x85c" for i in range(50)]  # ends of lines to Python, but characters to JSON
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "odd.jsonl").write_text(lines, encoding="utf-8")
    splits = everything(open_corpus(str(tmp_path / "odd.jsonl")))
    assert sorted(t for s in splits.values() for t in s) == sorted(texts)


def test_a_bad_json_line_is_named(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n{"txt": "wrong column"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2.*'text'"):
        open_corpus(str(file))


def test_a_pattern_without_files_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        open_corpus(str(tmp_path / "nothing-here-*.txt"))


def test_fingerprint_follows_the_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one" * 10)
    before = open_corpus(str(file)).fingerprint
    assert open_corpus(str(file)).fingerprint == before
    file.write_text("two" * 10)
    os.utime(file, ns=(1, 1))
    assert open_corpus(str(file)).fingerprint != before


def test_hub_data_set_keeps_its_own_splits_and_holds_out_what_it_lacks(tmp_path, monkeypatch):
    # A folder of files is a data set to the `datasets` library, so that no network is needed.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 80), ("test", 5)):
        rows = (json.dumps({"text": f"{split} {i}"}) for i in range(count))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    splits = everything(open_corpus(f"hub:{folder}"))
    assert splits["test"] == [f"test {i}" for i in range(5)]
    assert sorted(splits["train"] + splits["val"]) == sorted(f"train {i}" for i in range(80))
    assert splits["val"]
    with pytest.raises(ValueError, match=r"no column 'body'; it has text"):
        open_corpus(f"hub:{folder}", text_column="body")


def test_a_hub_data_set_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="nobody/nothing"):
        open_corpus("hub:nobody/nothing")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_lines_end_at_line_feeds_alone(tmp_path, end):
    texts = [f"page {i}\u2028line\u0085\x0c\x1e end" for i in range(60)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "data.jsonl").write_bytes(("\ufeff" + end.join(lines)).encode())
    splits = everything(open_corpus(str(tmp_path / "data.jsonl")))
    assert sorted(t for s in splits.values() for t in s) == sorted(texts)


def test_a_json_line_without_text_is_left_out_and_one_of_another_type_is_named(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": None if i % 2 else f"text {i}"}) + "\n" for i in range(200)))
    splits = everything(open_corpus(str(file)))
    assert sorted(t for s in splits.values() for t in s) == sorted(f"text {i}" for i in range(0, 200, 2))
    file.write_text('{"text": "fine"}\n{"text": 7}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: expected text in 'text', got int"):
        open_corpus(str(file))


def test_files_of_one_name_are_all_read_and_none_twice(tmp_path):
    for folder in "pqr":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.txt").write_text(folder * 500)
    every = [str(tmp_path / folder) for folder in "pqr"]
    files = [f"{folder}/part.txt" for folder in every]
    for source in (every, files, str(tmp_path / "*" / "part.txt"), [*every, *files, str(tmp_path / "?" / "*.txt")]):
        corpus = open_corpus(source)
        text = "".join("".join(documents) for documents in everything(corpus).values())
        assert sorted(text) == sorted("p" * 500 + "q" * 500 + "r" * 500)
        assert "3 files, 1500 bytes" in corpus.description


@pytest.mark.parametrize("count", [20, 25, 40])
def test_every_split_has_text_however_the_keys_of_some_documents_fall(tmp_path, count):
    for attempt in range(20):
        file = tmp_path / f"{attempt}.jsonl"
        texts = [f"document {i} of some length" for i in range(count)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        splits = everything(open_corpus(str(file)))
        assert all("".join(documents) for documents in splits.values())
        assert sorted("".join(t for s in splits.values() for t in s)) == sorted("".join(texts))


def test_a_file_that_is_not_text_is_refused_by_name_and_left_out_of_a_pattern(tmp_path):
    text = "words and more words\n" * 50
    for name, content in {
        "a.txt": text.encode(),
        "b.txt.gz": gzip.compress(os.urandom(4000)),
        "c.txt": text.encode("utf-16"),
    }.items():
        (tmp_path / name).write_bytes(content)
    for name in ("b.txt.gz", "c.txt"):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is not text"):
            open_corpus(str(tmp_path / name))
    assert "".join("".join(d) for d in everything(open_corpus(str(tmp_path / "*"))).values()) == text


def test_another_encoding_is_told(tmp_path):
    (tmp_path / "old.txt").write_bytes("déjà vu\n".encode("latin-1") * 50)
    with pytest.warns(UserWarning, match=r"old\.txt is not UTF-8 \(byte 1 is 0xe9\)"):
        splits = everything(open_corpus(str(tmp_path / "old.txt")))
    assert "".join("".join(d) for d in splits.values()) == "d\ufffdj\ufffd vu\n" * 50


def test_half_a_character_in_json_is_replaced_and_a_whole_one_kept(tmp_path):
    lines = [rf'{{"text": "{i} \ud83d\ude00 \ud800."}}' for i in range(60)]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    splits = everything(open_corpus(str(tmp_path / "odd.jsonl")))
    assert sorted(t for s in splits.values() for t in s) == sorted(f"{i} \U0001f600 \ufffd." for i in range(60))


def test_lines_of_json_are_read_one_at_a_time(tmp_path):
    with (tmp_path / "large.jsonl").open("w") as file:
        for i in range(200):
            file.write(json.dumps({"text": f"{i} " * 20_000}) + "\n")
    corpus = open_corpus(str(tmp_path / "large.jsonl"))
    tracemalloc.start()
    try:
        number = sum(1 for split in SPLITS for _ in corpus.documents(split))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert number == 200
    assert most < (tmp_path / "large.jsonl").stat().st_size / 10
