"""From options to a prepared corpus: finds and splits text, trains a tokenizer, makes tokens, keeps them."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import tokenizers

from shoal.data import tokenizer as tokenizers_of
from shoal.data.draft import draft
from shoal.data.encode import encode
from shoal.data.prepared import SPLITS, Counts, Prepared
from shoal.data.sources import Corpus, find
from shoal.data.split import split
from shoal.data.store import Writer
from shoal.data.text import Span, pieces, read
from shoal.data.tokenizer import Tokenizer
from shoal.errors import DataError
from shoal.job.data import DataOptions

__all__ = ["Counts", "Prepared", "prepare"]

# Part of the name of a prepared folder: a change of what is written must change it.
_FORMAT = 4
# The BPE is trained on at most so much text, spread over the corpus.
_SAMPLE = 64 << 20
# The validation text that is kept beside its tokens, to compare with other compressors.
_COPIED = 64 << 20


def prepare(options: DataOptions, seed: int = 0, say: Callable[[str], None] = print) -> Prepared:
    """The corpus of `options` as tokens, from the cache if neither files nor options have changed.

    seed: of the choice of validation files; leave it at 0 so that all runs are validated on the same text.
    say: gets a sentence now and then. Raises DataError for text or a tokenizer that cannot be used.
    """
    options = replace(options, tokenizer="bpe" if options.tokenizer == "auto" else options.tokenizer)
    cache = cache_folder(options)
    try:
        with draft(cache) as temporary:
            corpus = find(options, temporary)
            say(_found(corpus))
            given = None if options.tokenizer in ("bpe", "bytes") else tokenizers_of.load(options.tokenizer)
            folder = cache / _fingerprint(options, seed, corpus, given)
            prepared = _cached(folder, say) or _make(options, seed, corpus, given, temporary / "new", folder, say)
    except BrokenPipeError:  # who reads what `say` prints (`| head`) has left; no fault of the data
        raise
    except OSError as error:
        fix = "see that the files stay where they are; for space, name another folder in data.cache"
        raise DataError(f"the data cannot be prepared: {error}", where=str(cache), fix=fix) from None
    _warn(prepared, options, say)
    prepared.check_length("train", options.sequence_length)
    for name in SPLITS:
        if prepared.counts(name).predictions:
            prepared.plan(name, options.sequence_length, options.pack)
    return prepared


def cache_folder(options: DataOptions) -> Path:
    """Where prepared corpora are kept. Raises DataError if it cannot be made."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "shoal"
    folder = Path(options.cache or usual).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot make the folder for prepared data: {error.strerror}"
        raise DataError(what, where=str(folder), fix="name another in data.cache") from None
    return folder


def _make(
    options: DataOptions,
    seed: int,
    corpus: Corpus,
    given: Tokenizer | None,
    new: Path,
    folder: Path,
    say: Callable[[str], None],
) -> Prepared:
    """Everything is written into `new`, which becomes `folder` when it is complete."""
    new.mkdir()
    sides = dict(zip(SPLITS, split(corpus.files, options.validation, seed), strict=True))
    tokenizer = given or _own_tokenizer(options, sides["train"], say)
    tokenizer.save(new)
    progress = _Progress(corpus.size, say)
    counts = {name: _encode(name, spans, options, tokenizer, new, progress) for name, spans in sides.items()}
    if sum(c.documents for c in counts.values()) == 0:
        fix = f"check data.text_field ('{options.text_field}')"
        raise DataError("there is no text in these files", where=", ".join(options.source), fix=fix)
    prepared = Prepared(
        folder=new,
        fingerprint=folder.name,
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
    try:
        new.rename(folder)
    except OSError:
        if not folder.is_dir():  # else somebody else has made the same just now
            raise
    return replace(prepared, folder=folder)


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


def _encode(
    name: str, spans: list[Span], options: DataOptions, tokenizer: Tokenizer, new: Path, progress: _Progress
) -> Counts:
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


def _fingerprint(options: DataOptions, seed: int, corpus: Corpus, given: Tokenizer | None) -> str:
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


def _cached(folder: Path, say: Callable[[str], None]) -> Prepared | None:
    if not folder.is_dir():
        return None
    try:
        prepared = Prepared.load(folder)
    except DataError as error:
        say(f"warning: {error.what}; it is made again")
        shutil.rmtree(folder)
        return None
    say(f"already prepared: {folder}")
    return prepared


@dataclass
class _Progress:
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


def _found(corpus: Corpus) -> str:
    reasons = {"binary": corpus.binary, "empty": corpus.empty, "unreadable": corpus.unreadable}
    passed = [f"{count} {reason}" for reason, count in reasons.items() if count]
    note = f" (passed over: {', '.join(passed)})" if passed else ""
    return f"reading {_megabytes(corpus.size)} in {len(corpus.files)} file{'s' * (len(corpus.files) > 1)}{note}"


def _warn(prepared: Prepared, options: DataOptions, say: Callable[[str], None]) -> None:
    replaced = prepared.train.replaced + prepared.validation.replaced
    if replaced:
        say(f"warning: {replaced} byte sequences are not UTF-8; each is now the character U+FFFD")
    total = prepared.train.bytes + prepared.validation.bytes
    share = prepared.validation.bytes / max(total, 1)
    if options.validation and not prepared.validation.documents:
        say("warning: the text is a single document; nothing is kept for validation")
    elif options.validation and share > 2 * options.validation and share > 0.05:
        say(f"warning: {share:.0%} of the text is kept for validation, since files stay whole")


def _name(span: Span) -> str:
    whole = span.start == 0 and span.stop == span.file.size
    return span.file.name if whole else f"{span.file.name} [bytes {span.start} to {span.stop}]"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB" if size >= 1000 else f"{size} bytes"
