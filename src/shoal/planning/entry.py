"""A machine's entry: what `shoal calibrate` measured there, as tables of seconds by size. Read and written as TOML."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise, product
from math import exp, inf, isfinite, log, prod
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import JobError
from shoal.job.source import Source

VERSION = 1
FILE = "machine.toml"
DIFFERENTIATED, ALONE = ("norm", "gate", "rotate", "add"), ("copy", "scale", "cast", "loss", "update")
OPERATORS = (*DIFFERENTIATED, *(f"{name}.backward" for name in DIFFERENTIATED), *ALONE)
EXCHANGES = ("all_reduce", "all_gather", "reduce_scatter", "message")
AGAIN = "measure it again: shoal calibrate"


@dataclass(frozen=True)
class Line:
    """Seconds of an operation by the size of what it works on (numbers, or bytes), both rising in the same order."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        _check(self.sizes, self.seconds)
        if any(b <= a for a, b in pairwise(self.sizes)):
            raise ValueError("sizes do not rise")

    def at(self, size: float) -> float:
        """Straight between two measurements and beyond the last, so that latency + size / bandwidth is met exactly;
        below the first on the same line, but never less than half of the first, nor less than nothing beyond the last.
        """
        if size <= 0:
            return 0.0
        if len(self.sizes) == 1:
            return self.seconds[0] * max(1.0, size / self.sizes[0])
        upper = next((i for i, known in enumerate(self.sizes) if known >= size), len(self.sizes) - 1)
        low = max(0, upper - 1)
        (x0, x1), (y0, y1) = self.sizes[low : low + 2], self.seconds[low : low + 2]
        found = y0 + (size - x0) * (y1 - y0) / (x1 - x0)
        return max(found, self.seconds[0] / 2 if size < self.sizes[0] else min(y0, y1))


@dataclass(frozen=True)
class Grid:
    """Seconds of an operation of several sizes, measured at corners of a grid; some corners may be missing.

    Between them the seconds for a unit of work (the sizes' product) are linear in the logarithms of the sizes, so any
    power of a size is met exactly; outside the grid they are those of its edge.
    """

    shapes: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        _check(self.shapes, self.seconds)
        if len({len(shape) for shape in self.shapes}) > 1 or any(size < 1 for size in self._all):
            raise ValueError("shapes are not as many sizes of 1 or more each")

    @property
    def _all(self) -> Iterator[int]:
        return (size for shape in self.shapes for size in shape)

    @cached_property
    def _axes(self) -> list[list[int]]:
        """Of each size its values in the grid, rising."""
        return [sorted(set(column)) for column in zip(*self.shapes, strict=True)]

    @cached_property
    def _unit(self) -> dict[tuple[int, ...], float]:
        """Logarithm of the seconds for a unit of work at each corner; where it was not measured, that of the nearest
        corner that was (the mean of those that are equally near)."""
        known = {s: log(t / prod(s)) for s, t in zip(self.shapes, self.seconds, strict=True)}
        return {corner: _nearest(corner, known) for corner in product(*self._axes)}

    def at(self, *sizes: float) -> float:
        """Seconds of an operation of these sizes."""
        if min(sizes) <= 0:
            return 0.0
        ends = [_between(axis, size) for axis, size in zip(self._axes, sizes, strict=True)]
        found = sum(
            prod(weight for _, weight in chosen) * self._unit[tuple(corner for corner, _ in chosen)]
            for chosen in product(*ends)
        )
        return exp(found) * prod(sizes)


@dataclass(frozen=True)
class Precision:
    """What ranks do in one precision. products: of m × k by k × n matrices, by (m, n, k). odd: how many times as long
    one takes that has an odd size. attention, attention_backward: of 8 heads, by (length, head size). operators: the
    others by the numbers that they work on, `.backward` their gradients. block, block_backward: of a tiny block
    (local.TINY), nearly all of it what Python and autograd do between operators."""

    products: Grid
    attention: Grid
    attention_backward: Grid
    operators: Mapping[str, Line]
    odd: float
    block: float
    block_backward: float

    def __post_init__(self) -> None:
        missing = [name for name in OPERATORS if name not in self.operators]
        if missing:
            raise ValueError(f"operators lack {', '.join(missing)}")


