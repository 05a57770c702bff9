"""From options to a prepared corpus: finds the text, has it made into tokens (make.py), and keeps them in the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shoal.data import tokenizer as tokenizers_of
from shoal.data.counts import Counts
from shoal.data.draft import draft
from shoal.data.growing import opened
from shoal.data.make import fingerprint, make, summary, warn
from shoal.data.plans import packed
from shoal.data.prepared import SPLITS, Prepared
from shoal.data.sources import find
from shoal.errors import DataError
from shoal.job.data import DataOptions

__all__ = ["Counts", "Prepared", "prepare"]


def prepare(options: DataOptions, seed: int = 0, say: Callable[[str], None] = print) -> Prepared:
    """The corpus of `options` as tokens, from the cache if neither files nor options have changed.

    seed: of the choice of validation files; leave it at 0 so that all runs are validated on the same text.
    say: gets a sentence now and then. Raises DataError for text or a tokenizer that cannot be used. A growing store
    is taken as it is.
    """
    if store := opened(options):
        for prefix in store.prefixes("train"):
            packed(prefix, options.sequence_length, options.pack)
        return store
    options = replace(options, tokenizer="bpe" if options.tokenizer == "auto" else options.tokenizer)
    cache = cache_folder(options)
    try:
        with draft(cache) as temporary:
            corpus = find(options, temporary)
            say(summary(corpus))
            given = None if options.tokenizer in ("bpe", "bytes") else tokenizers_of.load(options.tokenizer)
            folder = cache / fingerprint(options, seed, corpus, given)
            prepared = _cached(folder, say)
            if prepared is None:
                prepared = _keep(make(options, seed, corpus, given, temporary / "new", say), folder)
    except BrokenPipeError:  # who reads what `say` prints (`| head`) has left; no fault of the data
        raise
    except OSError as error:
        fix = "see that the files stay where they are; for space, name another folder in data.cache"
        raise DataError(f"the data cannot be prepared: {error}", where=str(cache), fix=fix) from None
    warn(prepared, options, say)
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


def _keep(made: Prepared, folder: Path) -> Prepared:
    """The draft is complete: it gets its name."""
    try:
        made.folder.rename(folder)
    except OSError:
        if not folder.is_dir():  # else somebody else has made the same just now
            raise
    return replace(made, folder=folder)


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
