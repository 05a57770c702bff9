"""Which checkpoint a path means, and what is in it; from its manifest, without torch."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from shoal.checkpoint import blocks, folders, health, manifest
from shoal.checkpoint.manifest import Manifest
from shoal.errors import CheckpointError


def find(path: Path) -> Path:
    """The checkpoint that is `path`, or the newest complete one of the run (or the folder of checkpoints) that it is.

    Unverified. Raises CheckpointError if there is none.
    """
    if (path / manifest.FILE).is_file() or path in folders.complete(path.parent):
        return path
    root = _root(path)
    newest = next(iter(folders.complete(root)), None)
    if newest is None:
        what = "there is no checkpoint in it" if path.is_dir() else "there is no such folder"
        fix = "give a run folder, or that of a checkpoint: RUN/checkpoints/step-00000100"
        raise CheckpointError(what, where=str(path), fix=fix)
    return newest


def trusted(path: Path, say: Callable[[str], None]) -> Path:
    """As `find`, of a run the newest undamaged one; all of it has been read and its checksums are right.

    say: is told each damaged file of those that are passed over. Raises CheckpointError if none can be trusted.
    """
    newest = find(path)
    if newest != path:
        undamaged = health.newest(_root(path), say)
        if undamaged is None:
            raise CheckpointError("every checkpoint in it is damaged", where=str(path), fix="restore one from a copy")
        return undamaged
    for file, reason in health.verify(path):
        raise CheckpointError(reason, where=str(file), fix=manifest.ANOTHER)
    return path


def _root(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def home(checkpoint: Path) -> Path:
    """The run that a checkpoint is of: where its job.toml and its tokenizer are. Raises CheckpointError."""
    run = checkpoint.absolute().parent.parent
    if not (run / "job.toml").is_file():
        raise CheckpointError(
            "it is in no run's folder, whose job.toml says what model it is of",
            where=str(checkpoint),
            fix="move it to RUN/checkpoints/, under a name such as step-00000100-1",
        )
    return run


def model_tensors(what: Manifest) -> list[str]:
    """Names of the tensors that are not the state of another one, in the order in which they were saved."""
    return [name for name in what.tensors if name.partition(".")[2] not in what.tensors]


def contents(folder: Path) -> dict[str, Any]:
    """Step, layout, sizes in bytes, files, tensors, and what of the run's state there is.

    kinds: `model`, and the slots of the optimizer and of other state, each with its number of tensors and elements,
    its bytes, and its dtypes. Raises CheckpointError if the manifest is missing or damaged.
    """
    what = manifest.read(folder)
    model = set(model_tensors(what))
    kinds: dict[str, dict[str, Any]] = {}
    for name, tensor in what.tensors.items():
        slot = "model" if name in model else name.partition(".")[0]
        kind = kinds.setdefault(slot, {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []})
        kind["tensors"] += 1
        kind["elements"] += prod(tensor.shape)
        kind["bytes"] += blocks.size(tensor)
        if tensor.dtype not in kind["dtypes"]:
            kind["dtypes"].append(tensor.dtype)
    return {
        "checkpoint": str(folder),
        "step": what.step,
        "layout": what.values.get("layout"),
        "bytes": sum(file.size for file in what.files.values()) + (folder / manifest.FILE).stat().st_size,
        "files": {name: {"bytes": file.size, "sha256": file.sha256} for name, file in what.files.items()},
        "kinds": kinds,
        "values": what.values,
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "bytes": blocks.size(tensor),
                "pieces": len(tensor.pieces),
            }
            for name, tensor in what.tensors.items()
        },
    }
