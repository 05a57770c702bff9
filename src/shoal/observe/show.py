"""What rank 0 tells of a run: progress for people, metrics.jsonl for programs, log.txt for later."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console

from shoal.observe import result
from shoal.observe.hold import hold
from shoal.observe.log import Log
from shoal.observe.metrics import Metrics
from shoal.observe.mfu import Mfu
from shoal.observe.progress import Lasting, Progress


class Validated(Protocol):
    """A validation: mean loss in nats per token, and how many tokens it was measured on."""

    @property
    def nats(self) -> float: ...

    @property
    def tokens(self) -> int: ...


class Show:
    """Between `begin` and `end` takes one row of metrics a step; holds the run folder while it is open.

    A full disk is told once and never ends the training. `quiet` (ranks other than 0): does nothing at all.
    """

    def __init__(self, folder: Path, quiet: bool = False):
        self.folder, self.quiet = folder, quiet
        self._console = Console(file=cast(Any, Lasting(sys.stdout)))
        self._ending = contextlib.ExitStack()
        self._warned = False
        self._log: Log | None = None
        self._mfu: Mfu | None = None
        self._metrics: Metrics | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> Show:
        if not self.quiet:
            self._ending.enter_context(hold(self.folder))
            self._log = Log(self.folder)
            self._ending.callback(self._log.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    @property
    def note(self) -> str:
        """What MFU means here; empty before `begin`."""
        return self._mfu.note() if self._mfu else ""

    def say(self, text: str) -> None:
        """Prints a sentence, above the live display, and logs it."""
        if self._log is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            with self._keeping():
                self._log.write(text)

    def begin(self, step: int, steps: int, devices: int, peak: float | None, flops_per_token: float) -> None:
        """The run goes on after `step`, to `steps`, 0 = with no end. peak: FLOP/s of one device, None if unknown."""
        if self.quiet:
            return
        self._mfu = Mfu(flops_per_token, devices, peak)
        self.say(self._mfu.note())
        with self._keeping():
            result.forget(self.folder)
            self._metrics = Metrics(self.folder, step)
            self._ending.callback(self._metrics.close)
        self._progress = Progress(self._console, steps, self._mfu, step)
        self._ending.callback(self._progress.close)

    def compute_on(self, devices: int) -> None:
        """From here on the run has so many."""
        if self._progress is not None and self._mfu is not None:
            self._mfu = self._progress.mfu = replace(self._mfu, devices=devices)

    def lengthen(self, steps: int) -> None:
        """The run now ends after `steps`."""
        if self._progress is not None:
            self._progress.steps = steps

    def step(self, row: dict[str, Any]) -> None:
        """Keeps and shows one row; adds `mfu` to it."""
        if self.quiet:
            return
        assert self._mfu is not None, "step before begin"
        assert self._progress is not None
        row = row | {"mfu": self._mfu.of(row["tokens_per_second"])}
        if self._metrics is not None:
            with self._keeping():
                self._metrics.write(row)
        self._progress.step(row)

    def keep(self, row: dict[str, Any]) -> None:
        """Keeps a row of a step that is over: a process that died meanwhile had not written it."""
        if self._metrics is not None:
            with self._keeping():
                self._metrics.write(row)

    def end(self, step: int, last: Validated | None) -> None:
        """The run has ended after `step`: closes the display, and says with which validation loss."""
        if self._progress is None:
            return
        self._progress.close()
        steps = self._progress.steps
        text = f"step {step:,} of {steps:,} is done" if steps else f"step {step:,} is done"
        if last is not None:
            text += f"; validation loss {last.nats:.4f} nats per token, over {last.tokens:,} tokens"
        self.say(text)

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """What is written within may fail; only the first time is told."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror or str(error)
                self.say(f"warning: cannot write the run's log and metrics ({reason}); training goes on without")
