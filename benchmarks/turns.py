"""Contenders that each have processes of their own and compute one after the other: each block, one of them is told to.

Processes that wait do so in a read, which costs no time of a core.
"""

from __future__ import annotations

import os
import select
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
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
        threads = ending.enter_context(ThreadPoolExecutor(len(contenders)))
        sides = {name: _Side(folder, name) for name in contenders}
        for name, args in contenders.items():
            # One after the other, so that nobody builds while another compiles.
            pool = ending.enter_context(Pool(_WORLD))
            sides[name].start(threads.submit(pool.run, entry, _WORLD, timeout=7200, **args, folder=folder))
        seconds = interleave({name: side.block for name, side in sides.items()}, blocks)
        for side in sides.values():
            side.end()
        return seconds, {name: side.result()[0] for name, side in sides.items()}


class _Side:
    """The driver's ends of one contender's pipes."""

    def __init__(self, folder: str, name: str):
        self._name = name
        self._answers = _both_ends(_pipe(folder, name, "answers"))
        self._orders = [_both_ends(_pipe(folder, name, str(rank))) for rank in range(_WORLD)]

    def start(self, run: Future[list[Any]]) -> None:
        """Returns when it has been built and warmed up; raises what the run raises."""
        self.result = run.result
        self._run = run
        for _ in range(_WORLD):
            assert self._answer() == "ready"

    def block(self) -> float:
        for orders in self._orders:
            orders.write(b"go\n")
        return float(self._answer())

    def end(self) -> None:
        for orders in self._orders:
            orders.close()

    def _answer(self) -> str:
        while not select.select([self._answers], [], [], 1.0)[0]:
            if self._run.done():
                raise RuntimeError(f"{self._name} has ended: {self._run.result()}")
        return self._answers.readline().decode().strip()


def _both_ends(path: Path) -> FileIO:
    """A new pipe. Opening only one end would wait for a process that may have failed; what is read stays no longer
    than its line, so that `select` knows of all that is there."""
    os.mkfifo(path)
    return FileIO(os.open(path, os.O_RDWR), "r+")


def _pipe(folder: str, contender: str, kind: str) -> Path:
    return Path(folder, f"{contender.replace(' ', '-')}-{kind}")
