"""What a rank did during a step, recorded as named spans (`timeline` puts all ranks' together).

A rank does one thing at a time: its spans nest, and a moment belongs to the innermost one. Beside them,
communication is in flight, which costs time only where nothing is computed meanwhile.

Clocks. Ranks of one machine share CLOCK_MONOTONIC, so their spans agree to the nanosecond. Between machines the
wall clocks stand in: as exact as NTP keeps them, often a millisecond off, which a bubble across machines then
contains. On a device that computes asynchronously a span is what the host saw of it: whoever traces a step
there waits for the device at the spans' ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import msgspec

from shoal.observe import machine

Kind = Literal["compute", "forward", "backward", "optimizer", "data", "communication", "wait"]
_NOTHING: AbstractContextManager[None] = nullcontext()


class Span(msgspec.Struct, frozen=True, array_like=True):
    """start, end: ns of the recording's clock. depth: how many spans it is nested in.

    in_flight: communication beside the others. stage, micro_batch: of a pipeline, where there is one. link: of a send
    or receive in flight, the message: the same at both its ends, and of no other one in the step.
    """

    name: str
    kind: Kind
    start: int
    end: int
    depth: int = 0
    in_flight: bool = False
    stage: int | None = None
    micro_batch: int | None = None
    link: str | None = None


class Recording(msgspec.Struct, frozen=True):
    """One rank's spans. clock: which monotonic clock they are in; wall_ns: what makes it a wall clock's time."""

    rank: int
    host: str
    clock: str
    wall_ns: int
    spans: list[Span]


class Tracer:
    """Records one rank's spans while `on`; costs a call and a look at `on` while not."""

    def __init__(self, rank: int, clock: Callable[[], int] = time.monotonic_ns):
        self.rank, self.clock = rank, clock
        self.on = False
        self.depth = 0
        self.spans: list[Span] = []

    def span(
        self, name: str, kind: Kind, stage: int | None = None, micro_batch: int | None = None
    ) -> AbstractContextManager[None]:
        """A context in which this rank does what is named. Contexts nest: one thread at a time opens them."""
        return _Open(self, name, kind, stage, micro_batch) if self.on else _NOTHING

    def flight(self, name: str, link: str | None = None) -> Callable[[], None]:
        """An asynchronous communication starts; call the result when it has ended, in whatever threads: once counts."""
        if not self.on:
            return _do_nothing
        spans, start = self.spans, self.clock()
        first = threading.Lock()

        def landed() -> None:
            if first.acquire(blocking=False):
                spans.append(Span(name, "communication", start, self.clock(), in_flight=True, link=link))

        return landed

    def take(self) -> Recording:
        """What has ended since it was last taken; forgets it. A flight that ends later is in no recording."""
        spans, self.spans = self.spans, []
        wall = time.time_ns() - self.clock()
        return Recording(self.rank, machine.host(), _machine_clock(), wall, list(spans))


class _Open:
    def __init__(self, tracer: Tracer, name: str, kind: Kind, stage: int | None, micro_batch: int | None):
        self.tracer, self.name, self.kind, self.stage, self.micro_batch = tracer, name, kind, stage, micro_batch

    def __enter__(self) -> None:
        self.depth = self.tracer.depth
        self.tracer.depth += 1
        self.start = self.tracer.clock()

    def __exit__(self, *_: object) -> None:
        end = self.tracer.clock()
        self.tracer.depth = self.depth
        span = Span(self.name, self.kind, self.start, end, self.depth, False, self.stage, self.micro_batch)
        self.tracer.spans.append(span)


def _do_nothing() -> None:
    pass


def _machine_clock() -> str:
    """A monotonic clock runs from a machine's start to its end, in all of its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return machine.host()


def encode(recording: Recording) -> bytes:
    """For another rank."""
    return msgspec.json.encode(recording)


def decode(text: bytes) -> Recording:
    """ValueError if it is no recording."""
    return msgspec.json.decode(text, type=Recording)
