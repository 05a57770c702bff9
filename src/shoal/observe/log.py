"""log.txt: every sentence that a run says, with its time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

FILE = "log.txt"


class Log:
    """Appends to the run's log.txt. Several processes may: each text is one write."""

    def __init__(self, folder: Path):
        self._file = (folder / FILE).open("ab", buffering=0)

    def write(self, text: str) -> None:
        """Every line of `text` with the local time before it. OSError when the disk is full."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        lines = [f"{now} {line}\n" for line in text.splitlines() or [""]]
        self._file.write("".join(lines).encode(errors="replace"))

    def close(self) -> None:
        self._file.close()


def speaker(folder: Path | None = None) -> Callable[[str], None]:
    """Prints a sentence, and writes it into the run's log once there is a run folder."""

    def say(text: str) -> None:
        print(text, flush=True)
        if folder is not None:
            # A full disk is told by the saving of the state; it ends no run.
            with contextlib.suppress(OSError), contextlib.closing(Log(folder)) as log:
                log.write(text)

    return say


def tail(folder: Path, lines: int) -> str:
    """The last lines of the run's log.txt; empty if it has none."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
