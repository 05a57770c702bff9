"""result.json: what a run came to. Its first ten keys are the last line of `shoal train --format json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from shoal.observe import files

FILE = "result.json"


@dataclass(frozen=True)
class Result:
    """Figures of one run. None where there is none (no validation text, unknown peak, loss of NaN)."""

    run: str
    """The run folder."""
    steps: int
    tokens: int
    """Trained on: valid tokens of all steps."""
    loss_first: float | None
    """Of the first and of the last step, in nats per token."""
    loss_last: float | None
    val_loss: float | None
    """Nats per token."""
    bits_per_byte: float | None
    """The validation loss per byte of its text, so that tokenizers and compressors can be compared."""
    tokens_per_second: float | None
    """Of all devices together, over the steps' time."""
    mfu: float | None
    """A share of the measured matmul peak."""
    seconds: float
    """From the user's command, the last one if the run was resumed, to the end of the last step."""

    stopped_by: str = ""
    """The signal that asked the run to stop; empty if it reached its last step."""
    saved_step: int | None = None
    """Of the newest whole checkpoint; None if there is none."""
    parameters: int = 0
    devices: int = 0
    mfu_note: str = ""
    """Formula and peak."""
    prompt: str = ""
    sample: str = ""
    """Text that the trained model continued `prompt` with."""
    gzip_bits_per_byte: float | None = None
    """gzip -9 and xz -9 of the same validation text."""
    xz_bits_per_byte: float | None = None
    step_seconds: float | None = None
    """In the median of the last hundred steps, without the first two."""
    predicted_step_seconds: float | None = None
    """Before the run, by what `shoal calibrate` measured; None where it could not be predicted."""
    memory_gib: float | None = None
    """Most memory of the fullest rank: on a CPU of its process, on a GPU in tensors."""
    predicted_memory_gib: float | None = None
    """Before the run; None where it could not be predicted."""
    exchange: dict[str, Any] = field(default_factory=dict)
    """What it took to keep replicas consistent, as `observe.exchange.figures` has it."""

    def line(self) -> str:
        """One JSON object in one line, without what only result.json keeps. NaN and inf are null."""
        return msgspec.json.encode({name: getattr(self, name) for name in _LINE}).decode()


_LINE = (
    "run", "steps", "tokens", "loss_first", "loss_last", "val_loss", "bits_per_byte", "tokens_per_second",
    "mfu", "seconds",
)  # fmt: skip


def write(folder: Path, result: Result) -> None:
    """Replaces the run's result.json at once, so that a reader never sees half of it."""
    files.replace(folder / FILE, msgspec.json.format(msgspec.json.encode(asdict(result))) + b"\n")


def read(folder: Path) -> Result | None:
    """The run's result; None if it has none yet, or one that cannot be read."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Result)
    except (OSError, ValueError):
        return None


def forget(folder: Path) -> None:
    """For a run that goes on: what it had come to before is not its result any more."""
    (folder / FILE).unlink(missing_ok=True)


def current(folder: Path, last: int) -> Result | None:
    """The run's result, unless it is from before a resume: then it says nothing about what came after it.

    last: step of the last row of metrics.
    """
    done = read(folder)
    return done if done and done.steps >= last else None


def state(done: Result | None, steps: int | None) -> str:
    """How a run ended, by its current result and the steps of its job, None or 0 if unknown.

    `finished`: reached its last step; `stopped`: saved before, and can go on; `failed`: neither.
    """
    if done is None:
        return "failed"
    # Not only a signal leaves steps to do: a run that had finished may have been resumed for more, and done none.
    return "stopped" if (done.steps < steps if steps else done.stopped_by) else "finished"
