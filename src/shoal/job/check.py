"""Is an option known, of the right kind, in range? One sentence when not, with the nearest known word."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from shoal.errors import JobError

_KINDS = {
    bool: ("true or false", "true"),
    int: ("a whole number", "8"),
    float: ("a number", "0.1"),
    str: ("text", '"auto"'),
}


def kinds(options: type, table: str = "") -> dict[str, Any]:
    """Dotted name -> type of every option of a dataclass and of those in it: {"optim.lr": float, ...}."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(options).items():
        nested = isinstance(kind, type) and is_dataclass(kind)
        found |= kinds(kind, f"{table}{name}.") if nested else {f"{table}{name}": kind}
    return found


def fit(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind` (bool, int, float, str, or a tuple of one of them), if nothing is lost by it.

    A whole number is a number, a list is a tuple, and a single value is a tuple of one. Else raises JobError.
    """
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        values = value if isinstance(value, (list, tuple)) else (value,)
        if rest[-1] is not ... and len(values) != 1 + len(rest):
            fix = f"give {1 + len(rest)} values"
            raise JobError(f"{name}={value!r} is not {1 + len(rest)} values", fix=fix)
        return tuple(fit(name, one, item) for one in values)
    if kind is float and type(value) is int and abs(value) <= 2**53:
        return float(value)
    if type(value) is not kind:
        what, example = _KINDS[kind]
        raise JobError(f"{name}={value!r} is not {what}", fix=f"e.g. {example}")
    return value


def require(condition: bool, what: str, fix: str) -> None:
    if not condition:
        raise JobError(what, fix=fix)


def at_least(name: str, value: float, least: float) -> None:
    require(math.isfinite(value), f"{name}={value} is not a finite number", f"give {least} or more")
    require(value >= least, f"{name}={value} is less than {least}", f"give {least} or more")


def positive(name: str, value: float) -> None:
    require(math.isfinite(value), f"{name}={value} is not a finite number", "give a number above 0")
    require(value > 0, f"{name}={value} is not positive", "give a number above 0")


def one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    known = list(known)
    require(value in known, f"{name}={value!r} is unknown", nearest(str(value), map(str, known)))


def count(number: int, noun: str) -> str:
    """`1 block`, `2 blocks`, `2 micro-batches`."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("ch") else "s")


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'optim.lr'?`, or the list of what is known."""
    known = list(known)
    close = similar(word, known)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    table = word.rpartition(".")[0]
    return f"known: {', '.join([name for name in known if name.rpartition('.')[0] == table] or known)}"


def similar(word: str, known: list[str]) -> list[str]:
    """The right key under a wrong table, else the nearest key of the same table, else the nearest name."""
    table, _, key = word.rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == key]
    keys = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == table]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    siblings = [f"{table}.{close[0]}" if table else close[0]] if close else []
    anywhere = [] if table and keys else difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return same or siblings or anywhere
