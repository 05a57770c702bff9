"""Where a trained model lies: in a run folder, one of its checkpoints, or a folder in Hugging Face's format. Without
torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal import checkpoint, job
from shoal.checkpoint import manifest
from shoal.errors import CheckpointError, ModelError
from shoal.job.model import ModelOptions
from shoal.models import config


@dataclass(frozen=True)
class Source:
    """folder: with config.json and safetensors, or a checkpoint whose checksums have been found right."""

    options: ModelOptions
    folder: Path


def find(path: str | Path, say: Callable[[str], None] = print) -> Source:
    """The model in `path`: of a run folder its newest whole checkpoint, or the `model` folder of a finished run.

    say: gets a line for each damaged checkpoint passed over. Raises ModelError or CheckpointError that says what is
    missing or damaged.
    """
    path, home = Path(path), home_of(path)
    if (path / "config.json").is_file():
        return Source(config.read(path), path)
    if home == path:
        newest = checkpoint.newest(path / "checkpoints", say)
        if newest is None and (path / "model").is_dir():
            return find(path / "model", say)
        if newest is None:
            raise ModelError(
                "the run has no checkpoint yet", where=str(path), fix="train it, or wait for its first one"
            )
        return Source(job.read(path / "job.toml").model, newest)
    for file, reason in checkpoint.verify(path):
        raise CheckpointError(reason, where=str(file), fix=manifest.ANOTHER)
    return Source(job.read(home / "job.toml").model, path)


def home_of(path: str | Path) -> Path:
    """The folder with the job or config, and the tokenizer, of a model: `path`, or the run whose checkpoint it is.

    Raises ModelError for anything else.
    """
    path = Path(path)
    if (path / "config.json").is_file() or (path / "job.toml").is_file():
        return path
    run = path.absolute().parent.parent
    if path.is_dir() and path.absolute().parent.name == "checkpoints" and (run / "job.toml").is_file():
        return run
    what = "there is no such folder"
    if path.is_dir():
        what = "is no run and no model: it holds neither job.toml nor config.json"
    elif path.exists():
        what = "is a file, neither a run nor a model folder"
    raise ModelError(what, where=str(path), fix="give a run folder or a Hugging Face folder")
