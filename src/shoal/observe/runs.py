"""The runs in a folder: what each has reached, and how it ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from shoal import checkpoint
from shoal.errors import ShoalError
from shoal.job import read as read_job
from shoal.observe import metrics, result
from shoal.observe.charts import median
from shoal.observe.hold import held
from shoal.observe.text import plain
from shoal.observe.units import duration, number, size


@dataclass(frozen=True)
class Run:
    """One run folder. None where it is not known (yet)."""

    name: str
    folder: str
    state: str
    """`running`, or how it ended, as `result.state` says."""
    step: int
    steps: int | None
    """Of the whole run; 0 = it has no end."""
    val_loss: float | None
    """Nats per token, of the last validation."""
    tokens_per_second: float | None
    age: float
    """Seconds since something was last written."""
    size: int
    """Bytes of all its files."""
    checkpoint: str | None
    """Folder of the newest checkpoint; not verified."""


@dataclass(frozen=True)
class Runs:
    """The runs in `root`, the latest last. `str()` of it is the table that people see."""

    root: str
    runs: list[Run]

    def __str__(self) -> str:
        if not self.runs:
            return f"no runs in {self.root} (`shoal train` makes one)"
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("run", overflow="fold")
        table.add_column("state")
        for head in ("steps", "val loss", "tok/s", "last written", "size"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("newest checkpoint")
        for run in self.runs:
            table.add_row(
                run.name,
                run.state,
                f"{run.step:,} (no end)" if run.steps == 0 else f"{run.step:,}/{number(run.steps, ',')}",
                number(run.val_loss, ".3f"),
                number(run.tokens_per_second),
                f"{duration(run.age)} ago",
                size(run.size),
                Path(run.checkpoint).name if run.checkpoint else "–",
            )
        return plain(table)


def find(root: str | Path = "runs") -> Runs:
    """Every run folder directly in `root`; none if there is no such folder."""
    folders = [path.parent for path in Path(root).glob("*/job.toml")]
    return Runs(str(root), sorted(map(describe, folders), key=lambda run: (-run.age, run.name)))


def describe(folder: Path) -> Run:
    """One run, from what lies in its folder."""
    rows, steps = metrics.read(folder), _steps(folder)
    step = rows[-1]["step"] if rows else 0
    done = result.current(folder, step)
    validated = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    last_written, bytes_ = _files(folder)
    newest = next(iter(checkpoint.complete(folder / "checkpoints")), None)
    return Run(
        name=folder.name,
        folder=str(folder),
        state="running" if held(folder) else result.state(done, steps),
        step=done.steps if done else step,
        steps=steps,
        val_loss=done.val_loss if done and done.val_loss is not None else next(reversed(validated), None),
        tokens_per_second=done.tokens_per_second if done else median(rows, "tokens_per_second"),
        age=max(0.0, time.time() - last_written),
        size=bytes_,
        checkpoint=str(newest) if newest else None,
    )


def _steps(folder: Path) -> int | None:
    try:
        job = read_job(folder / "job.toml")
    except ShoalError:
        return None
    return job.train.steps or (0 if job.endless else None)


def _files(folder: Path) -> tuple[float, int]:
    """(time of the latest change, bytes) of all files, except what a running process removes meanwhile."""
    latest, total = 0.0, 0
    for path in folder.rglob("*"):
        try:
            facts = path.lstat()
        except OSError:
            continue
        if not path.is_dir():
            latest, total = max(latest, facts.st_mtime), total + facts.st_size
    return latest, total
