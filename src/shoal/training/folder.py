"""What makes a folder a run's: its job, its tokenizer, and where its tokens are. Written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from shoal.data.prepare import Prepared
from shoal.errors import CheckpointError
from shoal.job import Job, write
from shoal.observe import files

# Which token store a run reads: folder and fingerprint.
DATA = "data.json"
# In a folder that `shoal pull` has made, which is no run's though it looks like one: the run, and the version.
PULLED = "pulled.json"
# Of a run with a parameter server: journal and logs, as `shoal.sync.server.node.book` names it.
SERVER = "server"
# Of files in it, one for each part that has joined, held as long as that lives.
LOCK = ".lock"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def fill(folder: Path, job: Job, prepared: Prepared) -> None:
    """Writes what is not there yet or has changed. OSError if it cannot; then each file is as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER:
        _write(folder / name, (prepared.folder / name).read_bytes())
    data = {"folder": str(prepared.folder), "fingerprint": prepared.fingerprint}
    _write(folder / DATA, msgspec.json.encode(data))
    write_job(folder, job)


def set_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Of a run that goes on without a server: journal and logs do not follow from its checkpoints any more.

    Raises CheckpointError where they cannot be moved: a later resume with a server would go on from them.
    """
    if (folder / SERVER).is_dir():
        before = folder / f"{SERVER}-before"
        shutil.rmtree(before, ignore_errors=True)
        try:
            (folder / SERVER).rename(before)
        except OSError as error:
            what = f"journal and logs of the run's server cannot be set aside in {before.name}: {error.strerror}"
            fix = f"mv {folder / SERVER} elsewhere, or remove {before}; then resume"
            raise CheckpointError(what, where=str(folder), fix=fix) from None
        say(f"it goes on from its checkpoint; what a server has journalled since is set aside in {before}")


def write_job(folder: Path, job: Job) -> None:
    """Its job.toml alone: the rest may have gone meanwhile."""
    _write(folder / "job.toml", write(job).encode())


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        files.replace(path, content)
