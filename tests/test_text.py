"""Text: its tokens, vocabulary and parts are those that a person would find; each split gives every worker its stream,
on any number of ranks; bad input ends in one line. The references are loops over plain lists."""

import gzip
import os
import shutil
import tracemalloc
from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpiclip import data, splits, text
from mpiclip.__main__ import main
from mpiclip.importers import import_file
from mpiclip.streams import stream
from mpiclip.training import train
from test_data import refused

PLAY = """A PLAY

ANNA:
To be , or not to be .
Not , as it were .

BEN:
No .

ANNA:
Why :
not ?

BEN:
That follows .

Enter a ghost"""
TITLES = " \n = Bees = \n \n A bee : \n \n = = Wings = = \n \n Four = 2 + 2 \n \n = Ants = \n \n x \n \n = y = \n z \n"


def words(content):
    return [word for line in content.splitlines() for word in [*line.split(), "<eos>"]]


def imported(folder, content, level, **options):
    (folder / "a.txt").write_bytes(content.encode())
    import_file([str(folder / "a.txt")], str(folder / "a.h5"), level=level, **options)
    return str(folder / "a.h5")


def spelled(shard, begin=0, end=None):
    return [shard.vocabulary[k] for k in shard.tokens[begin:end]]


# Importing ------------------------------------------------------------------------------------------------------------


def test_wikitext(datasets, tmp_path):
    folder, file = datasets / "wikitext-2", str(tmp_path / "wt2.h5")
    train, valid, test = (str(folder / f"wiki.{name}.tokens") for name in ("train", "valid", "test"))
    import_file([train], file, test=[valid, test])
    shard = data.read_train(file, "contiguous", 1, [0], 0, "float32")
    assert shard.total == len(shard.tokens) == 2088628 and len(shard.vocabulary) == 33278 and shard.level == "word"
    assert spelled(shard) == words(Path(train).read_text())
    assert np.all(np.diff(np.bincount(shard.tokens)) <= 0)
    with h5py.File(file) as f:
        assert len(f["test/tokens"]) == 217646 + 245569 and f["test"].attrs["unknown"] == 0
        assert f["train/tokens"].dtype == "uint16" and f["train"].attrs["kind"] == "articles"
        assert len(f["train/label"]) == 600         # as many as the authors say
    assert "2088628 words, 33278 different ones" in data.info(file) and "600 articles" in data.info(file)


def test_shakespeare(datasets, tmp_path):
    source, file = datasets / "tinyshakespeare" / "input.txt", str(tmp_path / "s.h5")
    import_file([str(source)], file, level="char")
    shard = data.read_train(file, "rotate", 1, [0], 0, "float32")
    assert shard.total == 1115394 and len(shard.vocabulary) == 65 and shard.level == "char"
    assert "".join(spelled(shard)) == source.read_text()
    with h5py.File(file) as f:
        names, label, parts = f["train/names"].asstr()[:], f["train/label"][:], f["train/parts"][:]
        assert names[label[:5]].tolist() == ["First Citizen", "All", "First Citizen", "All", "First Citizen"]
        assert "".join(spelled(shard, *parts[1:3])) == "All:\nSpeak, speak.\n\n"
    assert "turns of 309 speakers" in data.info(file)


@pytest.mark.parametrize("level", text.LEVELS)
@pytest.mark.parametrize("content, kind, starts, names", [
    (PLAY, "turns", ["A PLAY", "ANNA:\nTo", "BEN:\nNo", "ANNA:\nWhy", "BEN:\nThat"], ["", "ANNA", "BEN"]),
    (TITLES, "articles", [" \n = Bees", " = Ants"], ["Bees", "Ants"]),
    ("one\ntwo\n\n\nthree:\n\nfour\n", "paragraphs", ["one", "three:", "four"], [""]),
    ("no line\n is blank\n\n", "lines", ["no", " is"], [""])])
def test_parts(tmp_path, level, content, kind, starts, names):
    file = imported(tmp_path, content, level)
    positions = [content.index(start) for start in starts]
    with h5py.File(file) as f:
        assert f["train"].attrs["kind"] == kind
        assert f["train/parts"][:].tolist() == [
            len(words(content[:k]) if level == "word" else content[:k]) for k in [*positions, len(content)]]
        assert f["train/names"].asstr()[:].tolist() == [name or str(tmp_path / "a.txt") for name in names]
        assert f["train/label"][:].tolist() == ([0, 1, 2, 1, 2] if kind == "turns" else
                                                [0, 1] if kind == "articles" else [0] * len(starts))


