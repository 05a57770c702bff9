"""Programs of several ranks in one process, of which one runs at a time, each with a clock of simulated seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Given(BaseException):
    """Ends a program because another one has failed."""


class Turns(Generic[T]):
    """Whoever can go on and whose clock is furthest behind goes on, so the order is the same in every run.

    A program is ordinary code in a thread of its own, that gives its turn away where it computes or waits.
    now: each rank's clock. waited: seconds of it for which the rank waited.
    """

    def __init__(self, ranks: int):
        self.now, self.waited = [0.0] * ranks, [0.0] * ranks
        self._ready: dict[int, Callable[[], bool]] = {}
        self._changed = threading.Condition()
        self._turn = -1
        self._failed: BaseException | None = None
        self._results: dict[int, T] = {}

    def run(self, program: Callable[[int], T]) -> list[T]:
        """What `program(rank)` returned for each rank. Raises what the first that failed has raised; once."""
        ranks = range(len(self.now))
        self._ready = dict.fromkeys(ranks, lambda: True)
        threads = [threading.Thread(target=self._go, args=(rank, program), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        try:
            self._next()
            for thread in threads:
                thread.join()
        except BaseException as error:
            self._fail(error)
            # The one whose turn it is ends where it would have given that away: not in the middle of torch.
            for thread in threads:
                thread.join()
            raise
        if self._failed is not None:
            raise self._failed
        return [self._results[rank] for rank in ranks]

    def compute(self, rank: int, seconds: float) -> None:
        """The rank whose turn it is computes for so long."""
        self.now[rank] += seconds
        self._pause(rank, lambda: True)

    def wait(self, rank: int, ends: Callable[[], float | None]) -> None:
        """The rank whose turn it is waits until the time that `ends` tells once it is known."""
        if ends() is None:
            self._pause(rank, lambda: ends() is not None)
        end = ends()
        assert end is not None
        self.waited[rank] += max(0.0, end - self.now[rank])
        self.now[rank] = max(end, self.now[rank])

    def _go(self, rank: int, program: Callable[[int], T]) -> None:
        try:
            self._await(rank)
            self._results[rank] = program(rank)
        except _Given:
            return
        except BaseException as error:
            self._fail(error)
            return
        self._next()

    def _pause(self, rank: int, ready: Callable[[], bool]) -> None:
        self._ready[rank] = ready
        self._next()
        self._await(rank)

    def _next(self) -> None:
        """Gives the turn to one of those that have paused."""
        with self._changed:
            able = [rank for rank, ready in self._ready.items() if ready()]
            if able:
                self._turn = min(able, key=lambda rank: (self.now[rank], rank))
                del self._ready[self._turn]
            elif self._ready and self._failed is None:
                stuck = ", ".join(map(str, sorted(self._ready)))
                self._failed = AssertionError(f"ranks {stuck} wait for what the others never do")
            self._changed.notify_all()

    def _await(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == rank or self._failed is not None)
        if self._failed is not None:
            raise _Given

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failed = self._failed or error
            self._changed.notify_all()
