"""What a server shard serves instead of its weights where a codec is used: a copy that moves by encoded steps.

w_v: the weights at version v; w̃: the shadow, which every worker that is up to date holds, bit for bit. When version v
is first pulled after version u, the shard makes d = C(w_v − w̃_u) and w̃_v = w̃_u + d. What the codec loses of a step
stays in w_v − w̃_v, and so is in the next step: error feedback without a residual of its own (the server's side of Tang
et al. 2019, "DoubleSqueeze", algorithm 1; a copy that both sides move by the same compressed differences: Mishchenko
et al. 2019, "Distributed Learning with Compressed Gradient Differences"). For a codec with ‖x − C(x)‖ ≤ q ‖x‖ the
shadow is never further from the weights than q / (1 − q) times the longest way they went between two pulled versions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.sync.codec import Draws, codec_of
from shoal.sync.server.held import Held
from shoal.sync.server.messages import Chain, Piece
from shoal.sync.server.payload import from_bytes, to_bytes


class Delta(NamedTuple):
    """From w̃ of `base` to w̃ of `version`. payloads: of each block of the shard, in its order."""

    base: int
    version: int
    payloads: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(payload.numel() for payload in self.payloads)


class Served(NamedTuple):
    """As in `Pulled`. base −1: not encoded. tensors: else of each delta in order those of all `pieces`."""

    pieces: tuple[Piece, ...]
    base: int
    links: tuple[int, ...]
    tensors: tuple[Tensor, ...]


class Shadow:
    """The shadow of one copy of a shard: the last two versions of it that were pulled, and the last steps.

    Other copies of the shard, and this one after a crash, see other pulls and have other shadows: each is its own
    `chain`, and whoever comes from another one pulls dense. Memory: two copies of the weights, and of deltas at most
    one more. No tensor is changed once it has been served.
    """

    def __init__(self, codec: str, chain: Chain, *, seed: int = 0, shard: int = 0, most: int = 16):
        """chain: (copy of the shard, a number drawn by its process). seed, shard: of what the codec draws at random.

        most: deltas that are kept.
        """
        self.chain, self.most = chain, most
        # Workers draw by numbers from 0 on.
        self.draws = Draws(seed, -1 - shard)
        self.codec = codec_of(codec, self.draws)
        self.forget()

    def forget(self, chain: Chain | None = None) -> None:
        """Begins anew, in a copy as another chain: the next pull is dense."""
        self.chain = chain or self.chain
        self.version = -1
        self._dense: dict[int, Sequence[Tensor]] = {}
        self._deltas: deque[Delta] = deque()

    @torch.no_grad()
    def reach(self, version: int, weights: Sequence[Tensor], blocks: Sequence[Piece]) -> None:
        """Makes the step to `version`. weights: of it, one tensor for each block; they will not change any more."""
        assert version > self.version
        if not self._dense:
            self.version, self._dense = version, {version: weights}
            return
        payloads, moved = [], []
        for block, value, shadow in zip(blocks, weights, self._dense[self.version], strict=True):
            payloads.append(to_bytes(self.codec, value - shadow))
            moved.append(shadow + from_bytes(self.codec, payloads[-1], block, value.dtype))
        self._deltas.append(Delta(self.version, version, tuple(payloads)))
        self._dense = {self.version: self._dense[self.version], version: moved}
        self.version = version
        most = sum(value.numel() * value.element_size() for value in moved)
        while len(self._deltas) > self.most or sum(delta.bytes for delta in self._deltas) > most:
            self._deltas.popleft()

    def serve(self, held: Held, pieces: Sequence[Piece], base: int, version: int) -> Served | None:
        """For a worker that holds w̃ of `base` (−1: of nothing) and asks for pieces of `version`: deltas, or all numbers
        where that is less. None where the shadow was never at this version, or is past it for good.

        A delta is of a whole block: a rank that has a part of one gets all of it, and cuts when it has decoded.
        """
        dense, deltas = self._dense.get(version), self.since(base, version)
        whole = held.cut(dense, pieces) if dense is not None else ()
        if deltas is not None:
            blocks, places = held.pieces(), held.places(pieces)
            tensors = tuple(delta.payloads[place] for delta in deltas for place in places)
            if dense is None or _bytes(tensors) < _bytes(whole):
                links = tuple(delta.version for delta in deltas)
                return Served(tuple(blocks[place] for place in places), base, links, tensors)
        return Served(tuple(pieces), -1, (), whole) if dense is not None else None

    def since(self, base: int, version: int) -> list[Delta] | None:
        """The steps from one version to another; none at all where they are the same."""
        if base == version:
            return []
        starts = [i for i, delta in enumerate(self._deltas) if delta.base == base]
        ends = [i for i, delta in enumerate(self._deltas) if delta.version == version]
        return list(islice(self._deltas, starts[0], ends[0] + 1)) if starts and ends and base < version else None


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
