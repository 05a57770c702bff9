"""Text into a growing store (segments.py): the first makes it, what comes later is a segment each.

Whatever is written becomes part of the store by one rename, when all of it is on disk. So a process that is killed, at
whatever moment, leaves the store as it was or with all of its text; and of two at once both find a number, without a
lock, since a folder does not take the name of one that holds something.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.data import tokenizer as tokenizers
from shoal.data.counts import Counts
from shoal.data.draft import draft, publish, sweep
from shoal.data.growing import same_tokenizer
from shoal.data.make import Progress, make, needs_text, summary, tokenise, warn, warn_of_replaced
from shoal.data.segments import Origin, Segment, folder_of, is_store, mark, next_number, origin
from shoal.data.sources import Corpus, find
from shoal.data.split import split
from shoal.errors import DataError, JobError
from shoal.job.data import DataOptions

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


@dataclass(frozen=True)
class Appended:
    """What came into a store. segment: its number; 0: the store was begun with it, and has its validation text from it.

    binary, empty, unreadable: files of the folders that were passed over.
    """

    store: Path
    segment: int
    train: Counts
    validation: Counts
    binary: int
    empty: int
    unreadable: int


def append(
    store: str | Path, options: DataOptions, asked: Collection[str] = (), say: Callable[[str], None] = print
) -> Appended:
    """The text of `options.source` into `store`, which is made if it is not there (or an empty folder).

    asked: which of `vocab_size` and `validation` the user gave; if the store is there, they are its own or refused.
    say: gets a sentence now and then. Raises DataError or JobError; the store is as it was then.
    """
    folder = Path(os.path.realpath(Path(store).expanduser()))
    try:
        with draft(_place(folder)) as temporary:
            corpus = find(options, temporary)
            say(summary(corpus))
            return _begun(folder, options, corpus, temporary, say) or _added(
                folder, options, asked, corpus, temporary, say
            )
    except BrokenPipeError:  # who reads what `say` prints (`| head`) has left
        raise
    except OSError as error:
        fix = "see that the files stay where they are, and that the store's folder can be written and has space"
        raise DataError(f"the text cannot be appended: {error}", where=str(store), fix=fix) from None


def _place(folder: Path) -> Path:
    """Where drafts are made: in the store, or beside one that is still to come. Raises DataError where it cannot."""
    if is_store(folder):
        sweep(folder.parent)  # where it was begun
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "this is no growing store" + (", and the folder is not empty" if folder.is_dir() else " but a file")
        raise DataError(what, where=str(folder), fix="name a new folder, or a store that `shoal data append` made")
    return next(above for above in folder.parents if above.is_dir())


def _begun(
    folder: Path, options: DataOptions, corpus: Corpus, temporary: Path, say: Callable[[str], None]
) -> Appended | None:
    """Makes the store, as `prepare` makes a corpus; None if there is one."""
    if is_store(folder):
        return None
    options = replace(options, tokenizer="bpe" if options.tokenizer == "auto" else options.tokenizer)
    given = None if options.tokenizer in ("bpe", "bytes") else tokenizers.load(options.tokenizer)
    made = make(options, 0, corpus, given, temporary / "store", say)
    if not made.train.documents:
        raise DataError(
            "all of this text is for validation",
            where=", ".join(options.source),
            fix="give more, or less data.validation",
        )
    mark(made.folder, Origin(options.tokenizer, options.vocab_size, options.validation, made.fingerprint))
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        publish(made.folder, folder)
    except OSError:
        if not is_store(folder):  # else somebody else has begun it just now
            raise
        return None
    warn(made, options, say)
    return Appended(folder, 0, made.train, made.validation, corpus.binary, corpus.empty, corpus.unreadable)


def _added(
    folder: Path,
    options: DataOptions,
    asked: Collection[str],
    corpus: Corpus,
    temporary: Path,
    say: Callable[[str], None],
) -> Appended:
    """Makes a segment of the text, all of it for training."""
    has = origin(folder)
    same_tokenizer(folder, options.tokenizer)
    tokenizer = tokenizers.load(folder)
    for name in ("vocab_size", "validation"):
        # A tokenizer may have another number of tokens than its training was asked for.
        same = {getattr(has, name)} | ({tokenizer.vocab_size} if name == "vocab_size" else set())
        if name in asked and getattr(options, name) not in same:
            what = f"data.{name}={getattr(options, name)} is not that of the store, {getattr(has, name)}"
            raise JobError(what, where=str(folder), fix=f"leave out data.{name}; or begin another store")
    number = next_number(folder)
    new = temporary / "segment"
    new.mkdir()
    spans, _ = split(corpus.files, 0)
    counts = tokenise("train", spans, options, tokenizer, new, Progress(corpus.size, say))
    needs_text([counts], options)
    Segment(new / "train", counts, has.fingerprint).save()
    while not _published(new, folder_of(folder, number)):
        number = next_number(folder)
    warn_of_replaced(counts.replaced, say)
    return Appended(folder, number, counts, Counts(), corpus.binary, corpus.empty, corpus.unreadable)


def _published(new: Path, segment: Path) -> bool:
    """Gives the segment its name; False if somebody else has taken it just now."""
    try:
        publish(new, segment)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True
