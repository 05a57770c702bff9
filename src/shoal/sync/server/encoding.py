"""What one rank of a worker pushes, in the bytes of a codec; what that loses goes along with the next push.

With gradient g of w valid tokens and residual e, a rank pushes C(g + a e) and keeps e ← g + a e − C(g + a e) (error
feedback: Seide et al. 2014, "1-Bit Stochastic Gradient Descent", section 3; Karimireddy et al. 2019, "Error Feedback
Fixes SignSGD and other Gradient Compression Schemes", algorithm 1), but only once the push is accepted.

Gradients, and with them residuals, are sums over tokens. Where an update is the sum of all workers' pushes, divided by
all their tokens (bsp, quorum), a = 1: as in an all-reduce, a token's gradient weighs as much as those of the update
with which it arrives (`shoal.sync.feedback`). Where each push is an update of its own, divided by its own w (asp, ssp),
a = w / w′, w′ of the push in which e was lost: the papers' e has the unit of an update, and of a worker that computes
fewer micro-batches after a rejection the residual of a large push would be divided by the tokens of a small one.

When there is nothing more to compute, what is left goes as it is (the rest): e itself, of w′ tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.sync.codec import Draws, codec_of
from shoal.sync.server.messages import Piece
from shoal.sync.server.payload import from_bytes, to_bytes
from shoal.sync.server.rules import Rules
from shoal.sync.server.worker import Pushed


class Encoder:
    """One for each rank of a worker, for as long as its process lives.

    For each push `encode` or `rest` once, and `settle` when it is answered or the worker is fenced. Of a fenced worker
    whose last push was committed without its knowing, one residual is pushed twice, and what that push lost not at
    all. Memory: the rank's pieces once,
    twice between `encode` and `settle`.
    """

    def __init__(self, rules: Rules, *, seed: int = 0, worker: int = 0, part: int = 0):
        """seed, worker, part: of what a codec draws at random, together with the clock. part: of the worker's ranks."""
        self.draws = Draws(seed, worker << 20 | part)
        self.codec = codec_of(rules.codec, self.draws)
        self.feedback, self.rescaled = rules.feedback, not rules.rounds
        self._kept: dict[Piece, Tensor] = {}
        self._pieces: dict[int, tuple[Piece, ...]] = {}
        self._weight = 0.0
        self._after: tuple[dict[Piece, Tensor], float] | None = None

    @property
    def owed(self) -> bool:
        """Whether something has been lost that was not pushed yet."""
        return bool(self._kept)

    @torch.no_grad()
    def encode(self, gradients: Mapping[int, Pushed], weight: float, clock: int) -> dict[int, Pushed]:
        """What travels in place of `gradients`, for each shard; always of the same pieces. They stay as they are.

        weight: valid tokens of the worker's whole gradient. clock: of the push.
        """
        assert self._after is None, "the push before has not been settled"
        pieces = {shard: pushed.pieces for shard, pushed in gradients.items()}
        assert not self._pieces or self._pieces == pieces, "every push has the same pieces"
        self._pieces = pieces
        self.draws.at(clock)
        share = weight / self._weight if self.rescaled and self._weight else 1.0
        lost: dict[Piece, Tensor] = {}
        found = {}
        for shard, pushed in sorted(gradients.items()):
            tensors = tuple(
                self._one(piece, tensor, share, lost)
                for piece, tensor in zip(pushed.pieces, pushed.tensors, strict=True)
            )
            found[shard] = Pushed(pushed.pieces, tensors, encoded=True)
        self._after = lost, weight
        return found

    def rest(self) -> tuple[dict[int, Pushed], float]:
        """All that is kept, as it is, and the weight of the push in which it was lost. Accepted, it is owed no more."""
        assert self._after is None, "the push before has not been settled"
        self._after = {}, self._weight
        pushed = {
            shard: Pushed(pieces, tuple(self._kept[piece] for piece in pieces))
            for shard, pieces in self._pieces.items()
        }
        return pushed, self._weight

    def _one(self, piece: Piece, gradient: Tensor, share: float, lost: dict[Piece, Tensor]) -> Tensor:
        kept = self._kept.get(piece)
        whole = gradient if kept is None else gradient.add(kept, alpha=share)
        payload = to_bytes(self.codec, whole)
        if self.feedback:
            lost[piece] = whole - from_bytes(self.codec, payload, piece, whole.dtype)
        return payload

    def settle(self, accepted: bool) -> None:
        """What the last push lost counts from now on, or, where it was rejected or fenced, never has been."""
        if accepted and self._after is not None:
            self._kept, self._weight = self._after
        self._after = None
