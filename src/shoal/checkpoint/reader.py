"""Loading: the pieces that some layout saved, into the shards that another one wants."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint import manifest
from shoal.checkpoint.health import verify
from shoal.checkpoint.manifest import Manifest, Tensor, intersect
from shoal.checkpoint.pack import DTYPES
from shoal.errors import CheckpointError
from shoal.shard import Shard

_OTHER_MODEL = "was it saved by another model or optimizer? Use the job.toml of the run that saved it"


def load(folder: Path, wanted: Iterable[Shard], *, verified: bool = False) -> dict[str, Any]:
    """Fills each shard's `local` in place, on its device, and returns the saved values.

    Whatever cut of the tensors was saved, only the bytes that are needed are read. Floating-point types
    convert into each other; all others must be equal. verified: `newest` has just computed the checksums, so
    they are not computed again. Raises CheckpointError that names file and tensor if anything is damaged,
    missing, or of another shape or kind.
    """
    what = _trusted(folder, verified)
    files = _Files(folder)
    for shard in wanted:
        _fill(shard, what.tensors.get(shard.name), files)
    return what.values


def tensors(
    folder: Path, names: Iterable[str] | None = None, *, verified: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor on the CPU) one at a time, in the order of `names`.

    Default: the model's, that is none which is state of another (as `exp_avg.norm.weight` of `norm.weight`).
    Raises CheckpointError as `load` does.
    """
    what = _trusted(folder, verified)
    files = _Files(folder)
    for name in model_tensors(what) if names is None else names:
        known = what.tensors.get(name, Tensor("F32", (), []))
        whole = torch.empty(known.shape, dtype=DTYPES[known.dtype])
        _fill(Shard(name, known.shape, (0,) * whole.ndim, whole), what.tensors.get(name), files)
        yield name, whole


def model_tensors(what: Manifest) -> list[str]:
    """Names of the tensors that are not the state of another one, in the order in which they were saved."""
    return [name for name in what.tensors if name.partition(".")[2] not in what.tensors]


def _trusted(folder: Path, verified: bool) -> Manifest:
    for file, reason in [] if verified else verify(folder):
        raise CheckpointError(reason, where=str(file), fix=manifest.ANOTHER)
    return manifest.read(folder)


class _Files(dict[str, torch.Tensor]):
    """File name -> its bytes. A file is mapped, not read, when it is first asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> torch.Tensor:
        try:
            with open(self.folder / name, "rb") as file:
                # Copy on write, because torch knows no read-only tensors; nothing is written.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot be read: {error}", where=str(self.folder / name), fix=manifest.ANOTHER
            ) from None
        self[name] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self[name]


@torch.no_grad()
def _fill(shard: Shard, known: Tensor | None, files: _Files) -> None:
    """Copies what each saved piece shares with the shard."""
    known = _fitting(shard, known, files.folder)
    for piece in known.pieces:
        common = intersect(piece.offsets, piece.shape, tuple(shard.offsets), tuple(shard.local.shape))
        if common is None:
            continue
        begin, end = piece.bytes
        if end > len(files[piece.file]):
            raise CheckpointError(
                f"is damaged: tensor '{shard.name}' reaches beyond its end",
                where=str(files.folder / piece.file),
                fix=manifest.ANOTHER,
            )
        saved = files[piece.file][begin:end].view(DTYPES[known.dtype]).view(piece.shape)
        shard.local[_inside(common, shard.offsets)] = saved[_inside(common, piece.offsets)]


def _inside(box: tuple[tuple[int, ...], tuple[int, ...]], origin: tuple[int, ...]) -> tuple[slice, ...]:
    """A box (offsets, shape) of the whole tensor, as slices of the piece that starts at `origin`."""
    return tuple(slice(o - at, o - at + n) for o, n, at in zip(*box, origin, strict=True))


def _fitting(shard: Shard, known: Tensor | None, folder: Path) -> Tensor:
    """The saved tensor, if it can fill the shard."""
    if known is None:
        where = str(folder / manifest.FILE)
        raise CheckpointError(f"tensor '{shard.name}' is missing", where=where, fix=_OTHER_MODEL)
    where = str(folder / (known.pieces[0].file if known.pieces else manifest.FILE))
    if known.shape != tuple(shard.global_shape):
        shapes = f"shape {list(known.shape)}, the job makes it {list(shard.global_shape)}"
        raise CheckpointError(f"tensor '{shard.name}' has {shapes}", where=where, fix=_OTHER_MODEL)
    dtype = DTYPES[known.dtype]
    if dtype != shard.local.dtype and not (dtype.is_floating_point and shard.local.is_floating_point()):
        types = f"{dtype}, the job makes it {shard.local.dtype}"
        raise CheckpointError(f"tensor '{shard.name}' is {types}", where=where, fix=_OTHER_MODEL)
    return known