@dataclass(frozen=True)
class Side:
    """Measured while so many ranks of this machine compute at once, each with so many threads. launch: seconds of an
    operation on one number. exchanges: collectives between all of them by bytes: of an all-reduce, or a message, those
    of the tensor; of an all-gather, or a reduce-scatter, those of the whole."""

    ranks: int
    threads: int
    launch: float
    precisions: Mapping[str, Precision]
    exchanges: Mapping[str, Line] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [name for name in EXCHANGES if self.ranks > 1 and name not in self.exchanges]
        if missing:
            raise ValueError(f"exchanges lack {', '.join(missing)}")


@dataclass(frozen=True)
class Entry:
    """machine, system, device: for people. kind: of device. cores: that processes may use. memory: bytes of it. date:
    ISO 8601. seconds: that measuring took. versions: of packages."""

    machine: str
    system: str
    device: str
    kind: str
    cores: int
    memory: float
    date: str
    seconds: float
    versions: Mapping[str, str]
    sides: tuple[Side, ...]
    version: int = VERSION

    def side(self, ranks: int) -> Side:
        """JobError where so many ranks were not measured."""
        found = next((side for side in self.sides if side.ranks == ranks), None)
        if found is None:
            known = ", ".join(str(side.ranks) for side in self.sides)
            what = f"this machine was measured with {known} ranks, not with {ranks}"
            raise JobError(what, where=self.machine, fix=f"shoal calibrate --ranks {ranks}")
        return found


def home() -> Path:
    """Where this machine's entry is: ~/.cache/shoal/machine.toml (or $XDG_CACHE_HOME/shoal/machine.toml)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "shoal" / FILE


def is_one(path: str | Path) -> bool:
    """Whether a file is an entry's, and no cluster's, by what it begins with; `read` says what is wrong with it."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "machine" in tables and "pool" not in tables


def read(path: str | Path) -> Entry:
    """JobError, with the line where one is known, for a file that is not there or is no entry."""
    if not Path(path).is_file():
        raise JobError("there is no entry of a machine", where=str(path), fix="shoal calibrate writes one")
    source = Source.read(path, "the machine's entry")
    tables = source.tables()
    if tables.get("version") != VERSION:
        what = f"the entry's version is {tables.get('version')!r}, and this shoal reads {VERSION}"
        raise JobError(what, where=source.where("version") if "version" in tables else str(path), fix=AGAIN)
    try:
        return msgspec.convert(tables, Entry)
    except msgspec.ValidationError as error:
        key = re.search(r"at `\$\.(\w+)", str(error))
        where = source.where(key[1]) if key and key[1] in tables else str(path)
        raise JobError(f"not the entry of a machine: {error}", where=where, fix=AGAIN) from None


def write(entry: Entry) -> str:
    """As TOML; `read` of it gives the same entry."""
    text = "\n".join(["# What `shoal calibrate` measured: seconds.", *_lines(asdict(entry), "")]) + "\n"
    tomllib.loads(text)
    return text


def _lines(table: Mapping[str, Any], name: str) -> Iterator[str]:
    """A table's own values, then the tables in it."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lists = {key: value for key, value in table.items() if _of_tables(value)}
    for key, value in table.items():
        if key not in inner and key not in lists:
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}"
    for key, value in inner.items():
        full = f"{name}{json.dumps(key)}"
        yield from ("", f"[{full}]", *_lines(value, f"{full}."))
    for key, value in lists.items():
        for one in value:
            yield from ("", f"[[{name}{key}]]", *_lines(one, f"{name}{key}."))


def _of_tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def _check(sizes: Sequence[Any], seconds: Sequence[float]) -> None:
    if not sizes or len(sizes) != len(seconds):
        raise ValueError(f"{len(sizes)} sizes and {len(seconds)} times")
    if not all(0 < value < inf and isfinite(value) for value in seconds):
        raise ValueError("a time is not positive")


def _nearest(corner: tuple[int, ...], known: Mapping[tuple[int, ...], float]) -> float:
    if corner in known:
        return known[corner]
    far = {s: round(sum(abs(log(a / b)) for a, b in zip(corner, s, strict=True)), 9) for s in known}
    near = [known[s] for s, distance in far.items() if distance == min(far.values())]
    return sum(near) / len(near)


def _between(axis: Sequence[int], size: float) -> list[tuple[int, float]]:
    """The values of the grid around a size, each with its weight."""
    if size <= axis[0] or size >= axis[-1]:
        return [(axis[0] if size <= axis[0] else axis[-1], 1.0)]
    low, high = next((a, b) for a, b in pairwise(axis) if a <= size <= b)
    share = log(size / low) / log(high / low)
    return [(low, 1 - share), (high, share)]
