"""Contenders that each have processes of their own and compute one after the other: each block, one of them is told to.

Processes that wait do so in a read, which costs no time of a core.
"""

from __future__ import annotations

import os
import select
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from queue import Queue
from typing import Any

from benchmarks.paired import interleave

from shoal.launch.pool import Pool

_WORLD = 2


def take_turns(folder: str, contender: str, rank: int, block: Callable[[], float]) -> None:
    """Runs `block` whenever `in_turns` says so, until it says no more; rank 0 answers with the seconds."""
    with open(_pipe(folder, contender, str(rank))) as orders, open(_pipe(folder, contender, "answers"), "w") as answers:
        print("ready", file=answers, flush=True)
        for _ in orders:
            seconds = block()
            if rank == 0:
                print(seconds, file=answers, flush=True)


def in_turns(
    entry: str, contenders: dict[str, dict[str, Any]], blocks: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """(seconds of each contender in each block, what rank 0 of each returned in the end).

    entry: called in two ranks of each contender with its arguments and `folder`, for `take_turns`.
    """
    with ExitStack() as ending:
        folder = ending.enter_context(tempfile.TemporaryDirectory())
        sides = {name: _Side(folder, name) for name in contenders}
        for name, args in contenders.items():
            # One after the other, so that nobody builds while another compiles.
            pool = ending.enter_context(Pool(_WORLD))
            sides[name].start(lambda pool=pool, args=args: pool.run(entry, _WORLD, timeout=7200, **args, folder=folder))
        seconds = interleave({name: side.block for name, side in sides.items()}, blocks)
        return seconds, {name: side.end()[0] for name, side in sides.items()}


def over_starts(
    entry: str, contenders: dict[str, dict[str, Any]], blocks: int, starts: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """As `in_turns`, the blocks spread over so many starts, in each of which another contender is the first to be
    built; of the last start, what ranks returned."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, Any] = {}
    for start in range(starts):
        first, part = start % len(names), blocks * (start + 1) // starts - blocks * start // starts
        order = {name: contenders[name] for name in names[first:] + names[:first]}
        more, found = in_turns(entry, order, part)
        for name, column in more.items():
            seconds[name] += column
    return seconds, found


class _Side:
    """The driver's ends of one contender's pipes, and its run."""

    def __init__(self, folder: str, name: str):
        self._name = name
        self._answers = _both_ends(_pipe(folder, name, "answers"))
        self._orders = [_both_ends(_pipe(folder, name, str(rank))) for rank in range(_WORLD)]
        self._ended: Queue[list[Any] | BaseException] = Queue()

    def start(self, run: Callable[[], list[Any]]) -> None:
        """Returns when it has been built and warmed up; raises what the run raises."""

        def main() -> None:
            try:
                self._ended.put(run())
            except BaseException as error:
                self._ended.put(error)

        # A daemon: nobody waits for the other contenders when one has failed.
        threading.Thread(target=main, daemon=True).start()
        for _ in range(_WORLD):
            assert self._answer() == "ready"

    def block(self) -> float:
        for orders in self._orders:
            orders.write(b"go\n")
        return float(self._answer())

    def end(self) -> list[Any]:
        """Lets it end; what its ranks return."""
        for orders in self._orders:
            orders.close()
        return self._result()

    def _answer(self) -> str:
        while not select.select([self._answers], [], [], 1.0)[0]:
            if not self._ended.empty():
                raise RuntimeError(f"{self._name} has ended: {self._result()}")
        return self._answers.readline().decode().strip()

    def _result(self) -> list[Any]:
        ended = self._ended.get()
        if isinstance(ended, BaseException):
            raise ended
        return ended


def _both_ends(path: Path) -> FileIO:
    """A new pipe. Opening only one end would wait for a process that may have failed; what is read stays no longer
    than its line, so that `select` knows of all that is there."""
    os.mkfifo(path)
    return FileIO(os.open(path, os.O_RDWR), "r+")


def _pipe(folder: str, contender: str, kind: str) -> Path:
    return Path(folder, f"{contender.replace(' ', '-')}-{kind}")
