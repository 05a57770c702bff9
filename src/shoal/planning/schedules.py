"""In what order each rank of a pipeline computes, as `torch.distributed.pipelining` does it, and what it keeps.

A stage holds some consecutive blocks. With one stage a rank: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019,
PipeDream). In loops, rank r holding stages r, r + ranks, and so on: interleaved 1F1B (Narayanan et al. 2021), looped
breadth-first (Lamy-Poirier 2023), zero-bubble interleaved (Qi et al. 2024). Down and up a V: ZBV (Qi et al. 2024),
DualPipeV (DeepSeek-AI 2025).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from shoal.errors import LayoutError
from shoal.job.check import nearest
from shoal.job.layout import SCHEDULES

FORWARD, BACKWARD, INPUT, WEIGHT = range(4)
"""Kinds of operation. BACKWARD is INPUT (gradient of what the stage took) and WEIGHT (of its weights) in one."""

LOOPS = ("interleaved", "looped_bfs", "interleaved_zero_bubble")
V_SHAPED = ("zbv", "dualpipev")


class Operation(NamedTuple):
    kind: int
    stage: int
    micro_batch: int


Order = tuple[Operation, ...]


@lru_cache(maxsize=16)
def orders(schedule: str, ranks: int, chunks: int, micro_batches: int) -> tuple[Order, ...]:
    """Of each rank what it computes, one after another. chunks: stages of each rank.

    Raises LayoutError where the schedule cannot run so many chunks or micro-batches.
    """
    _check(schedule, ranks, chunks, micro_batches)
    if schedule in ("interleaved", "interleaved_zero_bubble"):
        return tuple(_rounds(schedule, ranks, chunks, micro_batches, rank) for rank in range(ranks))
    if schedule == "looped_bfs":
        return tuple(_breadth_first(ranks, chunks, micro_batches, rank) for rank in range(ranks))
    make: Callable[[int, int, int], Order]
    make = {"gpipe": _all_forward, "1f1b": _one_each, "zbv": _zbv, "dualpipev": _dualpipev}[schedule]
    return tuple(make(ranks, micro_batches, rank) for rank in range(ranks))


def home(schedule: str, ranks: int, chunks: int) -> tuple[int, ...]:
    """Of each stage, the rank that holds it."""
    stages = range(ranks * chunks)
    return tuple(min(s, 2 * ranks - 1 - s) if schedule in V_SHAPED else s % ranks for s in stages)


def live(schedule: str, ranks: int, chunks: int, micro_batches: int) -> tuple[int, ...]:
    """Of each rank the most activations that it holds at a time, counted in one stage's of one micro-batch: from the
    forward until the gradients of both input and weights are there."""
    found = []
    for order in orders(schedule, ranks, chunks, micro_batches):
        held = most = 0
        for operation in order:
            held += {FORWARD: 1, BACKWARD: -1, INPUT: 0, WEIGHT: -1}[operation.kind]
            most = max(most, held)
        found.append(most)
    return tuple(found)


def _check(schedule: str, ranks: int, chunks: int, micro_batches: int) -> None:
    if schedule not in SCHEDULES:
        raise LayoutError(f"schedule='{schedule}' is unknown", fix=nearest(schedule, SCHEDULES))
    least = {"1f1b": ranks, "dualpipev": 2 * ranks}.get(schedule, 1)
    if micro_batches < least:
        what = f"schedule={schedule} cannot run {micro_batches} micro-batches on {ranks} ranks"
        raise LayoutError(what, fix=f"{least} micro-batches or more, or schedule=gpipe")
    usual = SCHEDULES[schedule]
    if chunks != usual and (chunks < usual or schedule not in LOOPS):
        what = f"schedule={schedule} cannot run {chunks} stages on each rank"
        raise LayoutError(what, fix=f"{usual}{' or more' if schedule in LOOPS else ''} on each rank")


def _all_forward(ranks: int, micro_batches: int, rank: int) -> Order:
    forwards = [Operation(FORWARD, rank, m) for m in range(micro_batches)]
    return (*forwards, *(Operation(BACKWARD, rank, m) for m in range(micro_batches)))


def _one_each(ranks: int, micro_batches: int, rank: int) -> Order:
    forwards = [Operation(FORWARD, rank, m) for m in range(micro_batches)]
    backwards = [Operation(BACKWARD, rank, m) for m in range(micro_batches)]
    return tuple(_alternated(forwards, backwards, ranks - 1 - rank))


def _alternated(forwards: list[Operation], backwards: list[Operation], ahead: int) -> Iterator[Operation]:
    """`ahead` forwards, then one forward and one backward, then the backwards that are left."""
    yield from forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        yield from (forward, backward)
    yield from backwards[max(0, len(forwards) - ahead) :]


def _breadth_first(ranks: int, chunks: int, micro_batches: int, rank: int) -> Order:
    stages = range(rank, ranks * chunks, ranks)
    forwards = [Operation(FORWARD, stage, m) for stage in stages for m in range(micro_batches)]
    # Exactly turned round: the last micro-batch first.
    return (*forwards, *(Operation(BACKWARD, one.stage, one.micro_batch) for one in reversed(forwards)))


def _rounds(schedule: str, ranks: int, chunks: int, micro_batches: int, rank: int) -> Order:
    """A round of micro-batches goes through all of a rank's stages before the next one."""
    rounds = max(1, micro_batches // ranks)
    if micro_batches % rounds:
        what = f"schedule={schedule} cannot run {micro_batches} micro-batches on {ranks} ranks in rounds"
        raise LayoutError(what, fix=f"a multiple of {ranks} micro-batches, or schedule=gpipe")
    each = micro_batches // rounds
    split = schedule == "interleaved_zero_bubble"

    def of(kind: int, chunks_in_turn: range) -> list[Operation]:
        turns = [(r, chunk, i) for r in range(rounds) for chunk in chunks_in_turn for i in range(each)]
        return [Operation(kind, chunk * ranks + rank, r * each + i) for r, chunk, i in turns]

    forwards = of(FORWARD, range(chunks))
    backwards = of(INPUT if split else BACKWARD, range(chunks - 1, -1, -1))
    ahead = min((chunks - 1) * each + (1 if split else 2) * (ranks - 1 - rank), len(forwards))
    if not split:
        return tuple(_alternated(forwards, backwards, ahead))
    return tuple(_weights_later(_alternated(forwards, backwards, ahead), rank))


def _weights_later(operations: Iterator[Operation], behind: int) -> Iterator[Operation]:
    """The weights' gradients follow so many others behind, so that nobody waits for them."""
    owed: deque[Operation] = deque()
    for one in operations:
        yield one
        if one.kind == INPUT:
            owed.append(one._replace(kind=WEIGHT))
            if len(owed) > behind:
                yield owed.popleft()
    yield from owed


class _Turns:
    """Takes down a rank's operations: each stage's micro-batches in their order."""

    def __init__(self) -> None:
        self.done: list[Operation] = []
        self._owed: list[Operation] = []
        self.count: Counter[tuple[int, int]] = Counter()
        """(kind, stage) -> micro-batches. BACKWARD counts as INPUT."""

    def add(self, stage: int, *kinds: int) -> None:
        for kind in kinds:
            counted = (INPUT if kind == BACKWARD else kind, stage)
            self.done.append(Operation(kind, stage, self.count[counted]))
            self.count[counted] += 1
            if kind == INPUT:
                self._owed.append(self.done[-1]._replace(kind=WEIGHT))

    def weights(self, *stages: int) -> bool:
        """The oldest gradient of weights that these stages still owe; False where they owe none."""
        for at, one in enumerate(self._owed):
            if one.stage in stages:
                self.done.append(self._owed.pop(at))
                return True
        return False

    def backward_apart(self, stage: int) -> None:
        self.add(stage, INPUT)
        self.weights(stage)


def _zbv(ranks: int, micro_batches: int, rank: int) -> Order:
    down, up, turns = rank, 2 * ranks - 1 - rank, _Turns()
    # As for so many as fill the pipeline, of which those that there are not are left out.
    planned = max(2 * ranks - 1, micro_batches)
    for _ in range(2 * (ranks - rank) - 1):
        turns.add(down, FORWARD)
    for _ in range(rank):
        turns.add(up, FORWARD)
        turns.add(down, FORWARD)
    for _ in range(ranks - rank):
        turns.add(up, FORWARD)
        turns.backward_apart(up)
    while turns.count[FORWARD, up] < planned:
        if turns.count[FORWARD, down] < planned:
            turns.add(down, FORWARD)
        turns.backward_apart(down)
        turns.add(up, FORWARD)
        turns.backward_apart(up)
    for _ in range(rank):
        turns.add(down, INPUT)
        turns.add(up, INPUT)
    for _ in range(ranks - rank):
        turns.backward_apart(down)
    while turns.weights(up) or turns.weights(down):
        pass
    return tuple(one for one in turns.done if one.micro_batch < micro_batches)


def _dualpipev(ranks: int, micro_batches: int, rank: int) -> Order:
    """PyTorch computes a forward and the backward that overlaps it one after the other: so does this."""
    down, up, turns = rank, 2 * ranks - 1 - rank, _Turns()
    later = ranks - rank - 1
    for _ in range(2 * later):
        turns.add(down, FORWARD)
    for _ in range(rank + 1):
        turns.add(down, FORWARD)
        turns.add(up, FORWARD)
    for _ in range(later):
        turns.backward_apart(up)
        turns.add(up, FORWARD)
    for _ in range(micro_batches - 2 * ranks + rank + 1):
        turns.add(down, FORWARD)
        turns.add(up, BACKWARD, FORWARD)
        turns.add(down, BACKWARD)
    for _ in range(later):
        turns.add(up, BACKWARD, FORWARD)
        turns.add(down, BACKWARD)
    # The second half with weights apart, to fill the gaps of draining; on odd ranks from the stage that goes up on.
    for turn in range(2 * (rank + 1)):
        apart = turn >= 2 * ((rank + 1) // 2) + (1 - rank % 2)
        turns.add(down if turn % 2 else up, INPUT if apart else BACKWARD)
    for _ in range(later):
        turns.weights(down, up)
        turns.add(down, INPUT)
    while turns.weights(down, up):
        pass
    return tuple(turns.done)
