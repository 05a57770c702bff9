"""How much text there is: in a split of a corpus, or in what was appended to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Counts:
    """What a split holds. bytes: of its clean text in UTF-8. replaced: invalid byte sequences that are U+FFFD
    now.
    """

    files: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    replaced: int = 0

    @property
    def predictions(self) -> int:
        """Tokens that are predicted, and weigh in the loss, once an epoch: all but the first of each
        document.
        """
        return self.tokens - self.documents


def total(parts: Iterable[Counts]) -> Counts:
    """The sum of all, field by field."""
    parts = list(parts)
    return Counts(*(sum(getattr(part, field.name) for part in parts) for field in fields(Counts)))
