"""From byte ranges of files to clean documents, in pieces small enough to hold several in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from shoal.data.sources import Source
from shoal.errors import DataError

# Bytes of text in work at a time, and of one document (the store counts its tokens in 32 bits).
PIECE = 1 << 19
_LONGEST = 1 << 30


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` of a file, cut where lines start."""

    file: Source
    start: int
    stop: int


@dataclass(frozen=True)
class Piece(Span):
    """A part of a span, of whole lines if possible. opens, closes: it is its document's first, last."""

    opens: bool
    closes: bool


@dataclass(frozen=True)
class Texts:
    """Clean text. replaced: invalid sequences of bytes that U+FFFD stands for now."""

    documents: list[str]
    replaced: int


def pieces(spans: Iterable[Span]) -> Iterator[Piece]:
    """Cuts spans into pieces of about half a MiB, the same ones whoever works on them."""
    for span in spans:
        if span.stop - span.start <= PIECE:
            yield Piece(span.file, span.start, span.stop, True, True)
            continue
        with span.file.path.open("rb") as stream:
            start, opened = span.start, span.start
            while start < span.stop:
                stop = min(span.stop, next_line(stream, span.file, min(start + PIECE, span.stop)))
                last = span.file.jsonl or stop == span.stop or stop - opened > _LONGEST
                yield Piece(span.file, start, stop, span.file.jsonl or start == opened, last)
                start, opened = stop, stop if last else opened


def next_line(stream: BinaryIO, file: Source, offset: int) -> int:
    """Where the first line at or after `offset` starts; the end of the file if none does.

    A line of JSONL is never cut; one of plain text is, between characters, when it has no end within half a
    MiB.
    """
    if offset <= 0:
        return 0
    stream.seek(offset - 1)
    read = 0
    while block := stream.read(PIECE):
        newline = block.find(b"\n")
        if newline >= 0:
            return offset - 1 + read + newline + 1
        read += len(block)
        if not file.jsonl and offset - 1 + read < file.size:
            return next_character(stream, offset)
    return file.size


def next_character(stream: BinaryIO, offset: int) -> int:
    """The first offset from `offset` on that is not within a UTF-8 character."""
    stream.seek(offset)
    following = stream.read(3)
    within = next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
    return offset + within


def read(piece: Piece, text_field: str) -> Texts:
    """The clean text of a piece: one string, or the documents of JSONL. DataError names file:line."""
    try:
        with piece.file.path.open("rb") as stream:
            stream.seek(piece.start)
            raw = stream.read(piece.stop - piece.start)
    except OSError as error:
        what = f"cannot be read any more: {error.strerror or error}"
        raise DataError(what, where=piece.file.name, fix="check the file and start again") from None
    text = raw.decode("utf-8", "replace")
    # Text may hold U+FFFD of its own; UTF-8 synchronises itself, so its bytes cannot appear by chance.
    replaced = text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
    if not piece.file.jsonl:
        return Texts([text], replaced)
    documents = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n")):
        if line and not line.isspace():
            document, lone = _document(line, text_field, piece, number)
            documents += [document] if document else []
            replaced += lone
    return Texts(documents, replaced)


def _document(line: str, text_field: str, piece: Piece, number: int) -> tuple[str, int]:
    """The text of one JSONL line, and its replaced lone surrogates (JSON can write them, UTF-8 cannot)."""
    example = f'write one object a line, e.g. {{"{text_field}": "…"}}'
    another = "give the key of the text as data.text_field"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "a number too long, or nested too deeply")
        raise _bad_line(f"not valid JSON: {reason}", example, piece, number) from None
    if not isinstance(value, dict):
        raise _bad_line("this line is not a JSON object", example, piece, number)
    if text_field not in value:
        fix = f"{another}; this line has {', '.join(map(repr, value)) or 'no key'}"
        raise _bad_line(f"this line has no field '{text_field}'", fix, piece, number)
    text = value[text_field]
    if not isinstance(text, str):
        what = f"the field '{text_field}' is not text but {json.dumps(text)[:40]}"
        raise _bad_line(what, another, piece, number)
    try:
        text.encode()
    except UnicodeEncodeError:
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return clean, clean.count("\ufffd") - text.count("\ufffd")
    return text, 0


def _bad_line(what: str, fix: str, piece: Piece, number: int) -> DataError:
    with piece.file.path.open("rb") as stream:
        left, before = piece.start, 0
        while left > 0 and (block := stream.read(min(left, PIECE))):
            before += block.count(b"\n")
            left -= len(block)
    return DataError(what, where=f"{piece.file.name}:{before + number + 1}", fix=fix)
