"""The commands that go on from a run; said at its end, in its report, and when it is stopped."""

from __future__ import annotations

import shlex
from pathlib import Path

PROMPT = "The"


def resume(folder: Path | str) -> str:
    return f"shoal train --resume {shlex.quote(str(folder))}"


def generate(folder: Path | str, prompt: str = PROMPT) -> str:
    return f"shoal generate {shlex.quote(str(folder))} --prompt {shlex.quote(prompt)}"


def report(folder: Path | str) -> str:
    return f"shoal report {shlex.quote(str(folder))}"
