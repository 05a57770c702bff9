"""What one rank of a worker pushes, in the bytes of a codec; what that loses goes along with the next push.

With gradient g of w valid tokens and residual e, a rank pushes C(g + a e) and keeps e ← g + a e − C(g + a e) (error
feedback: Seide et al. 2014, "1-Bit Stochastic Gradient Descent", section 3; Karimireddy et al. 2019, "Error Feedback
Fixes SignSGD and other Gradient Compression Schemes", algorithm 1), but only once the push is accepted.

Gradients, and with them residuals, are sums over tokens. Where an update is the sum of all workers' pushes, divided by
all their tokens (bsp, quorum), a = 1: as in an all-reduce, a token's gradient weighs as much as those of the update
with which it arrives (`shoal.sync.feedback`). Where each push is an update of its own, divided by its own w (asp, ssp),
a = w / w′, w′ of the push in which e was lost: the papers' e has the unit of an update, and of a worker that computes
fewer micro-batches after a rejection the residual of a large push would be divided by the tokens of a small one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.shard import Shard, State
from shoal.sync.codec import Draws, codec_of
from shoal.sync.server.messages import Piece
from shoal.sync.server.payload import from_bytes, to_bytes
from shoal.sync.server.rules import Rules
from shoal.sync.server.worker import Pushed


class Encoder:
    """One for each rank of a worker, for as long as its process lives.

    For each push `encode` once, and `settle` when it is answered or the worker is fenced. Of a fenced worker whose last
    push was committed without its knowing, one residual is pushed twice. Memory: the rank's pieces once, twice
    between `encode` and `settle`.
    """

    def __init__(self, rules: Rules, *, seed: int = 0, worker: int = 0, part: int = 0, feedback: bool = True):
        """seed, worker, part: of what a codec draws at random, together with the clock. part: of the worker's ranks."""
        self.draws = Draws(seed, worker << 20 | part)
        self.codec = codec_of(rules.codec, self.draws)
        self.worker, self.feedback, self.rescaled = worker, feedback, not rules.rounds
        self._kept: dict[Piece, Tensor] = {}
        self._weight = 0.0
        self._after: tuple[dict[Piece, Tensor], float] | None = None

    @property
    def owed(self) -> bool:
        """Whether something has been lost that was not pushed yet: before it leaves, a worker makes one plain push."""
        return bool(self._kept)

    @torch.no_grad()
    def encode(
        self, gradients: Mapping[int, Pushed], weight: float, clock: int, *, plain: bool = False
    ) -> dict[int, Pushed]:
        """What travels in place of `gradients`, for each shard; always of the same pieces. They stay as they are.

        weight: valid tokens of the worker's whole gradient. clock: of the push. plain: not encoded, so that nothing is
        owed afterwards.
        """
        assert self._after is None, "the push before has not been settled"
        pieces = {piece for pushed in gradients.values() for piece in pushed.pieces}
        assert not self._kept or self._kept.keys() == pieces, "every push has the same pieces"
        self.draws.at(clock)
        share = weight / self._weight if self.rescaled and self._weight else 1.0
        lost: dict[Piece, Tensor] = {}
        found = {}
        for shard, pushed in sorted(gradients.items()):
            tensors = tuple(
                self._one(piece, tensor, share, plain, lost)
                for piece, tensor in zip(pushed.pieces, pushed.tensors, strict=True)
            )
            found[shard] = Pushed(pushed.pieces, tensors, encoded=not plain)
        self._after = lost, weight
        return found

    def _one(self, piece: Piece, gradient: Tensor, share: float, plain: bool, lost: dict[Piece, Tensor]) -> Tensor:
        kept = self._kept.get(piece)
        whole = gradient if kept is None else gradient.add(kept, alpha=share)
        if plain:
            return whole
        payload = to_bytes(self.codec, whole)
        if self.feedback:
            lost[piece] = whole - from_bytes(self.codec, payload, piece, whole.dtype)
        return payload

    def settle(self, accepted: bool) -> None:
        """What the last push lost counts from now on, or, where it was rejected or fenced, never has been."""
        if accepted and self._after is not None:
            self._kept, self._weight = self._after
        self._after = None

    def state(self, shapes: Mapping[str, Sequence[int]]) -> State:
        """`residual@<worker>.<parameter>`, as replicas name theirs; without what is not answered yet.

        shapes: of whole parameters.
        """
        return State(self._shards(shapes), {"residual_weight": self._weight})

    def wanted(self, pieces: Sequence[Piece], shapes: Mapping[str, Sequence[int]]) -> list[Shard]:
        """Zeros to be filled from a checkpoint, of the pieces that this rank will push; then `restore`."""
        self._kept = {piece: torch.zeros(piece.shape) for piece in pieces}
        return self._shards(shapes)

    def restore(self, values: Mapping[str, Any]) -> None:
        """After the tensors of `wanted` have been filled."""
        self._weight = float(values["residual_weight"])

    def _shards(self, shapes: Mapping[str, Sequence[int]]) -> list[Shard]:
        return [
            Shard(f"residual@{self.worker}.{piece.name}", tuple(shapes[piece.name]), piece.offsets, tensor)
            for piece, tensor in self._kept.items()
        ]
