"""Which files are found, which are passed over, and what is said about those that cannot be used."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path

import pytest

from shoal.data.sources import find, is_binary
from shoal.errors import DataError
from shoal.job.data import DataOptions
from tests.data.corpora import folder, jsonl


def names(tmp_path: Path, *source: str, **options) -> list[str]:
    spool = tmp_path / "spool"
    spool.mkdir(exist_ok=True)
    return [f.name for f in find(DataOptions(source=source, **options), spool).files]


def refused(tmp_path: Path, *source: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        names(tmp_path, *source, **options)
    assert caught.value.where
    assert caught.value.fix
    return str(caught.value)


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path):
    root = folder(tmp_path / "corpus", files=4)
    (root / ".hidden").write_text("secret")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("git")
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "x.py").write_text("cached")
    expected = ["below/file00.py", "below/file03.py", "file01.py", "file02.py"]
    assert names(tmp_path, str(root)) == [f"corpus/{n}" for n in expected]


def test_include_takes_names_or_paths(tmp_path):
    root = folder(tmp_path / "corpus", files=4)
    (root / "notes.md").write_text("text")
    assert names(tmp_path, str(root), include=("*.md",)) == ["corpus/notes.md"]
    assert names(tmp_path, str(root), include=("below/*",)) == ["corpus/below/file00.py", "corpus/below/file03.py"]


def test_binary_and_empty_files_of_a_folder_are_counted(tmp_path):
    root = folder(tmp_path / "corpus", files=3)
    (root / "image.png").write_bytes(b"\x89PNG\0\0\0")
    (root / "nothing.txt").touch()
    corpus = find(DataOptions(source=(str(root),)), tmp_path)
    assert (len(corpus.files), corpus.binary, corpus.empty) == (3, 1, 1)


def test_a_file_found_twice_is_taken_once(tmp_path):
    root = folder(tmp_path / "corpus", files=3)
    (root / "link.py").symlink_to(root / "file01.py")
    assert len(names(tmp_path, str(root), str(root / "file01.py"), str(root))) == 3


def test_python_is_the_standard_library_without_its_tests(tmp_path):
    corpus = find(DataOptions(), tmp_path)
    found = {f.name for f in corpus.files}
    assert {"python/argparse.py", "python/json/decoder.py"} <= found
    assert not any("/test/" in n or "/tests/" in n or "site-packages" in n for n in found)
    assert 8e6 < corpus.size < 16e6


def test_standard_input_and_pipes_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n")))
    corpus = find(DataOptions(source=("-",)), tmp_path)
    assert corpus.files[0].path.read_bytes() == b"from a pipe\n"
    assert not corpus.files[0].jsonl
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n{"text": "b"}\n')))
    assert find(DataOptions(source=("-",)), tmp_path).files[0].jsonl
    # Whatever the text's key is called, so that its absence is an error, as in a file.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"content": "a"}\n{"content": "b"}\n')))
    assert find(DataOptions(source=("-",)), tmp_path).files[0].jsonl
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"[" * 100_000)))
    assert not find(DataOptions(source=("-",)), tmp_path).files[0].jsonl
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(b"through a fifo",))
    writer.start()
    assert find(DataOptions(source=(str(fifo),)), tmp_path).files[0].size == 14
    writer.join()


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    message = refused(tmp_path, str(tmp_path / "corpsu.txt"))
    assert "no such file" in message
    assert f"did you mean '{tmp_path / 'corpus.txt'}'?" in message
    assert "no folder" in refused(tmp_path, str(tmp_path / "a" / "b" / "c.txt"))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "empty" in refused(tmp_path, str(tmp_path / "empty.txt"))


@pytest.mark.parametrize("content", [b"text \0 more", bytes(range(128, 256)) * 3, "Привет, мир".encode("koi8-r")])
def test_a_binary_file_is_refused(tmp_path, content):
    (tmp_path / "some.bin").write_bytes(content)
    assert "binary" in refused(tmp_path, str(tmp_path / "some.bin"))


def test_text_with_a_few_bad_bytes_is_not_binary():
    assert not is_binary(b"caf\xe9 and more latin-1 text")
    assert not is_binary("中文".encode()[:5])


def test_an_unreadable_file_is_refused_and_in_a_folder_counted(tmp_path, monkeypatch):
    # Tests may run as root, whom no permission stops.
    locked = tmp_path / "corpus" / "locked.txt"
    folder(tmp_path / "corpus", files=2)
    locked.write_text("text")
    opened = Path.open

    def deny(self, *args, **kwargs):
        if self == locked:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", deny)
    assert "Permission denied" in refused(tmp_path, str(locked))
    corpus = find(DataOptions(source=(str(tmp_path / "corpus"),)), tmp_path)
    assert (len(corpus.files), corpus.unreadable) == (2, 1)


def test_a_folder_without_text_is_refused_and_says_what_it_holds(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    assert "no file at all" in refused(tmp_path, str(root))
    (root / "x.bin").write_bytes(b"\0")
    (root / "y.txt").touch()
    assert "1 binary, 1 empty" in refused(tmp_path, str(root))
    (root / "z.txt").write_text("text")
    assert "matches *.py" in refused(tmp_path, str(root), include=("*.py",))


def test_jsonl_is_known_by_its_name(tmp_path):
    path = jsonl(tmp_path / "some.jsonl", ["a", "b"])
    assert find(DataOptions(source=(str(path),)), tmp_path).files[0].jsonl
