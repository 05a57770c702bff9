"""From files to a folder of tokens: trains a tokenizer or takes one, splits, tokenises, and writes what came of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tokenizers

from shoal.data import tokenizer as tokenizers_of
from shoal.data.counts import Counts
from shoal.data.encode import encode
from shoal.data.prepared import SPLITS, Prepared
from shoal.data.sources import Corpus
from shoal.data.split import split
from shoal.data.store import Writer
from shoal.data.text import Span, pieces, read
from shoal.data.tokenizer import Tokenizer
from shoal.errors import DataError
from shoal.job.data import DataOptions

# Part of the name of a prepared folder: a change of what is written must change it.
_FORMAT = 4
# The BPE is trained on at most so much text, spread over the corpus.
_SAMPLE = 64 << 20
# The validation text that is kept beside its tokens, to compare with other compressors.
_COPIED = 64 << 20


def make(
    options: DataOptions,
    seed: int,
    corpus: Corpus,
    given: Tokenizer | None,
    new: Path,
    say: Callable[[str], None],
) -> Prepared:
    """Everything is written into the folder `new`. given: the tokenizer, if it is not to be made here."""
    new.mkdir()
    sides = dict(zip(SPLITS, split(corpus.files, options.validation, seed), strict=True))
    tokenizer = given or _own_tokenizer(options, sides["train"], say)
    tokenizer.save(new)
    progress = Progress(corpus.size, say)
    counts = {name: tokenise(name, spans, options, tokenizer, new, progress) for name, spans in sides.items()}
    needs_text(counts.values(), options)
    prepared = Prepared(
        folder=new,
        fingerprint=fingerprint(options, seed, corpus, given),
        vocab_size=tokenizer.vocab_size,
        start_token=tokenizer.start,
        end_token=tokenizer.end,
        train=counts["train"],
        validation=counts["validation"],
        validation_files=tuple(map(_name, sides["validation"])),
        binary=corpus.binary,
        empty=corpus.empty,
        unreadable=corpus.unreadable,
    )
    prepared.save()
    return prepared


def needs_text(counts: Iterable[Counts], options: DataOptions) -> None:
    """Raises DataError where files held no document."""
    if sum(one.documents for one in counts) == 0:
        fix = f"check data.text_field ('{options.text_field}')"
        raise DataError("there is no text in these files", where=", ".join(options.source), fix=fix)


def _own_tokenizer(options: DataOptions, spans: list[Span], say: Callable[[str], None]) -> Tokenizer:
    if options.tokenizer == "bytes":
        return tokenizers_of.single_bytes()
    size = sum(span.stop - span.start for span in spans)
    say(f"training a BPE of {options.vocab_size} tokens on {_megabytes(min(size, _SAMPLE))}")
    return tokenizers_of.train_bpe(_sample(spans, size, options.text_field), options.vocab_size)


def _sample(spans: list[Span], size: int, text_field: str) -> Iterator[str]:
    """Training text, all of it or evenly spread pieces that make up `_SAMPLE` bytes."""
    share = min(1.0, _SAMPLE / max(size, 1))
    seen = taken = 0
    for piece in pieces(spans):
        if taken <= share * seen:
            taken += piece.stop - piece.start
            yield from read(piece, text_field).documents
        seen += piece.stop - piece.start


def tokenise(
    name: str, spans: list[Span], options: DataOptions, tokenizer: Tokenizer, new: Path, progress: Progress
) -> Counts:
    """Writes <name>.bin and .idx into the folder `new`; of validation also its text."""
    writer = Writer(new / name, tokenizer.vocab_size)
    work = partial(encode, pieces(spans), options.text_field, tokenizer, writer, options.workers)
    try:
        if name == "validation":
            with (new / "validation.txt").open("wb") as copy:
                tally = work(copy, _COPIED, progress.add)
        else:
            tally = work(None, 0, progress.add)
        writer.close()
    finally:
        writer.abandon()
    files = len({span.file for span in spans})
    return Counts(files, writer.documents, writer.tokens, tally.bytes, tally.replaced)


def fingerprint(options: DataOptions, seed: int, corpus: Corpus, given: Tokenizer | None) -> str:
    """A hash of all that the result depends on, and of nothing else."""
    digest = hashlib.blake2b(digest_size=10)
    kind = (
        given.model.to_str() + f" {given.start} {given.end} {sorted(given.config.items())}"
        if given
        else options.tokenizer
    )
    if kind == "bpe":
        kind += f" {options.vocab_size} {tokenizers.__version__}"
    for part in (_FORMAT, seed, options.validation, options.text_field, kind):
        digest.update(repr(part).encode())
    for file in corpus.files:
        digest.update(repr((file.name, file.size, file.identity)).encode())
    return digest.hexdigest()


@dataclass
class Progress:
    """Says how far the tokens are: after 3 seconds, then less and less often, at least once a minute."""

    total: int
    say: Callable[[str], None]
    done: int = 0
    last: float = field(default_factory=time.monotonic)
    pause: float = 3.0

    def add(self, size: int) -> None:
        self.done += size
        now = time.monotonic()
        if now - self.last > self.pause:
            self.last, self.pause = now, min(2 * self.pause, 60.0)
            self.say(f"tokenising: {100 * self.done // max(self.total, 1)} % of {_megabytes(self.total)}")


def summary(corpus: Corpus) -> str:
    reasons = {"binary": corpus.binary, "empty": corpus.empty, "unreadable": corpus.unreadable}
    passed = [f"{count} {reason}" for reason, count in reasons.items() if count]
    note = f" (passed over: {', '.join(passed)})" if passed else ""
    return f"reading {_megabytes(corpus.size)} in {len(corpus.files)} file{'s' * (len(corpus.files) > 1)}{note}"


def warn(prepared: Prepared, options: DataOptions, say: Callable[[str], None]) -> None:
    """Says what the user may not expect of a corpus."""
    warn_of_replaced(prepared.train.replaced + prepared.validation.replaced, say)
    total = prepared.train.bytes + prepared.validation.bytes
    share = prepared.validation.bytes / max(total, 1)
    if options.validation and not prepared.validation.documents:
        say("warning: the text is a single document; nothing is kept for validation")
    elif options.validation and share > 2 * options.validation and share > 0.05:
        say(f"warning: {share:.0%} of the text is kept for validation, since files stay whole")


def warn_of_replaced(replaced: int, say: Callable[[str], None]) -> None:
    if replaced:
        say(f"warning: {replaced} byte sequences are not UTF-8; each is now the character U+FFFD")


def _name(span: Span) -> str:
    whole = span.start == 0 and span.stop == span.file.size
    return span.file.name if whole else f"{span.file.name} [bytes {span.start} to {span.stop}]"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB" if size >= 1000 else f"{size} bytes"
