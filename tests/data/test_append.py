"""Text into a growing store: all of an append is there or nothing is, and none takes another's place."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.data import append as module
from shoal.data import tokenizer
from shoal.data.append import append
from shoal.data.prepare import Prepared, prepare
from shoal.data.segments import folder_of
from shoal.data.store import Store
from shoal.errors import DataError, JobError
from shoal.job.data import DataOptions
from tests.data.corpora import appended, folder, jsonl, quiet, words
from tests.data.test_prepare import contents

GROWING = DataOptions(order="sequential", grow=True, sequence_length=16)


def texts(store: Path) -> list[str]:
    """All training text of a store, in order, from its tokens."""
    vocabulary, found = tokenizer.load(store), []
    for prefix in Prepared.load(store).prefixes("train"):
        held = Store(prefix)
        for start, length in zip(held.start_D, held.length_D, strict=True):
            found.append(vocabulary.decode(held.tokens[start + 1 : start + length - 1].tolist()))
    return found


def names(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir() if not path.name.startswith("plan-"))


@pytest.fixture
def store(tmp_path) -> Path:
    appended(tmp_path / "store", ["first", "text"])
    return tmp_path / "store"


def test_the_first_text_makes_what_prepare_makes_and_more_are_segments(tmp_path, monkeypatch):
    text = tmp_path / "my.txt"
    text.write_text(words(40_000, 0))
    options = DataOptions(source=(str(text),), vocab_size=300, validation=0.1, cache=str(tmp_path / "cache"))
    made, store = quiet(options), tmp_path / "store"
    begun = append(store, options, (), lambda said: None)
    assert (begun.segment, begun.train, begun.validation) == (0, made.train, made.validation)
    assert {name: data for name, data in contents(made.folder).items() if not name.startswith("plan-")} == {
        name: data for name, data in contents(store).items() if name != "store.json"
    }
    before = contents(store)
    more = folder(tmp_path / "more", files=3)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n")))
    said: list[str] = []
    later = DataOptions(source=(str(more), "-"))
    added = append(store, later, (), said.append)
    assert "reading" in said[0]
    assert (added.segment, added.train.files, added.train.documents) == (1, 4, 4)
    assert texts(store)[-1] == "from a pipe\n"
    assert [t[:8] for t in texts(store)[-4:-1]] == ["# file 0", "# file 1", "# file 2"]
    assert {name: data for name, data in contents(store).items() if name in before} == before
    found = Prepared.load(store)
    assert found.train.tokens == made.train.tokens + added.train.tokens
    assert found.train.bytes == made.train.bytes + added.train.bytes
    assert found.validation == made.validation


_DIES = """
import os, signal, sys
from pathlib import Path
from shoal.data import draft
from shoal.data.append import append
from shoal.data.store import Writer
from shoal.job.data import DataOptions

store, text, moment = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
sync, close = draft.sync, Writer.close

def dying(path):
    if path.name in {"unsynced": ("train.bin",), "unnamed": ("store", "segment")}.get(moment, ()):
        die()
    if moment == "named" and path in (store, store.parent):
        die()
    sync(path)

if moment == "written":
    Writer.close = lambda self: die()
