"""Gradients of a whole replica on one rank, gathered into flat buckets while backward still runs.

The plan (which parameter lies where in which bucket) is fixed when it is built and never changes, so every
rank hands over the same bytes in the same order, run after run: bitwise resume depends on it. (Torch's DDP
rebuilds its buckets after the first step, so a resumed run sums in another order than the one it continues.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from shoal.parallel.flat import Flat

# The first bucket is small, so that communication starts early; the same choice as DDP's.
_FIRST_BYTES = 1 << 20


class Bucket:
    """Some parameters' gradients side by side in one flat tensor."""

    def __init__(self, parameters: list[Parameter]):
        self.parameters = parameters
        self.place = Flat([(p, p.numel(), p.numel()) for p in parameters])
        first = parameters[0]
        self.flat = torch.zeros(self.place.size, dtype=first.dtype, device=first.device)
        pieces = self.flat.split([p.numel() for p in parameters])
        self.views = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        self.missing = 0


class Buckets:
    """Calls `on_bucket(flat, place)` for each bucket, in a fixed order, as soon as its last gradient exists."""

    def __init__(self, parameters: list[Parameter], capacity_bytes: int, on_bucket: Callable[[Tensor, Flat], None]):
        """parameters: in the order of the forward pass; backward makes their gradients roughly in reverse."""
        self.on_bucket = on_bucket
        self.buckets = [Bucket(group) for group in _plan(parameters[::-1], capacity_bytes)]
        self._next = 0
        self._awaited: dict[Tensor, int] = {}
        for index, bucket in enumerate(self.buckets):
            for place, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(index, place))

    def _hook(self, index: int, place: int) -> Callable[[Tensor], None]:
        # Weak: torch's C++ holds a parameter's hooks where Python's collector does not look, and what they hold would
        # never be freed: the model, its groups of ranks and their threads.
        this = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            buckets = this()
            if buckets is not None:
                buckets._arrived(parameter, buckets.buckets[index], place)

        return hook

    def _arrived(self, parameter: Tensor, bucket: Bucket, place: int) -> None:
        self._awaited[parameter] = self._awaited.get(parameter, 0) - 1
        if self._awaited[parameter] == 0:
            # Copied once, on the last micro-batch: cheaper than accumulating into zeroed views throughout.
            assert parameter.grad is not None
            view = bucket.views[place]
            view.copy_(parameter.grad)
            parameter.grad = view
            bucket.missing -= 1
            self._launch(force=False)

    def _launch(self, force: bool) -> None:
        """Hands over every bucket that is complete, but none before the ones ahead of it."""
        while self._next < len(self.buckets) and (force or self.buckets[self._next].missing == 0):
            bucket = self.buckets[self._next]
            self.on_bucket(bucket.flat, bucket.place)
            self._next += 1

    @contextmanager
    def backwards(self, micro_batches: int) -> Iterator[None]:
        """For the backward passes of so many micro-batches: buckets go out during the last one of each parameter.

        Parameters that some passes left out go out at the end; those without a gradient count as zero.
        """
        self._next = 0
        self._awaited = {p: micro_batches for bucket in self.buckets for p in bucket.parameters}
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)
        yield
        for bucket in self.buckets[self._next :]:
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                if parameter.grad is not view:
                    view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                    parameter.grad = view
        self._launch(force=True)


def _plan(parameters: list[Parameter], capacity_bytes: int) -> list[list[Parameter]]:
    """Neighbours share a bucket until it is full; a bucket has one dtype."""
    plan: list[list[Parameter]] = []
    room = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if not plan or size > room or parameter.dtype != plan[-1][0].dtype:
            plan.append([])
            room = min(_FIRST_BYTES, capacity_bytes) if len(plan) == 1 else capacity_bytes
        plan[-1].append(parameter)
        room -= size
    return plan
