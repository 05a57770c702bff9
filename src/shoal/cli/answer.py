"""How a verb answers: it prints for people; with `--format json` its result is the last line on stdout."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shoal.errors import ShoalError


@dataclass(frozen=True)
class Answer:
    """result: what scripts get (dicts, lists, dataclasses, numbers, text); None = nothing."""

    result: Any = None
    exit_code: int = 0


def form(args: list[str]) -> str:
    """`text` or `json`, as `--format` among the arguments says. Raises JobError for another word."""
    from shoal.job.check import one_of

    found = "text"
    for word, following in zip(args, [*args[1:], ""], strict=True):
        flag, given, value = word.partition("=")
        if flag == "--format":
            found = value if given else following
            one_of("--format", found, ("text", "json"))
    return found


@contextlib.contextmanager
def channel(form: str) -> Iterator[None]:
    """With `json`, whatever is printed inside, by child processes too, goes to standard error."""
    if form == "text":
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def give(result: Any, form: str) -> None:
    """With `json`, prints the result as one line; NaN is null."""
    if form == "json" and result is not None:
        import msgspec

        print(msgspec.json.encode(result, enc_hook=str).decode(), flush=True)


def refuse(error: ShoalError, form: str) -> None:
    """Prints an error: what, where and what to do."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    give({"error": {"what": error.what, "where": error.where, "fix": error.fix}}, form)
