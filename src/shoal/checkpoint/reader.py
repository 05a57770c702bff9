"""Loading: the pieces that some layout saved, into the shards that another one wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint import manifest
from shoal.checkpoint.blocks import BLOCK, ITEM_BYTES, Box, read, split
from shoal.checkpoint.contents import model_tensors
from shoal.checkpoint.health import verify
from shoal.checkpoint.manifest import Manifest, Piece, Tensor, intersect
from shoal.checkpoint.pack import DTYPES
from shoal.errors import CheckpointError
from shoal.shard import Shard

_OTHER_MODEL = "was it saved by another model or optimizer? Use the job.toml of the run that saved it"


def load(folder: Path, wanted: Iterable[Shard], *, verified: bool = False) -> dict[str, Any]:
    """Fills each shard's `local` in place, on its device, and returns the saved values.

    Whatever cut of the tensors was saved, only the bytes that are needed are read, through a buffer of 1 MiB.
    Floating-point types convert into each other; all others must be equal. State of a tensor that is not in a
    checkpoint from before the first update stays as it is. verified: `newest` has just computed the checksums, so
    they are not computed again. Raises CheckpointError that names file and tensor if anything is damaged,
    missing, or of another shape or kind.
    """
    what, buffer = _trusted(folder, verified), memoryview(bytearray(BLOCK))
    for shard in wanted:
        if not _untouched(shard.name, what):
            _fill(shard, what.tensors.get(shard.name), folder, buffer)
    return what.values


def fit(folder: Path, wanted: Iterable[Shard]) -> None:
    """Raises CheckpointError where `load` would for what is missing or of another shape or kind; reads no numbers, so
    that the shards may be on the meta device."""
    what = manifest.read(folder)
    for shard in wanted:
        if not _untouched(shard.name, what):
            _fitting(shard, what.tensors.get(shard.name), folder)


def _untouched(name: str, what: Manifest) -> bool:
    """Whether it is state that no update has made yet, and that was therefore not saved: of imported weights."""
    before = what.values.get("update") == {"updates": 0}
    return before and name not in what.tensors and name.partition(".")[2] in what.tensors


def tensors(
    folder: Path, names: Iterable[str] | None = None, *, verified: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor on the CPU) one at a time, in the order of `names`.

    Default: the model's, that is none which is state of another (as `exp_avg.norm.weight` of `norm.weight`).
    Raises CheckpointError as `load` does.
    """
    what, buffer = _trusted(folder, verified), memoryview(bytearray(BLOCK))
    for name in model_tensors(what) if names is None else names:
        known = what.tensors.get(name, Tensor("F32", (), []))
        whole = torch.empty(known.shape, dtype=DTYPES[known.dtype])
        _fill(Shard(name, known.shape, (0,) * whole.ndim, whole), what.tensors.get(name), folder, buffer)
        yield name, whole


def _trusted(folder: Path, verified: bool) -> Manifest:
    for file, reason in [] if verified else verify(folder):
        raise CheckpointError(reason, where=str(file), fix=manifest.ANOTHER)
    return manifest.read(folder)


def _fill(shard: Shard, known: Tensor | None, folder: Path, buffer: memoryview) -> None:
    """Copies what each saved piece shares with the shard."""
    known = _fitting(shard, known, folder)
    for piece in known.pieces:
        common = intersect(piece.offsets, piece.shape, tuple(shard.offsets), tuple(shard.local.shape))
        if common is not None:
            _copy(piece, Box(*common), known.dtype, shard, folder, buffer)


@torch.no_grad()
def _copy(piece: Piece, common: Box, dtype: str, shard: Shard, folder: Path, buffer: memoryview) -> None:
    """Copies a box of a piece to its place in the shard. Nothing is mapped: pages of a file would count as memory."""
    item = ITEM_BYTES[dtype]
    for block in split(common, BLOCK // item):
        view = buffer[: prod(block.shape) * item]
        read(folder, piece, block, item, view, block)
        numbers = torch.frombuffer(view, dtype=DTYPES[dtype]).view(block.shape)
        shard.local[block.within(Box(tuple(shard.offsets), tuple(shard.local.shape)))] = numbers


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
