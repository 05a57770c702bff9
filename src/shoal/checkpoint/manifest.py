"""The manifest: what a checkpoint holds, in which bytes of which file, sealed with a checksum of its own.

On disk it is one object, `{"sha256":"<of the manifest's bytes>","manifest":{...}}`. SHA-256 because it is
the fastest of hashlib's sound ones where the processor knows it (measured: 1.1 GiB/s a core; BLAKE2b 0.9).
"""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import CheckpointError

FILE = "manifest.json"
FORMAT = 1
ANOTHER = "take an earlier checkpoint of the run; resuming takes the newest undamaged one by itself"


class Piece(msgspec.Struct, frozen=True):
    """A box of a tensor, stored row by row in `file` from byte `bytes[0]` to `bytes[1]`."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    bytes: tuple[int, int]


class Tensor(msgspec.Struct, frozen=True):
    """A logical tensor. dtype: as safetensors names it, e.g. `BF16`. shape: of the whole."""

    dtype: str
    shape: tuple[int, ...]
    pieces: list[Piece]


class File(msgspec.Struct, frozen=True):
    """size: in bytes. sha256: of the whole file, in hexadecimal digits."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """values: what the run keeps beside tensors. files: by name in the folder. tensors: by canonical name."""

    format: int = FORMAT
    step: int
    values: dict[str, Any]
    files: dict[str, File]
    tensors: dict[str, Tensor]


def seal(body: bytes) -> bytes:
    """`body`, which is JSON, inside an object that carries its checksum."""
    return b'{"sha256":"%s","manifest":%s}\n' % (sha256(body).hexdigest().encode(), body)


_BEFORE, _AFTER = seal(b"").index(b"}"), len(b"}\n")


def unseal(sealed: bytes) -> bytes | None:
    """What `seal` was given, or None if any bit is not as `seal` wrote it."""
    body = sealed[_BEFORE:-_AFTER]
    return body if sealed == seal(body) else None


def read(folder: Path) -> Manifest:
    """Raises CheckpointError if the manifest is missing, damaged, or of a newer format."""
    path = folder / FILE
    try:
        body = unseal(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError("is missing", where=str(path), fix=ANOTHER) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path), fix=ANOTHER) from None
    if body is None:
        raise CheckpointError("is damaged: it does not match its own checksum", where=str(path), fix=ANOTHER)
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
        known = manifest.format == FORMAT
    except msgspec.ValidationError:
        known = False
    if not known:
        raise CheckpointError(
            "was written by another version of shoal", where=str(path), fix=f"this one reads format {FORMAT}"
        )
    return manifest


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all ranks together. CheckpointError unless every element is saved exactly once."""
    joined: dict[str, Tensor] = {}
    for rank, tensors in enumerate(parts):
        for name, tensor in tensors.items():
            known = joined.setdefault(name, Tensor(tensor.dtype, tensor.shape, []))
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(
                    f"tensor '{name}' is {tensor.dtype} {list(tensor.shape)} on rank {rank} "
                    f"and {known.dtype} {list(known.shape)} on an earlier one"
                )
            known.pieces.extend(tensor.pieces)
    for name, tensor in joined.items():
        _check_cover(name, tensor)
    return joined


def _check_cover(name: str, tensor: Tensor) -> None:
    """Pieces that lie inside, do not overlap and have the whole's volume cover it exactly once."""
    for piece in tensor.pieces:
        ends = [o + n for o, n in zip(piece.offsets, piece.shape, strict=True)]
        if min(piece.offsets, default=0) < 0 or any(e > n for e, n in zip(ends, tensor.shape, strict=True)):
            raise CheckpointError(f"tensor '{name}': the piece in {piece.file} reaches beyond the whole")
    clash = _overlap(tensor.pieces, len(tensor.shape))
    if clash:
        raise CheckpointError(f"tensor '{name}': {clash[0].file} and {clash[1].file} hold the same elements")
    missing = prod(tensor.shape) - sum(prod(piece.shape) for piece in tensor.pieces)
    if missing:
        raise CheckpointError(f"tensor '{name}': {missing} of {prod(tensor.shape)} elements are saved by no rank")


def _overlap(pieces: list[Piece], dimensions: int) -> tuple[Piece, Piece] | None:
    """Two of the (non-empty) pieces that share an element. n log n if they were cut along one dimension."""
    if dimensions == 0:
        return next(pairwise(pieces), None)
    axis = max(range(dimensions), key=lambda d: len({piece.offsets[d] for piece in pieces}))
    ordered = sorted(pieces, key=lambda piece: piece.offsets[axis])
    for index, one in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.offsets[axis] >= one.offsets[axis] + one.shape[axis]:
                break
            if intersect(one.offsets, one.shape, other.offsets, other.shape):
                return one, other
    return None


def intersect(
    offsets: tuple[int, ...],
    shape: tuple[int, ...],
    other_offsets: tuple[int, ...],
    other_shape: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(offsets, shape) of what two boxes of the same tensor share, or None if that is nothing."""
    begin = tuple(map(max, offsets, other_offsets))
    ends = zip(offsets, shape, other_offsets, other_shape, strict=True)
    size = tuple(min(o + n, p + m) - b for b, (o, n, p, m) in zip(begin, ends, strict=True))
    return (begin, size) if all(n > 0 for n in size) else None
