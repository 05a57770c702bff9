"""Which files are the corpus: from what the user named to a sorted list of readable text files."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from shoal.data.segments import is_store
from shoal.errors import DataError
from shoal.job.data import DataOptions

# The standard library's own tests (idlelib's take half of it), and what others installed beside it.
_NOT_LIBRARY = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
_HEAD = 8192
_JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Source:
    """One file of text.

    name: path relative to what the user named; decides the split, so that it is the same on every machine.
    identity: changes when the content does (path and time of change; for a stream a hash of the content).
    jsonl: one document a line, else the file is one document.
    """

    name: str
    path: Path
    size: int
    identity: str
    jsonl: bool


@dataclass(frozen=True)
class Corpus:
    """The files in a fixed order, and how many of those found in folders were passed over, by reason."""

    files: tuple[Source, ...]
    binary: int = 0
    empty: int = 0
    unreadable: int = 0

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def find(options: DataOptions, spool: Path) -> Corpus:
    """The corpus named by `options.source`. Streams (`-`, pipes) are copied into the folder `spool`.

    A file that is named must exist, be readable, not be empty and not be binary, else DataError. Of a folder,
    the files that are so are taken; hidden ones and links to folders are passed over. A file found twice is
    taken once. A stream is JSONL if its first line is a JSON object.
    """
    found: dict[str, Source] = {}
    skipped: Counter[str] = Counter()
    for number, name in enumerate(options.source):
        path = Path(name).expanduser()
        if name == "-":
            files = [_spooled("standard input", sys.stdin.buffer, spool / f"{number}")]
        elif name == "python":
            files = _folder(Path(sysconfig.get_paths()["stdlib"]), "python", ("*.py",), _NOT_LIBRARY, skipped)
        elif path.is_dir() and is_store(path):
            fix = "give the text that it was made of; a run reads a store by itself, with data.grow"
            raise DataError("this is a growing store of tokens, not text", where=name, fix=fix)
        elif path.is_dir():
            files = _folder(path, path.resolve().name, options.include, set(), skipped)
        elif path.is_file():
            files = [_named(path, name)]
        elif path.exists():  # a pipe, e.g. <(zcat corpus.gz)
            with _opened(path, name) as stream:
                files = [_spooled(name, stream, spool / f"{number}")]
        else:
            raise DataError("no such file or folder", where=name, fix=_nearby(path))
        for file in files:
            found.setdefault(os.path.realpath(file.path), file)
    return Corpus(tuple(found.values()), skipped["binary"], skipped["empty"], skipped["unreadable"])


def is_binary(head: bytes) -> bool:
    """Whether the first bytes of a file are something else than UTF-8 text: a NUL byte, or a third is not
    UTF-8.
    """
    return b"\0" in head or 3 * head.decode("utf-8", "replace").count("\ufffd") > len(head)


def _folder(root: Path, name: str, include: tuple[str, ...], leave: set[str], skipped: Counter[str]) -> list[Source]:
    """The text files below `root`; those passed over are counted in `skipped`."""
    files, here = [], Counter[str]()
    for path in _walk(root, leave, here):
        relative = path.relative_to(root).as_posix()
        if include and not any(fnmatchcase(relative if "/" in p else path.name, p) for p in include):
            here["other"] += 1
            continue
        try:
            reason = _unfit(path)
        except OSError:
            reason = "unreadable"
        if reason:
            here[reason] += 1
        else:
            files.append(_source(path, f"{name}/{relative}"))
    if not files:
        seen = ", ".join(f"{count} {reason}" for reason, count in sorted(here.items())) or "no file at all"
        asked = f" that matches {', '.join(include)}" if include else ""
        fix = "give a folder of text files" + (", or another data.include" if include else "")
        raise DataError(f"the folder holds no readable text file{asked} (found: {seen})", where=str(root), fix=fix)
    skipped.update(here)
    return files


def _walk(folder: Path, leave: set[str], skipped: Counter[str]) -> Iterator[Path]:
    """Regular files below a folder, in the order of their names, without hidden ones and growing stores."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        skipped["unreadable"] += 1
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in leave and not is_store(entry.path):
                yield from _walk(Path(entry.path), leave, skipped)
        elif entry.is_file():
            yield Path(entry.path)


def _named(path: Path, name: str) -> Source:
    """A file that the user named: it must be fit."""
    try:
        reason = _unfit(path)
    except OSError as error:
        raise _unreadable(error, name) from None
    _refuse(reason, name)
    return _source(path, path.name)


def _unfit(path: Path) -> str:
    """Why a file is no text: `empty`, `binary`, or nothing."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return "empty" if not head else "binary" if is_binary(head) else ""


def _refuse(reason: str, name: str) -> None:
    if reason == "empty":
        raise DataError("the file is empty", where=name, fix="give a file with text in it")
    if reason == "binary":
        fix = "give UTF-8 text: unpack archives, convert other encodings (iconv -t utf-8)"
        raise DataError("this is not UTF-8 text but a binary file or another encoding", where=name, fix=fix)


def _source(path: Path, name: str) -> Source:
    status = path.stat()
    identity = f"{os.path.realpath(path)} {status.st_mtime_ns}"
    return Source(_printable(name), path, status.st_size, _printable(identity), path.suffix.lower() in _JSONL)


def _spooled(name: str, stream: BinaryIO, path: Path) -> Source:
    """A stream copied into a file, since it is read twice (for the tokenizer, and for the tokens)."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("wb") as copy:
        while block := stream.read(1 << 20):
            digest.update(block)
            copy.write(block)
    _refuse(_unfit(path), name)
    with path.open("rb") as copy:
        try:
            first = json.loads(copy.readline(1 << 24))
        except (ValueError, RecursionError):  # text may well begin with many brackets
            first = None
    return Source(name, path, path.stat().st_size, digest.hexdigest(), isinstance(first, dict))


def _opened(path: Path, name: str) -> BinaryIO:
    if stat.S_ISSOCK(path.stat().st_mode):
        raise DataError("this is a socket", where=name, fix="give a file, a folder, or - for standard input")
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(error, name) from None


def _unreadable(error: OSError, name: str) -> DataError:
    fix = "check its permissions (ls -l), or name another file in data.source"
    return DataError(f"cannot be read: {error.strerror or error}", where=name, fix=fix)


def _printable(text: str) -> str:
    """File names are bytes: those that are not UTF-8 are shown with U+FFFD."""
    return os.fsencode(text).decode("utf-8", "replace")


def _nearby(path: Path) -> str:
    """What stands beside a path that does not exist, under a similar name."""
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        return f"there is no folder {path.parent} either; check the path"
    return f"did you mean '{path.parent / near[0]}'?" if near else "check the path, from the working directory"
