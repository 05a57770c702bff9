"""A rank's side of saving: copies the state into shared memory, and lets a helper process write it."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import msgspec
import torch

from shoal.checkpoint import folders
from shoal.checkpoint.folders import Attempt
from shoal.checkpoint.messages import Order, Part, Report, file_name, part_name
from shoal.checkpoint.pack import pack
from shoal.errors import CheckpointError, DivergedError
from shoal.shard import State

_WRITER = "shoal.checkpoint.writer"
# Seconds that a failing rank gives its last save, as other ranks' parts may never come; and any rank its helper.
_PATIENCE = 2.0


class Pending:
    """A save on its way. On rank 0 it ends when the checkpoint is complete, on others when their part is.

    copy_seconds: how long the copy held training up. waited_seconds: how long the save before did, if it was
    still being written. write_seconds: what the helper took, once it is done.
    """

    def __init__(self, helper: _Helper, root: Path, step: int, copy_seconds: float, waited_seconds: float):
        self.copy_seconds, self.waited_seconds = copy_seconds, waited_seconds
        self.write_seconds: float | None = None
        self._helper, self._root, self._step = helper, root, step
        self._error = ""

    def done(self) -> bool:
        """Never blocks."""
        return self.wait(0.0)

    def wait(self, timeout: float | None = None) -> bool:
        """Returns when it is done, or after `timeout` seconds; whether it is done."""
        if self.write_seconds is None:
            report = self._helper.answer(timeout)
            if report is not None:
                self.write_seconds, self._error = report.seconds, report.error
        return self.write_seconds is not None

    @property
    def error(self) -> CheckpointError | None:
        """Why nothing was saved, if that is so and known by now. Never raised: training goes on."""
        if not self.done() or not self._error:
            return None
        newest = next(iter(folders.complete(self._root)), None)
        return CheckpointError(
            f"step {self._step} was not saved: {self._error}",
            where=str(self._root),
            fix=(f"{newest.name} is intact" if newest else "nothing is saved yet")
            + ", and the next save (or --resume) tries again; is there space on the disk?",
        )


class Saver:
    """Saves checkpoints of one run, as one rank of `world`. Start it before training, on all ranks.

    root: folder of the run's checkpoints, on a file system that all ranks share. keep: how many of them stay.
    nonce: letters and digits that all ranks agree on and no earlier start of the run had; it tells apart what
    a crash left behind. timeout: seconds without progress after which rank 0 gives up on other ranks' parts.

    The shared memory is anonymous: it needs no /dev/shm, and is gone with its processes however they end.
    """

    def __init__(self, root: Path, rank: int, world: int, keep: int, *, nonce: str, timeout: float = 600.0):
        assert 0 <= rank < world, f"rank {rank} of {world}"
        assert nonce.isalnum(), f"nonce '{nonce}'"
        assert keep >= 1
        self.root = root.absolute()
        self.rank, self.world, self.keep, self.timeout = rank, world, keep, timeout
        self._attempt = Attempt(nonce, 0)
        self._memory = _Memory()
        self._helper = _Helper(self._memory.file)
        self._pending: Pending | None = None
        if rank == 0:
            folders.sweep(self.root, self._attempt)

    def save(self, state: State, step: int, attempt: int = 0) -> Pending:
        """Copies `state` and returns; waits first if the save before is still being written.

        attempt: a number of this save, equal on all ranks and higher each time, where ranks may have been started
        again; 0 = they have all saved equally often.

        All ranks call it for the same steps. Every element of a tensor must be in exactly one shard that has
        `owner`, of one rank. state.values: plain JSON, equal on all ranks.
        """
        assert msgspec.json.decode(msgspec.json.encode(state.values)) == state.values, "values must survive JSON"
        start = time.perf_counter()
        if self._pending is not None:
            self._pending.wait()
        if self._helper.ended:
            self._helper.close()
            self._helper = _Helper(self._memory.file)
        ready = time.perf_counter()
        packing = pack(state.shards, file_name(self.rank))
        packing.copy(self._memory.reserve(packing.size))
        self._attempt = Attempt(self._attempt.nonce, attempt or self._attempt.count + 1)
        self._helper.send(
            Order(
                root=str(self.root), step=step, rank=self.rank, world=self.world, keep=self.keep,
                attempt=self._attempt, timeout=self.timeout, size=packing.size, tensors=packing.tensors,
                values=state.values,
            )
        )  # fmt: skip
        self._pending = Pending(self._helper, self.root, step, time.perf_counter() - ready, ready - start)
        return self._pending

    def break_off(self) -> None:
        """Gives up the save that is on its way, e.g. since another rank was lost with its part."""
        self._helper.process.kill()
        self._helper.process.wait()

    def close(self, patience: float | None = None) -> None:
        """Lets a save that is on its way end, for at most `patience` seconds, and ends the helper."""
        if self._pending is not None:
            self._pending.wait(patience)
        self._helper.close()
        self._memory.close()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a divergence all ranks are there to end the save; after anything else one may be gone.
        self.close(None if kind is None or issubclass(kind, DivergedError) else _PATIENCE)


class _Memory:
    """Bytes that are shared with the helper, to which `file` is handed. It grows and never shrinks."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("shoal-checkpoint")
        else:
            with tempfile.TemporaryFile() as nameless:
                self.file = os.dup(nameless.fileno())
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> torch.Tensor:
        """At least `size` bytes."""
        if size > len(self._bytes):
            os.ftruncate(self.file, size)
            self._bytes = torch.frombuffer(mmap.mmap(self.file, size), dtype=torch.uint8)
        return self._bytes

    def close(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self.file)


class _Helper:
    """The process of writer.py. It has one order at a time, and ends when this process does."""

    def __init__(self, memory: int):
        # It imports what this process would: neither more (-P: not the working directory) nor less.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WRITER, str(memory)],
            pass_fds=[memory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._order: Order | None = None

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def send(self, order: Order) -> None:
        assert self.process.stdin
        self._order = order
        line = memoryview(msgspec.json.encode(order) + b"\n")
        try:
            while line:
                line = line[self.process.stdin.write(line) :]
        except BrokenPipeError:
            return  # answer() will say so

    def answer(self, timeout: float | None) -> Report | None:
        """The answer to the order, or None if it does not come within `timeout` seconds."""
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            return None
        line = self.process.stdout.readline()
        if line:
            return msgspec.json.decode(line, type=Report)
        error = f"the helper process ended with code {self.process.wait()}"
        if self._order is not None and self._order.rank > 0:
            _excuse(self._order, error)
        return Report(0.0, error)

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            # It is stopped, or waits for a disk that does not answer, in which case it cannot be waited for.
            self.process.kill()


def _excuse(order: Order, error: str) -> None:
    """Says in a dead helper's place why its part will not come: rank 0's helper would wait for it until its timeout."""
    folder = Path(order.root) / order.attempt.temporary(folders.name_of(order.step))
    part = folder / part_name(order.rank)
    if part.exists():
        return  # it died after its work was done
    unfinished = part.with_name(part.name + ".excuse")
    # A full disk. Rank 0's helper then learns of it from this rank's next save.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(msgspec.json.encode(Part({}, error=error)))
        os.rename(unfinished, part)