def test_the_vocabulary_is_sorted_by_how_often_a_word_occurs(tmp_path):
    shard = data.read_train(imported(tmp_path, "b a b\nc ä a\n", "word"), "contiguous", 1, [0], 0, "float32")
    assert shard.vocabulary == ("<eos>", "a", "b", "c", "ä") and shard.tokens.tolist() == [2, 1, 2, 0, 3, 4, 1, 0]


@pytest.mark.parametrize("level", text.LEVELS)
@pytest.mark.parametrize("content", [PLAY, TITLES, "漢字かな" * 9 + "\r\n\u2028ä b\t" + "ö" * 30, "a " * 50])
def test_a_file_is_the_same_however_it_is_read(tmp_path, monkeypatch, level, content):
    """In pieces of lines that are too long, in small blocks, compressed, with a byte order mark."""
    files = [Path(imported(tmp_path, content, level)).read_bytes()]
    monkeypatch.setattr(text, "PIECE", 16)
    monkeypatch.setattr(text, "BLOCK", 3)
    files += [Path(imported(tmp_path, before + content, level)).read_bytes() for before in ("", "\ufeff")]
    assert files[0] == files[1] == files[2]
    shard = data.read_train(tmp_path / "a.h5", "contiguous", 1, [0], 0, "float32")
    reference = [w for line in content.split("\n") for w in [*line.split(), "<eos>"]]
    if content.endswith("\n"):
        reference.pop()
    assert spelled(shard) == (list(content) if level == "char" else reference)
    before = data.fingerprint(tmp_path / "a.h5")
    (tmp_path / "a.tokens.gz").write_bytes(gzip.compress(content.encode()))
    import_file([str(tmp_path / "a.tokens.gz")], str(tmp_path / "a.h5"), level=level)
    assert data.fingerprint(tmp_path / "a.h5") == before


def test_several_sources_and_a_test_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.txt", "x y <unk>\n\ny"), ("b.txt", "y z\n"), ("c.txt", "z q x r\nr"), ("d.txt", "y y\n")):
        Path(name).write_text(content)
    assert main(["data", "import", "a.txt", "b.txt", "ab.h5", "--test", "c.txt", "d.txt", "--level", "word"]) == 0
    assert "train  10 words, 5 different ones" in (shown := capsys.readouterr().out) and "3 paragraphs" in shown
    assert "test   10 words, 3 of them read as <unk>" in shown
    shard, test = data.read_train("ab.h5", "contiguous", 1, [0], 0, "float32"), data.read_test("ab.h5", 0, 1, "float32")
    assert spelled(shard) == words("x y <unk>\n\ny\ny z\n") and test.vocabulary == shard.vocabulary
    assert spelled(test) == words("z <unk> x <unk>\n<unk>\ny y")
    with h5py.File("ab.h5") as f:
        assert f["train/parts"][:].tolist() == [0, 5, 7, 10]
        assert f["train/names"].asstr()[:].tolist() == ["a.txt", "b.txt"] and f["train/label"][:].tolist() == [0, 0, 1]
    prints = {data.fingerprint("ab.h5")}
    for name, content in (("d.txt", "y z\n"), ("b.txt", "z y\n")):     # as many tokens, and the same vocabulary
        Path(name).write_text(content)
        import_file(["a.txt", "b.txt"], "ab.h5", test=["c.txt", "d.txt"])
        prints.add(data.fingerprint("ab.h5"))
    assert len(prints) == 3


def test_memory_holds_a_few_times_the_text(tmp_path, monkeypatch):
    """Also of a text without lines; its words would be thirty times as large."""
    monkeypatch.setattr(text, "PIECE", 1 << 14)
    monkeypatch.setattr(text, "BLOCK", 1 << 12)
    content = " ".join(map(str, np.random.default_rng(0).integers(0, 1000, 100_000)))
    tracemalloc.start()
    imported(tmp_path, content, "word")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(content)


# Splits and reading ---------------------------------------------------------------------------------------------------


def streams_of(split, parts, labels, n, seed, s):
    """The reference: each worker's tokens, from the tokens of each part, part by part."""
    tokens = [(labels[k], k, j, token) for k, part in enumerate(parts) for j, token in enumerate(part)]
    each = len(tokens) // n
    own = {"iid": each, "label": 0, "similarity": round(s * each)}.get(split)
    if own is None:
        return [[token[3] for token in tokens[i * each:(i + 1) * each]] for i in range(n)]
    shuffled = [(labels[k], k, j, token) for k in stream(seed, "split").permutation(len(parts))
                for j, token in enumerate(parts[k])]
    first, rest = shuffled[:n * own], sorted(shuffled[n * own:])
    return [[token[3] for token in first[i * own:(i + 1) * own] + rest[i * (each - own):(i + 1) * (each - own)]]
            for i in range(n)]


