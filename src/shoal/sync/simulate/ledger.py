"""A problem without numbers: every gradient is its own name, so that weights are the list of what was applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.sync.server.messages import Apply, Key, Piece, Range, Square
from shoal.sync.server.worker import Pushed

# Which process (by nonce) computed a gradient, for which push.
Token = tuple[int, Key]

_PIECE = (Piece("applied", (0,), (1,)),)


class Ledger:
    """In the place of a shard's parameters: what each commit applied here, in order; and, where a gradient's delay is
    compensated, how many commits were in the weights that it was measured from (−1 = in none)."""

    def __init__(self) -> None:
        self.applied: list[tuple[Token, ...]] = []
        self.measured: list[int] = []

    def blank(self) -> list[Token]:
        return []

    def put(self, into: list[Token], pieces: Sequence[Piece], tensors: Sequence[Any], encoded: bool = False) -> None:
        into += tensors

    def squares(self, gradient: list[Token]) -> tuple[Square, ...]:
        return (Square("applied", 0, float(len(gradient))),)

    def total(self, gradients: Sequence[list[Token]]) -> list[Token]:
        return [token for gradient in gradients for token in gradient]

    def apply(self, gradient: list[Token], order: Apply, pulled: Any) -> None:
        self.applied.append(tuple(gradient))
        self.measured.append(-1 if pulled is None else pulled[0])

    def freeze(self) -> tuple[int]:
        """Weights: how many commits are in them."""
        return (len(self.applied),)

    def live(self) -> tuple[int]:
        return self.freeze()

    def whole(self) -> tuple[tuple[Piece, ...], bytes, tuple[Any, ...]]:
        return _PIECE * 2, b"", (list(self.applied), list(self.measured))

    def fill(self, values: bytes, tensors: Sequence[Any]) -> None:
        self.applied, self.measured = list(tensors[0]), list(tensors[1])

    def pieces(self) -> tuple[Piece, ...]:
        return _PIECE

    def places(self, pieces: Sequence[Piece]) -> tuple[int, ...]:
        return (0,)

    def cut(self, weights: Sequence[int], pieces: Sequence[Piece]) -> tuple[int, ...]:
        return tuple(weights)


class Ledgers:
    """The `Problem` of shards that are ledgers."""

    def held(self, shard: int) -> Ledger:
        return Ledger()

    def rate(self, samples: int) -> float:
        return 1.0

    def copy(self, tensors: Sequence[Any]) -> Sequence[Any]:
        return tensors

    def gradient(
        self, pulled: Mapping[int, Sequence[Any]], samples: Range, token: Token
    ) -> tuple[Mapping[int, Pushed], float, float]:
        return dict.fromkeys(pulled, Pushed(_PIECE, (token,))), float(samples.stop - samples.start), 0.0
