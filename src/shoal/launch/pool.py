"""Ranks that are used again and again: for tests, and for comparing layouts of one job."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from shoal.launch.call import call
from shoal.launch.ranks import Ranks


class Pool:
    """`size` ranks, forked at the start or the first run, and more when a run needs them. Close it at the end.

    Every run has keys of its own in the store. A run that failed leaves nothing behind: its ranks are new.
    """

    def __init__(self, size: int, preload: Sequence[str] = ()):
        """preload: modules that runs will need; imported once, before the first fork."""
        self.size, self._preload = size, preload
        self._ranks: Ranks | None = None

    def run(
        self,
        entry: str,
        world: int,
        *,
        timeout: float = 120.0,
        threads: int = 1,
        lost: Collection[int] = (),
        **args: Any,
    ) -> list[Any]:
        """What `entry(seat, **args)` returned in ranks 0 … world - 1, as `shoal.launch.call.call` says."""
        return call(self.start(), entry, args, world, threads=threads, timeout=timeout, lost=lost)

    def start(self) -> Ranks:
        """Starts the ranks if they are not there; returns at once, and their imports go on beside the caller."""
        if self._ranks is not None and self._ranks.server.ended:
            self.close()
        if self._ranks is None:
            self._ranks = Ranks(self._preload)
            self._ranks.start(self.size)
        return self._ranks

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