draft.sync = dying
append(store, DataOptions(source=(text,), tokenizer="bytes", validation=0.0))
"""


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("moment", ["written", "unsynced", "unnamed", "named"])
def test_a_killed_append_leaves_all_or_nothing(tmp_path, there, moment):
    """`unnamed`: the folder is complete, and has not got its name; `named`: it has."""
    store = tmp_path / "news"
    if there:
        appended(store, ["first"])
    before = contents(store)
    text = jsonl(tmp_path / "killed.jsonl", ["killed", "half way"])
    command = [sys.executable, "-c", _DIES, str(store), str(text), moment]
    assert subprocess.run(command, stdout=subprocess.PIPE).returncode == -signal.SIGKILL
    whole = ["killed", "half way"] if moment == "named" else []
    first = ["first"] if there else []
    if first or whole:
        assert texts(store) == first + whole
        assert {name: data for name, data in contents(store).items() if name in before} == before
    else:
        assert not store.exists()
    left = [*tmp_path.glob(".prepare-*"), *store.glob(".prepare-*")]
    assert len(left) == 1
    appended(store, ["next"])
    assert texts(store) == first + whole + ["next"]
    assert not left[0].exists()


def during(monkeypatch, name: str, work) -> None:
    """Lets `work` be done once, right after `name` of the module."""
    real = getattr(module, name)

    def call(*args):
        made = real(*args)
        monkeypatch.setattr(module, name, real)
        work()
        return made

    monkeypatch.setattr(module, name, call)


def test_of_two_that_begin_a_store_at_once_both_land(tmp_path, monkeypatch):
    store = tmp_path / "store"
    during(monkeypatch, "make", lambda: appended(store, ["the quicker one"]))
    assert appended(store, ["the slower one"]).segment == 1
    assert texts(store) == ["the quicker one", "the slower one"]


def test_of_two_segments_at_once_both_land(store, monkeypatch):
    during(monkeypatch, "tokenise", lambda: appended(store, ["the quicker one"]))
    assert appended(store, ["the slower one"]).segment == 2
    assert texts(store) == ["first", "text", "the quicker one", "the slower one"]
    assert names(store)[1:3] == ["segment-000001", "segment-000002"]


def test_a_disk_that_is_full_leaves_the_store_as_it_was(store, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(store)
    monkeypatch.setattr("shoal.data.draft.sync", full)
    with pytest.raises(DataError, match=r"cannot be appended: .*No space left"):
        appended(store, ["more"])
    assert contents(store) == before


def test_text_that_cannot_be_read_leaves_the_store_as_it_was(store, tmp_path):
    before = contents(store)
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    for name, what in (("nothing", "no such file"), ("empty", "is empty"), ("folder", "no readable text file")):
        with pytest.raises(DataError, match=what):
            append(store, DataOptions(source=(str(tmp_path / name),)), (), lambda said: None)
    with pytest.raises(DataError, match="there is no text"):
        appended(store, ["", ""])
    with pytest.raises(DataError, match="no field 'body'"):
        appended(store, ["some"], text_field="body")
    assert contents(store) == before
    assert not list(store.glob(".prepare-*"))


def test_nothing_else_is_taken_for_a_store(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("text")
    for name, what in (("mine", "no growing store, and the folder is not empty"), ("file", "no growing store but a")):
        with pytest.raises(DataError, match=what):
            appended(tmp_path / name, ["more"])
    assert contents(tmp_path / "mine") == {"diary.txt": b"dear diary"}
    corpus = quiet(
        DataOptions(source=(str(tmp_path / "mine"),), tokenizer="bytes", sequence_length=4, cache=str(tmp_path / "c"))
    )
    with pytest.raises(DataError, match="no growing store"):
        appended(corpus.folder, ["more"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert appended(tmp_path / "link", ["some"]).segment == 0
    assert texts(tmp_path / "empty") == ["some"]
    text = DataOptions(source=("no/such.txt",), tokenizer="bytes")
    with pytest.raises(DataError, match="no such file"):
        append(tmp_path / "folder" / "below", text, (), lambda said: None)
    assert not (tmp_path / "folder").exists()
    text = replace(text, source=(str(tmp_path / "file"),))
    assert append(tmp_path / "folder" / "below", text, (), lambda said: None).segment == 0


def test_the_first_text_is_not_all_for_validation(tmp_path):
    documents = ["", "long enough to be most of the bytes"]
    with pytest.raises(DataError, match="all of this text is for validation") as caught:
        appended(tmp_path / "store", documents, validation=0.999)
    assert "data.validation" in caught.value.fix
    assert not (tmp_path / "store").exists()


def test_later_text_goes_by_the_options_of_the_store(store, tmp_path):
    before = contents(store)
    text = DataOptions(source=(str(jsonl(tmp_path / "more.jsonl", ["more"])),))
    for changed, asked, what in (
        (replace(text, tokenizer="bpe"), (), "data.tokenizer='bpe' is not that of the store, 'bytes'"),
        (replace(text, vocab_size=300), ("vocab_size",), "data.vocab_size=300 is not that of the store, 4096"),
        (replace(text, validation=0.5), ("validation",), "data.validation=0.5 is not that of the store, 0.0"),
    ):
        with pytest.raises(JobError, match=what):
            append(store, changed, asked, lambda said: None)
    tokenizer.train_bpe(iter([words(5000, 0)]), 333).save(tmp_path)
    with pytest.raises(JobError, match="is not that of the store, 'bytes'"):
        append(store, replace(text, tokenizer=str(tmp_path)), (), lambda said: None)
    assert contents(store) == before
    tokenizer.single_bytes().save(tmp_path)
    for same in ("auto", "bytes", str(tmp_path), str(store)):
        append(store, replace(text, tokenizer=same), (), lambda said: None)
    append(store, replace(text, vocab_size=4096, validation=0.0), ("vocab_size", "validation"), lambda said: None)
    assert texts(store) == ["first", "text"] + 5 * ["more"]


def test_a_store_is_not_read_as_text(store, tmp_path):
    (tmp_path / "other.txt").write_text(words(2000, 1))
    with pytest.raises(DataError, match="a growing store of tokens, not text"):
        append(store, DataOptions(source=(str(store),)), (), lambda said: None)
    added = append(store, DataOptions(source=(str(tmp_path),), include=("*",)), (), lambda said: None)
    assert added.train.files == 2, "other.txt and the store's first text, but nothing of the store"


def test_what_prepare_makes_of_a_store(store, tmp_path):
    appended(store, ["later"])
    own = replace(GROWING, source=(str(store),))
    corpus = prepare(own, 0, lambda said: None)
    assert corpus == Prepared.load(store)
    assert corpus.train.documents == 3
    assert [path.parent.name for path in store.rglob("plan-*")] == ["store", "segment-000001"]
    text = str(tmp_path / "text0.jsonl")
    for options, error, what in (
        (replace(own, grow=False), DataError, "growing store of tokens, and data.grow is false"),
        (replace(own, source=(text,)), DataError, "data.grow is true, and this is no growing store"),
        (replace(own, source=(str(store), text)), DataError, "a growing store is a corpus by itself"),
        (replace(own, tokenizer="bpe"), JobError, "data.tokenizer='bpe' is not that of the store, 'bytes'"),
    ):
        with pytest.raises(error, match=what) as caught:
            prepare(options, 0, lambda said: None)
        assert caught.value.fix
    with pytest.raises(JobError, match=r"data\.grow needs data\.order='sequential', not 'random'"):
        replace(own, order="random").validate()


def test_damage_is_named(store):
    for number in (1, 2):
        appended(store, [f"segment {number}"])
    first, kept = folder_of(store, 1), contents(folder_of(store, 1))

    def damage(name: str, content: bytes | None, what: str) -> None:
        (first / name).unlink()
        if content is not None:
            (first / name).write_bytes(content)
        with pytest.raises(DataError, match=what) as caught:
            Prepared.load(store)
        assert "segment-000001" in caught.value.where
        assert "restore" in caught.value.fix
        (first / name).write_bytes(kept[name])

    damage("train.bin", kept["train.bin"][:-2], "train.bin: .* its index tells of")
    damage("train.idx", None, "train.idx: .*missing")
    damage("meta.json", None, "No such file")
    damage("meta.json", b"{}", "damaged segment")
    meta = json.loads(kept["meta.json"])
    damage("meta.json", json.dumps({**meta, "store": "another"}).encode(), "of another store")
    meta["counts"]["documents"] += 1
    damage("meta.json", json.dumps(meta).encode(), "does not hold the 2 documents")
    assert texts(store)[-2:] == ["segment 1", "segment 2"]
    mark = (store / "store.json").read_text()
    (store / "store.json").write_text(mark.replace('"format": 1', '"format": 9'))
    with pytest.raises(DataError, match="format 9"):
        appended(store, ["more"])


def test_what_follows_a_gap_is_not_read_and_the_gap_is_not_filled(store, tmp_path):
    for number in (1, 2):
        appended(store, [f"segment {number}"])
    folder_of(store, 1).rename(tmp_path / "away")
    assert texts(store) == ["first", "text"]
    with pytest.raises(DataError, match="a segment of the store is missing") as caught:
        appended(store, ["in its place"])
    assert caught.value.where.endswith("segment-000001")
    (tmp_path / "away").rename(folder_of(store, 1))
    assert appended(store, ["more"]).segment == 3


def test_a_store_of_single_bytes_takes_its_own_number_of_tokens(store):
    """Though its options said another, which bytes do not heed."""
    options = DataOptions(source=(str(store.parent / "text.txt"),), vocab_size=257)
    (store.parent / "text.txt").write_text("more text\n")
    assert tokenizer.load(store).vocab_size == 257
    assert append(store, options, ("vocab_size",), lambda said: None).segment > 0