@pytest.mark.parametrize("block", [5, 1 << 21])
@pytest.mark.parametrize("split", splits.OF_TEXT)
def test_any_number_of_ranks_reads_the_same_streams(tmp_path, monkeypatch, split, block):
    """Every word is there once, so that a token tells where it is from."""
    monkeypatch.setattr(data, "BLOCK", block)
    random, n = np.random.default_rng(3), 5
    lengths, labels = random.integers(1, 9, 40), random.integers(0, 4, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.permutation(starts[-1]).astype(np.uint16)
    file = tmp_path / "a.h5"
    data.write_text(file, ["made up"], "word", [f"{k}" for k in range(starts[-1])], tokens,
                    text.Parts("turns", starts, labels.astype(np.int32), list("abcd")))
    s = 0.3 if split == "similarity" else None
    expected = streams_of(split, np.split(tokens, starts[1:-1]), labels, n, 11, s or 0)
    each = starts[-1] // n
    assert starts[-1] % n and len(set(chain(*expected))) == n * each
    for ranks in (1, 2, 4):
        for ids in np.array_split(np.arange(n + 1), ranks):          # the last one only attacks
            shard = data.read_train(file, split, n, ids, 11, "float32", similarity=s)
            assert shard.tokens.dtype == np.int32 and shard.offsets.dtype == shard.ids.dtype == np.int64
            assert [shard.tokens[a:b].tolist() for a, b in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)] == [
                expected[i] if i < n else [] for i in ids]
            assert np.array_equal(shard.ids, ids) and shard.n == n and shard.total == n * each
            if split == "rotate":
                assert shard.blocks.tolist() == [each * i for i in range(n + 1)] and shard.blocks.dtype == np.int64
                assert np.array_equal(shard.tokens, tokens[:n * each])
            else:
                assert shard.blocks is None and len(shard.tokens) == each * np.sum(ids < n)
    if split in ("iid", "label"):
        shard = data.read_train(file, "similarity", n, range(n), 11, "float32", similarity=float(split == "iid"))
        assert shard.tokens.tolist() == list(chain(*expected))
    nobody = data.read_train(file, split, n, [], 11, "float32", similarity=s)
    assert nobody.offsets.tolist() == [0] and (split == "rotate" or not len(nobody.tokens))


