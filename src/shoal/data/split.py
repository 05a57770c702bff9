"""Which text is trained on, and which is kept for validation: whole files, or blocks of lines of one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import BinaryIO

from shoal.data.sources import Source
from shoal.data.text import Span, next_character, next_line

# A single file gives its validation text in up to this many places, of at least so many bytes each.
_BLOCKS, _BLOCK = 64, 1 << 14


def split(files: Sequence[Source], share: float, seed: int = 0) -> tuple[list[Span], list[Span]]:
    """(training, validation): about `share` of the bytes go to validation, chosen by name and seed, not by
    content.

    Several files: each goes as a whole, copies of the same content together, at least one to either side if
    there are two different ones. One file or stream: contiguous blocks of its lines, spread over it (see
    `_blocks`).
    """
    if share == 0:
        return [Span(file, 0, file.size) for file in files], []
    if len(files) == 1:
        return _blocks(files[0], share)
    held_out = _files(files, share, seed)
    sides: tuple[list[Span], list[Span]] = [], []
    for file in files:
        sides[file in held_out].append(Span(file, 0, file.size))
    return sides


def _files(files: Sequence[Source], share: float, seed: int) -> set[Source]:
    """Files in the order of the hashes of their names, while each brings the sum nearer to its target."""
    groups = sorted(_copies(files), key=lambda group: min(_hash(file, seed) for file in group))
    target = share * sum(file.size for file in files)
    chosen: list[list[Source]] = []
    taken = 0
    for group in groups:
        size = sum(file.size for file in group)
        # Near the target only small files would fit; taking those alone would not be a sample of the corpus.
        if taken >= 0.9 * target or len(chosen) == len(groups) - 1:
            break
        if taken + size / 2 < target:
            chosen.append(group)
            taken += size
    if not chosen and len(groups) > 1:
        chosen = [min(groups, key=lambda group: sum(file.size for file in group))]
    return {file for group in chosen for file in group}


def _copies(files: Sequence[Source]) -> list[list[Source]]:
    """The files, those with the same content together: a copy in training would give validation away."""
    by_size: defaultdict[int, list[Source]] = defaultdict(list)
    for file in files:
        by_size[file.size].append(file)
    groups: list[list[Source]] = []
    for same_size in by_size.values():
        if len(same_size) == 1:
            groups.append(same_size)
            continue
        by_content: defaultdict[bytes, list[Source]] = defaultdict(list)
        for file in same_size:
            with file.path.open("rb") as stream:
                by_content[hashlib.file_digest(stream, "sha256").digest()].append(file)
        groups += by_content.values()
    return groups


def _hash(file: Source, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed} {file.name}".encode(), digest_size=8).digest()


def _blocks(file: Source, share: float) -> tuple[list[Span], list[Span]]:
    """The end of each of n equal parts of a file is kept for validation, cut where lines start.

    n grows with the text, so that a block is long enough to be read with its context. A line that was longer than
    wanted is made up for by the next parts. What lies between two cuts is one document of plain text (JSONL: one
    a line). As with files, JSONL gives at least one document if it has two, and none of more than half the bytes.
    """
    parts = min(_BLOCKS, max(1, int(share * file.size) // _BLOCK))
    training, validation = [], []
    start = taken = 0
    with file.path.open("rb") as stream:
        for part in range(1, parts + 1):
            end = next_line(stream, file, file.size * part // parts)
            owed = min(max(0, round(share * end) - taken), end - start)
            cut = next_line(stream, file, end - owed)
            if cut >= end and owed:
                cut = _last_cut(stream, file, start, end, owed)
            training.append(Span(file, start, cut))
            validation.append(Span(file, cut, end))
            taken += end - cut
            start = end
    if file.jsonl and taken < share * file.size / 2:  # long documents, or a blank line at the end
        return _one_document(file, share)
    return _filled(training), _filled(validation)


def _last_cut(stream: BinaryIO, file: Source, start: int, end: int, owed: int) -> int:
    """Where to cut when no line starts in the last `owed` bytes of a part: where the last line before starts.

    If that is too much, plain text is cut within its line (too much: half of the part), and JSONL, which cannot
    be, is all for training (too much: no nearer to what is owed than nothing).
    """
    wanted = end - owed
    reach = min(wanted - start, 1 << 20)
    stream.seek(wanted - reach)
    newline = stream.read(reach).rfind(b"\n")
    line = wanted - reach + newline + 1
    most = 2 * owed if file.jsonl else (end - start) / 2
    if newline >= 0 and end - line <= most:
        return line
    return end if file.jsonl else min(end, next_character(stream, wanted))


def _one_document(file: Source, share: float) -> tuple[list[Span], list[Span]]:
    """The JSONL line whose length is nearest to the share is for validation, unless it is most of the text."""
    start, found = 0, []
    with file.path.open("rb") as stream:
        for line in stream:
            if len(line) <= file.size / 2 and not line.isspace():
                found.append(Span(file, start, start + len(line)))
            start += len(line)
    if not found:
        return [Span(file, 0, file.size)], []
    one = min(found, key=lambda span: abs(span.stop - span.start - share * file.size))
    return _filled([Span(file, 0, one.start), Span(file, one.stop, file.size)]), [one]


def _filled(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.stop > span.start]
