"""A TOML file: its tables, and the line on which one of its keys stands, which tomllib does not tell."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import JobError


@dataclass(frozen=True)
class Source:
    """path: named in errors. text: all of the file."""

    path: str
    text: str

    @classmethod
    def read(cls, path: str | Path, what: str) -> Source:
        """what: the file is, in the error of one that cannot be read."""
        try:
            return cls(str(path), Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise JobError(f"cannot read {what}: {reason}", where=str(path), fix="give a TOML file") from None

    def tables(self) -> dict[str, Any]:
        """JobError with the line where it is not TOML."""
        try:
            return tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            line = re.search(r"line (\d+)", str(error))
            where = f"{self.path}:{line[1]}" if line else f"{self.path}:{len(self.text.splitlines())}"
            fix = 'write `key = value`, and text in "quotes"'
            raise JobError(f"not valid TOML: {error}", where=where, fix=fix) from None

    def where(self, *keys: str) -> str:
        """`path:line` of a key: the first line without which the text before it does not hold that key."""
        lines = self.text.split("\n")
        start = 1
        for end in range(1, len(lines) + 1):
            try:
                value = tomllib.loads("\n".join(lines[:end]))
            except tomllib.TOMLDecodeError:
                continue  # the end of this value comes on a later line
            if _in(value, keys):
                break
            start = end + 1
        return f"{self.path}:{start}"

    def holds(self, *keys: str) -> bool:
        return _in(tomllib.loads(self.text), keys)

    @contextlib.contextmanager
    def at(self, *keys: str) -> Iterator[None]:
        """Errors raised inside are errors of that key's line."""
        try:
            yield
        except JobError as error:
            raise type(error)(error.what, where=self.where(*keys), fix=error.fix) from None


def _in(table: Any, keys: tuple[str, ...]) -> bool:
    for key in keys:
        table = table.get(key) if isinstance(table, dict) else None
    return table is not None
