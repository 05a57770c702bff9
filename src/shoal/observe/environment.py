"""environment.json: where and with what a run computed. Bitwise equality holds in the same one only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shoal.observe import files, machine

if TYPE_CHECKING:
    import torch

FILE = "environment.json"

# What may change the order or the rounding of a sum. The name of the host stands for the machine.
_BITWISE = ("python", "torch", "numpy", "device", "instructions", "ranks", "threads", "host")


def collect(where: torch.device, ranks: int, command: list[str]) -> dict[str, Any]:
    """The environment of this rank, as one of `ranks`: a flat JSON object. command: the user's, as words."""
    # Here, because a report reads this file without torch.
    import torch

    from shoal import device

    return {
        **machine.versions(),
        "system": machine.system(),
        "host": machine.host(),
        "device": device.name(where),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "commit": _commit(Path.cwd()),
        "command": command,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def record(folder: Path, environment: dict[str, Any], say: Callable[[str], None]) -> None:
    """Writes the run's environment.json; if it was resumed, says what changed that ends bitwise equality."""
    before = read(folder)
    changed = differences(before, environment) if before else []
    if changed:
        say(f"not bitwise the same as without the interruption: {', '.join(changed)}")
    try:
        write(folder, environment)
    except OSError as error:
        say(f"warning: cannot write {FILE} ({error.strerror or error}); training goes on without")


def write(folder: Path, environment: dict[str, Any]) -> None:
    """Replaces the run's environment.json. OSError when the disk is full; the old one is kept then."""
    files.replace(folder / FILE, msgspec.json.format(msgspec.json.encode(environment)) + b"\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The environment that the run was started or last resumed in; None if it is not known."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=dict)
    except (OSError, ValueError):
        return None


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What has changed that may break bitwise equality: [`torch 2.12.0 → 2.13.0`, ...]."""
    return [
        f"{key} {old.get(key, 'unknown')} → {new.get(key, 'unknown')}"
        for key in _BITWISE
        if old.get(key) != new.get(key)
    ]


def _commit(folder: Path) -> str | None:
    """The git commit of the working directory, with `+` if files in it differ; None outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + "+" * bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=2)
    return done.stdout.strip()
