"""The update: scaled gradients into an optimizer, over shards, on whichever rank or server holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from shoal.job.optim import OptimOptions
from shoal.mesh import Mesh
from shoal.optim.muon import Muon, is_hidden
from shoal.optim.schedule import learning_rate
from shoal.shard import Shard

_SLOTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",)}


class Update:
    """AdamW, or SGD with momentum, or Muon with AdamW for what is no matrix inside a block; decoupled weight decay on
    matrices. Its state is shards, too.

    shards, slots: of what is updated element by element. done: updates that the weights have had. since: those of them
    that this optimizer's state has not seen, since it began with nothing after them.
    """

    def __init__(self, shards: list[Shard], options: OptimOptions, steps: int, mesh: Mesh | None = None):
        """steps: length of the run, for `rate`. mesh: for Muon, of the ranks that have the rest of the shards'
        tensors, all of which call this and `apply`; None where nobody has any: the shards are whole."""
        self.options, self.steps = options, steps
        self.done = self.since = 0
        self.shards = [s for s in shards if s.local.numel()]
        self._muon: Muon | None = None
        if options.name == "muon":
            hidden = [s for s in self.shards if is_hidden(s)]
            self.shards = [s for s in self.shards if not is_hidden(s)]
            self._muon = Muon(hidden, options, shards[0].local, mesh)
        self._elementwise = "sgd" if options.name == "sgd" else "adamw"
        self.slots = {slot: [torch.zeros_like(s.local) for s in self.shards] for slot in _SLOTS[self._elementwise]}
        self._counts = [torch.zeros((), dtype=torch.float32, device=s.local.device) for s in self.shards]
        matrices = [i for i, s in enumerate(self.shards) if len(s.global_shape) > 1]
        vectors = [i for i, s in enumerate(self.shards) if len(s.global_shape) <= 1]
        # Norms and biases do not decay.
        self._groups = [(g, decay) for g, decay in ((matrices, options.weight_decay), (vectors, 0.0)) if g]

    def reschedule(self, options: OptimOptions, steps: int) -> None:
        """From now on the rates of another schedule."""
        self.options, self.steps = options, steps

    def rate(self, step: float) -> float:
        """Learning rate of the run's step `step`, 0 is the first: not of an update, of which a step may have had none,
        or with a server several."""
        return learning_rate(self.options, step, self.steps)

    @torch.no_grad()
    def apply(self, scale: float, lr: float) -> float:
        """One update from the shards' gradients times `scale` (which normalises and clips), at rate `lr`, which it
        returns."""
        for chosen, decay in self._groups:
            self._step(chosen, scale, lr, decay)
        if self._muon is not None:
            self._muon.apply(scale, lr)
        self.done += 1
        return lr

    def _step(self, chosen: list[int], scale: float, lr: float, decay: float) -> None:
        values = [self.shards[i].local for i in chosen]
        gradients = [g for i in chosen if (g := self.shards[i].grad) is not None]
        assert len(gradients) == len(values), "a parameter got no gradient"
        torch._foreach_mul_(gradients, scale)
        state = {slot: [tensors[i] for i in chosen] for slot, tensors in self.slots.items()}
        if self._elementwise == "adamw":
            beta1, beta2 = self.options.betas
            adamw(
                values, gradients, state["exp_avg"], state["exp_avg_sq"], [], [self._counts[i] for i in chosen],
                fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay,
                eps=self.options.eps, maximize=False,
            )  # fmt: skip
        else:
            torch._foreach_mul_(values, 1 - lr * decay)
            momentum: list[Tensor | None] = list(state["momentum"])
            sgd(
                values, gradients, momentum, foreach=True, weight_decay=0.0,
                momentum=self.options.momentum, lr=lr, dampening=0.0, nesterov=False, maximize=False,
            )  # fmt: skip

    def state(self) -> list[Shard]:
        """The optimizer's tensors: `<slot>.<parameter>`."""
        held = [(slot, self.shards, tensors) for slot, tensors in self.slots.items()]
        if self._muon is not None:
            held.append(("momentum", self._muon.shards, self._muon.momentum))
        return [
            Shard(
                f"{slot}.{shard.name}",
                shard.global_shape,
                shard.offsets,
                tensor,
                owner=shard.owner,
                counted=shard.counted,
            )
            for slot, shards, tensors in held
            for shard, tensor in zip(shards, tensors, strict=True)
        ]

    def values(self) -> dict[str, Any]:
        return counts(self.done, self.since)

    def restore(self, values: dict[str, Any]) -> None:
        """After the tensors of `state()` have been filled; those that an outer optimizer saved are none of them."""
        self.done, self.since = counted(values, anew=is_outer(values))
        for count in self._counts:
            count.fill_(self.done - self.since)


def counts(done: int, since: int, outer: bool = False) -> dict[str, Any]:
    """What an optimizer saves beside its tensors. outer: it moves weights by how far steps of another one took them."""
    return {"updates": done} | ({"since": since} if since else {}) | ({"outer": True} if outer else {})


def counted(values: dict[str, Any], anew: bool) -> tuple[int, int]:
    """(done, since) of what `counts` gave. anew: the optimizer's state begins with nothing."""
    done = int(values["updates"])
    return done, done if anew else int(values.get("since", 0))


def is_outer(values: dict[str, Any]) -> bool:
    """Whether what `counts` gave is of an outer optimizer."""
    return bool(values.get("outer", False))
