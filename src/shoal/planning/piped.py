"""Pipelines of a search's candidates, simulated where their schedules have no exact closed form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from shoal.job.fits import SPLIT_BACKWARD
from shoal.planning import step, timeline
from shoal.planning.shapes import Shape
from shoal.planning.timeline import Seconds
from shoal.planning.work import Array

SIMULATED = SPLIT_BACKWARD
"""Schedules that compute gradients of weights apart: with stages as dear as each other one closed form tells of one of
them, and of the others about what it takes."""
# Of three products of the output layer one is forward, one is of the gradient of what it took, one of its weights'.
_PRODUCTS = 3
# Operations of schedules that are laid out for a search, each of which takes microseconds.
_OPERATIONS = 100_000


class Case(NamedTuple):
    """One schedule, of any number of candidates."""

    schedule: str
    ranks: int
    chunks: int
    micro_batches: int

    @property
    def few(self) -> Case:
        """What is laid out of it: a few micro-batches tell of more."""
        return self._replace(micro_batches=min(self.micro_batches, 3 * self.ranks))


def affordable(cases: list[Case]) -> Iterator[Case]:
    """Each once, in their order, of as many operations as a search has time for."""
    left, known = _OPERATIONS, set[Case]()
    for case in dict.fromkeys(cases):
        few = case.few
        # Forward, and backward in two; of as many micro-batches, and of one less for each rank.
        operations = 0 if few in known else 2 * 3 * few.micro_batches * few.ranks * few.chunks
        if operations <= left:
            left -= operations
            known.add(few)
            yield case


def seconds(case: Case, shape: Shape, passes: step.Passes, message: Array) -> tuple[Array, Array]:
    """From the first operation to the last, (n,); and if messages took no time. message: seconds, (n,)."""
    taken, messages = stages(shape, passes, case.ranks, case.chunks), np.concatenate([message, 0 * message])
    found = timeline.seconds(*case, Seconds(*(np.concatenate([part, part]) for part in taken)), messages)
    return found[: len(message)], found[len(message) :]


def stages(shape: Shape, passes: step.Passes, ranks: int, chunks: int) -> Seconds:
    """Of each of a pipeline's stages, (n, stages). All ranks have as many blocks, in equal stages, and the last stages
    what remains, as the prediction has it; the output layer is in the last. Gradients of inputs and of weights take
    equally long (as `step` has it of schedules that compute them apart)."""
    count = ranks * chunks
    begins = np.minimum(np.arange(count + 1) * (-(-shape.layers // ranks) / chunks), shape.layers)
    leading = np.minimum(begins, shape.dense_layers if shape.experts else 0)
    blocks, of_leading = np.diff(begins).astype(np.float64), np.diff(leading).astype(np.float64)
    last = np.arange(count) == count - 1
    head = last * (passes.head / _PRODUCTS)[:, None]

    def of(usual: Array, dense: Array) -> Array:
        found: Array = (blocks - of_leading) * usual[:, None] + of_leading * dense[:, None]
        return found

    backward = of(passes.backward, passes.leading_backward) / 2
    return Seconds(of(passes.forward, passes.leading_forward) + head, backward + head, backward + head)
