"""From files to a prepared corpus: the same whoever makes it, kept while nothing changes, clear when it cannot be."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.data import encode, make, plans, text, tokenizer
from shoal.data.prepare import Prepared, prepare
from shoal.errors import DataError
from shoal.job.data import DataOptions
from tests.data.corpora import folder, jsonl, quiet, words


@pytest.fixture
def options(tmp_path) -> DataOptions:
    root = folder(tmp_path / "corpus")
    return DataOptions(
        source=(str(root),), vocab_size=300, sequence_length=32, validation=0.2, cache=str(tmp_path / "cache")
    )


def documents(corpus: Prepared, split: str) -> list[str]:
    """The texts of a split, from its tokens."""
    store, vocabulary = corpus.store(split), tokenizer.load(corpus.tokenizer)
    texts = []
    for start, length in zip(store.start_D, store.length_D, strict=True):
        tokens = store.tokens[start : start + length].tolist()
        assert tokens[0] == corpus.start_token
        assert tokens[-1] == corpus.end_token
        texts.append(vocabulary.decode(tokens[1:-1]))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_the_store_holds_the_files_whole_in_one_split_each(options, kind):
    corpus = quiet(replace(options, tokenizer=kind))
    files = sorted(Path(options.source[0]).rglob("*.py"), key=lambda p: (p.parent.name != "below", p.name))
    held_out = set(corpus.validation_files)
    by_split = {
        "train": [f.read_text() for f in files if f"corpus/{f.relative_to(options.source[0])}" not in held_out],
        "validation": [f.read_text() for f in files if f"corpus/{f.relative_to(options.source[0])}" in held_out],
    }
    for split, expected in by_split.items():
        assert documents(corpus, split) == expected
        counts = corpus.counts(split)
        assert counts.documents == counts.files == len(expected)
        assert counts.bytes == sum(len(t.encode()) for t in expected)
        assert counts.predictions == counts.tokens - len(expected)
    assert held_out
    assert b"".join(corpus.validation_text()).decode() == "".join(by_split["validation"])
    assert 0.1 < corpus.validation.bytes / (corpus.train.bytes + corpus.validation.bytes) < 0.3


def test_no_line_of_validation_is_trained_on(options):
    corpus = quiet(options)
    trained = {line for d in documents(corpus, "train") for line in d.splitlines() if len(line) > 20}
    held_out = {line for d in documents(corpus, "validation") for line in d.splitlines() if len(line) > 20}
    assert held_out
    assert not trained & held_out


def test_the_bpe_has_not_seen_validation(options, monkeypatch):
    seen = []
    train = tokenizer.train_bpe
    monkeypatch.setattr(tokenizer, "train_bpe", lambda texts, size: train(iter(seen.extend(texts) or seen), size))
    corpus = quiet(options)
    assert seen == documents(corpus, "train")


def test_workers_and_pieces_do_not_change_the_result(options, tmp_path, monkeypatch):
    # Pieces of a few lines, so that documents are put together from many.
    monkeypatch.setattr(text, "PIECE", 300)
    made = [quiet(replace(options, workers=n, cache=str(tmp_path / f"cache{n}"))) for n in (1, 2, 5)]
    assert contents(made[0].folder) == contents(made[1].folder) == contents(made[2].folder)
    assert documents(made[0], "train")[0].startswith("# file")


def test_a_large_corpus_gives_the_bpe_a_spread_sample(options, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 400)
    monkeypatch.setattr(make, "_SAMPLE", 8000)
    seen: list[str] = []
    train = tokenizer.train_bpe
    monkeypatch.setattr(tokenizer, "train_bpe", lambda texts, size: train(iter(seen.extend(texts) or seen), size))
    corpus = quiet(options)
    assert 5000 < sum(len(t.encode()) for t in seen) < 12_000
    sampled = sum(any(t[:200] in d for t in seen) for d in documents(corpus, "train"))
    assert sampled > corpus.train.documents / 2


def test_what_is_prepared_is_kept_until_something_changes(options):
    said: list[str] = []
    first = prepare(options, 0, said.append)
    assert not any("already" in line for line in said)
    again = prepare(replace(options, workers=3, order="sequential", sequence_length=64), 0, said.append)
    assert again == first == Prepared.load(first.folder)
    assert "already" in said[-1]
    assert again.fingerprint == first.folder.name
    changed = [replace(options, vocab_size=301), replace(options, tokenizer="bytes"), replace(options, validation=0.3)]
    folders = {quiet(o).folder for o in changed} | {quiet(options, seed=1).folder, first.folder}
    assert len(folders) == 5
    file = Path(options.source[0]) / "file01.py"
    content = file.read_text()
    file.write_text(content.replace("alpha", "gamma"))
    os.utime(file, ns=(1, 1))
    assert quiet(options).folder not in folders


def test_a_damaged_one_is_made_again(options):
    corpus = quiet(options)
    good = contents(corpus.folder)
    for name in ("train.bin", "validation.idx", "meta.json"):
        path = corpus.folder / name
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(DataError):
            Prepared.load(corpus.folder)
        said: list[str] = []
        prepare(options, 0, said.append)
        assert any("made again" in line for line in said)
        assert contents(corpus.folder) == good


def test_a_damaged_plan_is_not_used(options):
    corpus = quiet(options)
    expected = corpus.plan("train", 32, "best_fit").length_P.tolist()
    path = corpus.folder / "plan-train-32-best_fit" / "length.npy"
    good = path.read_bytes()
    for damaged in (good[:-4], good[:3], b"", None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        assert corpus.plan("train", 32, "best_fit").length_P.tolist() == expected
        assert path.read_bytes() == good


def test_a_failure_leaves_nothing_behind(options, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode.Writer, "add", fail)
    with pytest.raises(DataError, match="No space left on device") as caught:
        quiet(options)
    assert caught.value.where == options.cache
    assert list(Path(options.cache).iterdir()) == []


def test_ranks_that_make_the_same_plan_at_once_agree(options, tmp_path):
    corpus = quiet(options)
    made = corpus.plan("train", 48, "best_fit")
    plans._publish(made, corpus.folder / "plan-train-48-best_fit")
    assert not list(corpus.folder.glob(".plan*"))


def test_a_read_only_folder_still_gives_plans(options, monkeypatch):
    corpus = quiet(options)

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(plans.tempfile, "mkdtemp", deny)
    assert corpus.plan("train", 40, "best_fit").rows > 0


def test_one_text_file_and_standard_input(tmp_path, monkeypatch):
    path = tmp_path / "my.txt"
    path.write_text(words(40_000, 0))
    options = DataOptions(source=(str(path),), tokenizer="bytes", validation=0.1, cache=str(tmp_path / "cache"))
    corpus = quiet(options)
    assert "".join(documents(corpus, "train") + documents(corpus, "validation")) == path.read_text()
    assert corpus.validation_files[0].startswith("my.txt [bytes ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    piped = quiet(replace(options, source=("-",)))
    assert contents(piped.folder)["train.bin"] == contents(corpus.folder)["train.bin"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert quiet(replace(options, source=("-",))).folder == piped.folder


def test_jsonl(tmp_path):
    texts = [words(100, i) for i in range(50)]
    path = jsonl(tmp_path / "some.jsonl", texts, field="body")
    options = DataOptions(
        source=(str(path),), text_field="body", tokenizer="bytes", validation=0.1, cache=str(tmp_path / "cache"),
        sequence_length=50,
    )  # fmt: skip
    corpus = quiet(options)
    assert documents(corpus, "train") + documents(corpus, "validation") == texts
    assert corpus.validation.documents in range(4, 8)
    with pytest.raises(DataError, match="no field 'text'") as caught:
        quiet(replace(options, text_field="text"))
    assert caught.value.where == "some.jsonl:1"


def test_a_hugging_face_tokenizer(tmp_path, options):
    own = tokenizer.train_bpe(iter([words(5000, 0)]), 333)
    (tmp_path / "theirs").mkdir()
    own.save(tmp_path / "theirs")
    corpus = quiet(replace(options, tokenizer=str(tmp_path / "theirs")))
    assert (corpus.vocab_size, corpus.end_token) == (own.vocab_size, own.end)
    assert documents(corpus, "train")[0].startswith("# file")
    # Its twin that chats has the same tokens and another template: what is trained with it is exported with it.
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")
    twin = quiet(replace(options, tokenizer=str(tmp_path / "theirs")))
    assert twin.folder != corpus.folder
    assert tokenizer.load(twin.tokenizer).config["chat_template"] == "{{ messages }}"


def test_invalid_utf8_is_counted_and_told(options):
    (Path(options.source[0]) / "latin.txt").write_bytes(b"caf\xe9\n" * 10 + words(300, 1).encode())
    said: list[str] = []
    corpus = prepare(options, 0, said.append)
    assert corpus.train.replaced + corpus.validation.replaced == 10
    assert any("10 byte sequences" in line and "U+FFFD" in line for line in said)


def test_text_shorter_than_a_sequence_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only a few words\n" * 3)
    options = DataOptions(source=(str(path),), tokenizer="bytes", sequence_length=64, cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="shorter than one sequence: 35 tokens") as caught:
        quiet(options)
    assert "data.sequence_length=17" in caught.value.fix


def test_jsonl_without_text_is_refused(tmp_path):
    path = jsonl(tmp_path / "some.jsonl", ["", ""])
    options = DataOptions(source=(str(path),), tokenizer="bytes", cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="no text"):
        quiet(options)


def test_what_else_the_user_is_told(options, tmp_path):
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.txt", "b.txt"):
        (two / name).write_text(words(3000, ord(name[0])))
    said: list[str] = []
    prepare(replace(options, source=(str(two),), validation=0.02), 0, said.append)
    assert any("50% of the text is kept for validation" in line for line in said)
    (two / "b.txt").write_bytes((two / "a.txt").read_bytes())
    prepare(replace(options, source=(str(two),)), 0, said.append)
    assert "nothing is kept for validation" in said[-1]


def test_a_folder_that_is_not_prepared(tmp_path):
    with pytest.raises(DataError, match="no folder of prepared data"):
        Prepared.load(tmp_path)


def test_a_cache_that_cannot_be_made(options, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot make the folder"):
        quiet(replace(options, cache=str(tmp_path / "file" / "cache")))


@pytest.mark.parametrize("sentences", [0, 1])
def test_a_reader_that_left_is_no_fault_of_the_data(options, sentences):
    """`shoal data prepare | head -1`: what is left is quiet, and nothing half made is taken for the corpus."""
    heard = []

    def say(text: str) -> None:
        if len(heard) == sentences:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        heard.append(text)

    with pytest.raises(BrokenPipeError):
        prepare(options, 0, say)
    assert documents(quiet(options), "train")


def test_preparing_does_not_import_torch():
    code = "import sys, shoal.data.append, shoal.data.describe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
