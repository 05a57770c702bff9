"""The words in which a codec is asked for: `int8`, `topk:0.05+int2`, `powersgd:4` (docs/codecs.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from shoal.errors import JobError
from shoal.job.check import nearest

KEEPING = {"topk": 1 / 4096, "randomk": 1 / 256, "dct": 1 / 4096}
"""Codecs that keep a share of the numbers, with the least share that they can keep."""

ROUNDING = ("bf16", "fp16", "int8", "int4", "int2", "sign")
"""Codecs that write every number in fewer bits: alone, or what another keeps."""

POWERSGD = "powersgd"
"""Writes each matrix as a product of two thin ones; alone."""

_ALONE = ("none", "auto")
"""No codec, and the one that is chosen: read before `parse`."""

_MOST = 0.5
"""Of a larger share, what is kept and where it lay take more bytes than all numbers in fewer bits each."""

_UNBIASED = ("int8", "int4", "randomk")


@dataclass(frozen=True)
class Part:
    """share: of the numbers, how many are kept; 0 = all. unbiased: right on average over what is drawn at random.
    rank: of the matrices that are sent; 0 = numbers are."""

    name: str
    share: float = 0.0
    unbiased: bool = False
    rank: int = 0

    @property
    def known(self) -> str:
        """The part without `:unbiased`."""
        setting = f"{self.share:g}" if self.share else f"{self.rank}" if self.rank else ""
        return f"{self.name}:{setting}" if setting else self.name


def parse(text: str, option: str = "sync.codec") -> tuple[Part, ...]:
    """What is kept, if not everything, then how it is rounded, if it is: one or two parts.

    Raises JobError with the nearest word that is known. option: named in it.
    """
    before, *after = text.split("+")
    first = _part(before, text, option)
    others = [_part(word, text, option, after=first.name) for word in after]
    for part in others:
        if POWERSGD in (first.name, part.name):
            of_matrices = first if first.name == POWERSGD else part
            what = f"{part.name} cannot come after {first.name}"
            _refuse(text, option, what, f"{of_matrices.known} alone, or leave it out")
        if part.name in KEEPING:
            fix = f"e.g. {part.name}:{part.share:g}+{first.name}" if first.name in ROUNDING else "leave one of them out"
            _refuse(text, option, f"{part.name} cannot come after {first.name}", fix)
        if first.name not in KEEPING:
            either = " or ".join(dict.fromkeys((first.name, part.name)))
            _refuse(text, option, f"{first.name} and {part.name} both round", f"{either} alone")
    if len(others) > 1:
        what = "what is kept is rounded twice"
        _refuse(text, option, what, f"e.g. {first.name}:{first.share:g}+{others[0].name}")
    return (first, *others)


def _part(word: str, text: str, option: str, after: str = "") -> Part:
    """after: the name of the part before it."""
    name, *settings = word.strip().split(":")
    if name not in (*KEEPING, *ROUNDING, POWERSGD):
        if name in _ALONE and name != text:
            _refuse(text, option, f"{name!r} goes with nothing else", f"{name} alone, or leave it out")
        alone = _ALONE if name == text else ()
        names = ROUNDING if after in KEEPING else (*alone, *ROUNDING, *KEEPING, POWERSGD)
        _refuse(text, option, f"{name!r} is unknown", nearest(name.lower(), names))
    share = _share(name, settings.pop(0) if settings else "", text, option) if name in KEEPING else 0.0
    rank = _rank(settings.pop(0) if settings else "", text, option) if name == POWERSGD else 0
    unbiased = settings[:1] == ["unbiased"] and name in _UNBIASED
    for setting in settings[unbiased:]:
        known = Part(name, share, rank=rank).known
        fix = f"{known} or {known}:unbiased" if name in _UNBIASED and not unbiased else f"give {known} alone"
        _refuse(text, option, f"{setting!r} says nothing to {name}", fix)
    return Part(name, share, unbiased, rank)


def _share(name: str, setting: str, text: str, option: str) -> float:
    try:
        share = float(setting)
    except ValueError:
        share = math.nan
    if math.isnan(share):
        what = f"{name} needs the share that it keeps" if not setting else f"{setting!r} is not a share"
        _refuse(text, option, what, f"e.g. {name}:0.05 keeps one number in 20")
    if not KEEPING[name] <= share <= _MOST:
        what = f"{name} cannot keep a share of {setting}"
        _refuse(text, option, what, f"give 1/{1 / KEEPING[name]:.0f} = {KEEPING[name]:.6g} to {_MOST}")
    return share


def _rank(setting: str, text: str, option: str) -> int:
    """At most six digits: of a larger matrix, none of whose products is smaller, nobody has heard."""
    if setting.isascii() and setting.isdecimal() and len(setting) <= 6 and int(setting):
        return int(setting)
    what = f"{POWERSGD} needs the rank of what it sends" if not setting else f"{setting!r} is not a rank"
    _refuse(text, option, what, f"a whole number from 1 to 999999, e.g. {POWERSGD}:4")


def _refuse(text: str, option: str, what: str, fix: str) -> NoReturn:
    raise JobError(f"{option}={text!r}: {what}", fix=fix)
