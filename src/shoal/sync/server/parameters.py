"""The parameters of one server shard as tensors: master weights, optimizer state, staged gradients."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from shoal.errors import JobError
from shoal.job.optim import OptimOptions
from shoal.optim.norm import sum_of_squares
from shoal.optim.update import Update
from shoal.shard import Shard, State
from shoal.sync.codec import codec_of
from shoal.sync.server.messages import Apply, Piece, Square
from shoal.sync.server.payload import from_bytes
from shoal.sync.server.pieces import cut, lies_in
from shoal.sync.server.placement import Block
from shoal.sync.server.rules import Rules
from shoal.sync.server.staleness import DelayedNesterov, delay_compensated, look_ahead, optimizer

Gradient = list[Tensor]


class Parameters:
    """Blocks of parameters in fp32 (or fp64, in tests), with the optimizer that runs here and nowhere else.

    A Gradient has one tensor a block, in the order of `shards`, which is that of names and rows; of what is fixed it
    stays zero.
    """

    def __init__(
        self, shards: Sequence[Shard], rules: Rules, options: OptimOptions, steps: int, fixed: Sequence[Shard] = ()
    ):
        """shards: as `blocks` makes them. steps: of the whole run, for the optimizer's own schedule, unused here.

        fixed: what no gradient reaches: held, given away and saved as it is.
        """
        self.shards = sorted([*shards, *fixed], key=lambda s: (s.name, s.offsets))
        self._fixed = {shard.name for shard in fixed}
        if empty := [shard.name for shard in self.shards if not shard.local.numel()]:
            raise JobError(f"parameter {empty[0]} has no elements", fix="leave it out of the model")
        self.rules = rules
        self.codec = codec_of(rules.codec) if rules.codec != "none" else None
        self.optimizer: Update | DelayedNesterov = optimizer(
            rules, [shard for shard in self.shards if shard.name not in self._fixed], options, steps
        )
        self.lr = 0.0
        self._place: dict[str, list[int]] = {}
        for i, shard in enumerate(self.shards):
            self._place.setdefault(shard.name, []).append(i)

    def blank(self) -> Gradient:
        return [torch.zeros_like(shard.local) for shard in self.shards]

    def put(self, into: Gradient, pieces: Sequence[Piece], tensors: Sequence[Tensor], encoded: bool = False) -> None:
        """Copies what one rank pushed, each piece to where it belongs. encoded: the tensors are the codec's bytes."""
        for piece, tensor in zip(pieces, tensors, strict=True):
            i = self._holding(piece)
            if encoded:
                tensor = self._decoded(tensor, piece, into[i].dtype)
            cut(into[i], self.shards[i].offsets, piece).copy_(tensor)

    def _decoded(self, payload: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
        if self.codec is None:
            raise JobError(
                f"{piece.name} came encoded, and the job has no codec",
                fix="start all workers and servers from the same job.toml",
            )
        return from_bytes(self.codec, payload, piece, dtype)

    def squares(self, gradient: Gradient) -> tuple[Square, ...]:
        """Of each block."""
        found = []
        for shard, part in zip(self.shards, gradient, strict=True):
            whole = Shard(shard.name, shard.global_shape, shard.offsets, shard.local, part)
            row = shard.offsets[0] if shard.offsets else 0
            found.append(Square(shard.name, row, sum_of_squares([whole]).item()))
        return tuple(found)

    def total(self, gradients: Sequence[Gradient]) -> Gradient:
        """Their sum, added up in this order: ((first + second) + third) + …"""
        summed = [part.clone() for part in gradients[0]]
        for gradient in gradients[1:]:
            torch._foreach_add_(summed, gradient)
        return summed

    @torch.no_grad()
    def apply(self, gradient: Gradient, order: Apply, pulled: Gradient | None) -> None:
        """One commit. gradient: overwritten. pulled: the weights that it was computed from, where that matters."""
        scale = order.scale
        if pulled is not None and order.staleness:
            torch._foreach_mul_(gradient, scale)
            for part, shard, old in zip(gradient, self.shards, pulled, strict=True):
                delay_compensated(part, shard.local, old, self.rules.power)
            scale = 1.0
        for shard, part in zip(self.shards, gradient, strict=True):
            shard.grad = part
        self.lr = self.optimizer.apply(scale, order.lr)
        for shard in self.shards:
            shard.grad = None

    @torch.no_grad()
    def freeze(self) -> Gradient:
        """The weights that workers compute on, in tensors that nobody changes any more."""
        if self.rules.compensation == "look-ahead":
            assert isinstance(self.optimizer, Update)
            ahead = iter(look_ahead(self.optimizer, self.rules.workers - 1, self.lr))
            return [shard.local.clone() if shard.name in self._fixed else next(ahead) for shard in self.shards]
        return self.master()

    def master(self) -> Gradient:
        """The weights that updates move, in tensors of their own."""
        return [shard.local.clone() for shard in self.shards]

    def live(self) -> Gradient:
        """The weights themselves, that the next update changes in place."""
        return [shard.local for shard in self.shards]

    def pieces(self) -> tuple[Piece, ...]:
        """All that this shard holds."""
        return tuple(Piece(s.name, tuple(s.offsets), tuple(s.local.shape)) for s in self.shards)

    def cut(self, weights: Gradient, pieces: Sequence[Piece]) -> tuple[Tensor, ...]:
        """Views of `weights`, for a pull."""
        found = [(self._holding(piece), piece) for piece in pieces]
        return tuple(cut(weights[i], self.shards[i].offsets, piece) for i, piece in found)

    def places(self, pieces: Sequence[Piece]) -> tuple[int, ...]:
        """Which of the blocks these pieces lie in, in order, each once."""
        return tuple(sorted({self._holding(piece) for piece in pieces}))

    def whole(self) -> tuple[tuple[Piece, ...], bytes, tuple[Tensor, ...]]:
        """All that is held here, in tensors of their own: what it is, the optimizer's values, the tensors."""
        state = self.state()
        pieces = tuple(Piece(s.name, tuple(s.offsets), tuple(s.local.shape)) for s in state.shards)
        return pieces, msgspec.json.encode(state.values), tuple(shard.local.clone() for shard in state.shards)

    @torch.no_grad()
    def fill(self, values: bytes, tensors: Sequence[Tensor]) -> None:
        """What `whole` gave elsewhere."""
        for shard, tensor in zip(self.state().shards, tensors, strict=True):
            shard.local.copy_(tensor)
        self.restored(State([], msgspec.json.decode(values)))

    def state(self) -> State:
        """Weights and optimizer, for a checkpoint."""
        return State([*self.shards, *self.optimizer.state()], {**self.optimizer.values(), "lr": self.lr})

    def restored(self, state: State) -> None:
        """After the tensors of `state()` have been filled."""
        self.optimizer.restore(state.values)
        self.lr = float(state.values["lr"])

    def _holding(self, piece: Piece) -> int:
        for i in self._place.get(piece.name, ()):
            shard = self.shards[i]
            if lies_in(piece, shard.offsets, shard.local.shape):
                return i
        raise JobError(
            f"{piece.name} {list(piece.offsets)} + {list(piece.shape)} is not on this shard",
            fix="start all workers and servers from the same job.toml",
        )


def blocks(values: dict[str, Tensor], held: Sequence[Block]) -> list[Shard]:
    """What one server shard holds, copied out of whole parameters.

    values: canonical name → whole tensor; its dtype becomes that of the master weights.
    """
    found = []
    for block in held:
        whole = values[block.name].detach()
        part = whole[block.start : block.stop] if whole.dim() else whole
        offsets = (block.start, *[0] * (whole.dim() - 1)) if whole.dim() else ()
        found.append(Shard(block.name, tuple(whole.shape), offsets, part.clone()))
    return found
