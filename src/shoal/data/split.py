"""Which text is trained on, and which is kept for validation: whole files, or blocks of lines of one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

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

    n grows with the text, so that a block is long enough to be read with its context. What lies between two
    cuts is one document of plain text (JSONL: one a line).
    """
    parts = min(_BLOCKS, max(1, int(share * file.size) // _BLOCK))
    training, validation = [], []
    start = 0
    with file.path.open("rb") as stream:
        for part in range(1, parts + 1):
            end = next_line(stream, file, file.size * part // parts)
            cut = next_line(stream, file, end - round(share * (end - start)))
            if cut >= end:
                cut = _last_cut(file, start, end, end - round(share * (end - start)))
            training.append(Span(file, start, cut))
            validation.append(Span(file, cut, end))
            start = end
    return _filled(training), _filled(validation)


def _last_cut(file: Source, start: int, end: int, wanted: int) -> int:
    """Where to cut when no line starts between `wanted` and `end`: at the last line before, if that leaves half.

    Plain text is else cut within its line, at `wanted`; a JSONL line cannot be: it is all for training.
    """
    with file.path.open("rb") as stream:
        reach = min(wanted - start, 1 << 20)
        stream.seek(wanted - reach)
        before = stream.read(reach)
        newline = before.rfind(b"\n")
        line = wanted - reach + newline + 1
        if newline >= 0 and end - line <= (end - start) / 2:
            return line
        if file.jsonl:
            return end
        return min(end, next_character(stream, wanted))


def _filled(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.stop > span.start]
