"""Which options go with a growing store (segments.py): it is a corpus by itself, with a tokenizer of its own."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from shoal.data import tokenizer
from shoal.data.prepared import Prepared
from shoal.data.segments import is_store, origin
from shoal.errors import DataError, JobError
from shoal.job.data import DataOptions


def opened(options: DataOptions) -> Prepared | None:
    """The growing store that `options.source` names, as far as it goes now; None if it names text.

    Raises DataError where `options.grow` says otherwise, JobError if another tokenizer is asked for.
    """
    stores = [name for name in options.source if names_store(name)]
    if not stores:
        if options.grow:
            what = "data.grow is true, and this is no growing store"
            fix = "`shoal data append STORE FILE ...` makes one; or leave out data.grow"
            raise DataError(what, where=", ".join(options.source), fix=fix)
        return None
    if len(options.source) > 1:
        others = shlex.join(name for name in options.source if name not in stores)
        fix = f"append the other text to it: shoal data append {stores[0]} {others or 'FILE'}"
        raise DataError("a growing store is a corpus by itself", where=stores[0], fix=fix)
    if not options.grow:
        fix = (
            "train on it with a parameter server (--data.grow true --data.order sequential --sync server), "
            "or give the text itself"
        )
        raise DataError("this is a growing store of tokens, and data.grow is false", where=stores[0], fix=fix)
    folder = Path(os.path.abspath(Path(stores[0]).expanduser()))
    same_tokenizer(folder, options.tokenizer)
    return Prepared.load(folder)


def names_store(source: str) -> bool:
    """Whether a name in data.source is that of a growing store."""
    return source not in ("-", "python") and is_store(Path(source).expanduser())


def same_tokenizer(store: Path, asked: str) -> None:
    """Raises JobError if data.tokenizer = `asked` is another than the store's; `auto` never is."""
    has = origin(store).tokenizer
    if asked in ("auto", "bpe", "bytes"):
        same = asked in ("auto", has)
    else:
        theirs, own = tokenizer.load(asked), tokenizer.load(store)
        same = (theirs.model.to_str(), theirs.start, theirs.end) == (own.model.to_str(), own.start, own.end)
    if not same:
        fix = "leave out data.tokenizer: a store has one, which made all of its tokens; or begin another store"
        raise JobError(f"data.tokenizer={asked!r} is not that of the store, {has!r}", where=str(store), fix=fix)