def test_a_test_text_is_the_same_streams_for_any_number_of_ranks(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text(PLAY)
    file = imported(tmp_path, PLAY, "char", test=[str(tmp_path / "t.txt")])
    whole = data.read_test(file, 0, 1, "float32")
    assert "".join(spelled(whole)) == PLAY and whole.offsets.tolist() == [0, len(PLAY)] and whole.n == 1
    for least, n in ((len(PLAY) // 3, 3), (2, 16)):
        monkeypatch.setattr(data, "TEST_STREAM", least)
        each = len(PLAY) // n
        for parts in (1, 2, 5, 17):
            shards = [data.read_test(file, part, parts, "float32") for part in range(parts)]
            assert "".join(chain(*map(spelled, shards))) == PLAY[:n * each]
            assert all(np.array_equal(shard.offsets, each * np.arange(len(shard.ids) + 1)) for shard in shards)
            assert np.concatenate([shard.ids for shard in shards]).tolist() == list(range(n))
            assert {(shard.n, shard.total) for shard in shards} == {(n, n * each)}
    assert data.read_test(imported(tmp_path, PLAY, "char"), 0, 1, "float32") is None


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, level, expected", [
    (b"", "word", "found a text of 0 tokens, expected at least two"),
    (b"\xef\xbb\xbf", "char", "found a text of 0 tokens"),
    (b"x", "char", "found a text of 1 tokens"),
    (b"so\n\n\xc3\xa4\xe4 b\n", "word", "the byte at offset 6 is 0xe4, and not UTF-8"),
    (b"a b\n\xc3", "char", "the byte at offset 4 is 0xc3, and not UTF-8"),
    (b"\xff\xfea\0b\0", "word", "the byte at offset 0 is 0xff"),
    (b"a\0b\0", "word", "the byte at offset 1 is NUL; expected a text in UTF-8")])
def test_bad_texts_are_named(tmp_path, content, level, expected):
    (tmp_path / "a.txt").write_bytes(content)
    refused(lambda: import_file([str(tmp_path / "a.txt")], str(tmp_path / "a.h5"), level=level), "a.txt: ", expected)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_bad_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.txt", "one two\n\ntwo\n"), ("b.txt", "one three\n"), ("rows.txt", "1 1:2\n0 2:1\n")):
        Path(name).write_text(content)
    refused(lambda: import_file(["gone.txt"], "d.h5"), "gone.txt: No such file")
    refused(lambda: import_file(["a.txt"], "d.h5", level="line"), "level: found 'line', expected one of word, char")
    refused(lambda: import_file(["a.txt"], "d.h5", features=3), "features: found 3, but a.txt is text")
    refused(lambda: import_file(["a.txt"], "d.h5", label="1"), "label: found '1', but a.txt is text")
    refused(lambda: import_file(["a.txt", "rows.txt"], "d.h5"), "rows.txt: found rows, expected text as in a.txt")
    refused(lambda: import_file(["rows.txt"], "d.h5", level="word"), "level: found 'word', but rows.txt is not text")
    refused(lambda: import_file(["a.txt"], "d.h5", test=["b.txt"]), "b.txt: the word 'three' is not in the training")
    refused(lambda: import_file(["a.txt"], "d.h5", test=["b.txt"], level="char"), "b.txt: the character 'h' is not")
    refused(lambda: import_file(["a.txt"], "b.txt"), "b.txt: exists", "not overwritten")
    Path("cut.txt.gz").write_bytes(gzip.compress(b"one two\n" * 9999)[:-20])
    refused(lambda: import_file(["cut.txt.gz"], "d.h5"), "cut.txt.gz: Compressed file ended")
    with monkeypatch.context() as full:
        full.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        refused(lambda: import_file(["a.txt"], "d.h5"), "d.h5: cannot be written: No space left on device")
    assert not list(Path().glob("d.h5*"))
    assert main(["data", "import", "a.txt", "d.h5", "--level", "char", "--label", "1"]) == 2
    assert capsys.readouterr().err == "mpiclip: label: found '1', but a.txt is text\n"
    import_file(["rows.txt"], "rows.h5")
    import_file(["a.txt"], "text.h5")

    def read(split="iid", workers=1, file="text.h5", **options):
        return data.read_train(file, split, workers, [0], 0, "float32", **options)

    refused(lambda: read("rotate", file="rows.h5"), "data.split: found 'rotate', for rows expected one of iid")
    refused(lambda: read("dirichlet", alpha=1), "data.split: found 'dirichlet', for a text expected one of rotate")
    refused(lambda: read("contiguous", 4), "text.h5: 6 tokens for 4 workers, expected at least two tokens per worker")
    refused(lambda: read("iid", 3), "data.split: found 'iid' for a text of 2 parts and 3 workers", "'contiguous'")
    refused(lambda: read("similarity"), "data.similarity: found None")
    refused(lambda: data.moments("text.h5"), "text.h5: is a text, which has no features", "data.standardize")
    tables = {"problem": {"name": "softmax"}, "method": {"name": "gd", "stepsize": 1}, "data": {"file": "text.h5"}}
    refused(lambda: train(tables), "text.h5: holds text, but problem.name = 'softmax' learns from rows")
    tables["problem"], tables["data"] = {"name": "lstm", "hidden": 2, "sequence": 1}, {"file": "rows.h5"}
    refused(lambda: train(tables), "rows.h5: holds rows, but problem.name = 'lstm' learns from text")


def test_damaged_files_are_named(tmp_path):
    file, good = imported(tmp_path, PLAY, "word"), tmp_path / "good.h5"
    shutil.copy(file, good)
    for name, place, value in (("parts", -1, 99), ("parts", 1, 0), ("parts", 0, 1), ("tokens", 0, 200)):
        shutil.copy(good, file)
        with h5py.File(file, "r+") as f:
            f["train"][name][place] = value
        refused(lambda: data.read_train(file, "iid", 2, [0, 1], 0, "float32"), "a.h5: truncated or damaged", name)
    shutil.copy(good, file)
    with h5py.File(file, "r+") as f:
        del f["vocabulary"]
    refused(lambda: data.read_train(file, "iid", 2, [0, 1], 0, "float32"), "a.h5: truncated or damaged")
