"""Files in the safetensors format without more of them in memory than a block: headers read, and files written.

The format: 8 bytes with the length of the header, the header (JSON), then numbers row by row
(https://github.com/huggingface/safetensors#format). The library's own `save_file` takes all tensors of a file at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from shoal.checkpoint.blocks import BLOCK, ITEM_BYTES, Box, stream, whole
from shoal.checkpoint.manifest import File, Piece, Tensor
from shoal.errors import ModelError

# What the library takes as a header at most.
_HEADER_BYTES = 100_000_000


class Part(NamedTuple):
    """A box of a stored tensor as it goes into a file. dtype: of the numbers written."""

    name: str
    tensor: Tensor
    box: Box
    dtype: str

    @property
    def key(self) -> str:
        """Its name in the file: a piece of a tensor is `<tensor>@<offset>,<offset>`."""
        return self.name if self.box == whole(self.tensor) else f"{self.name}@{','.join(map(str, self.box.offsets))}"

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.box.shape) * ITEM_BYTES[self.dtype]


Cast = Callable[[memoryview, Part, Box], memoryview]
"""The numbers of a block as others: (bytes, the part that they are of, their place in its tensor) -> bytes."""


def write(
    path: Path, parts: list[Part], source: Path, *, cast: Cast | None = None, advance: Callable[[int], None]
) -> tuple[File, list[Piece]]:
    """Writes a file of the parts, which lie in files of the folder `source`, and waits until it is on the disk.

    parts: widest numbers first, so that each begins at a multiple of its width. cast: for parts whose dtype is not
    that of their tensor. advance: told the bytes written, now and then. Returns size and checksum, and the piece that
    each part is now. Raises OSError for a full disk, CheckpointError for a damaged source.
    """
    header, begins = _header(parts)
    digest, buffer = sha256(header), memoryview(bytearray(BLOCK))
    with open(path, "xb", buffering=0) as file:
        _write_all(file, memoryview(header))
        for part in parts:
            for box, block in stream(source, part.tensor, part.box, buffer):
                if part.dtype != part.tensor.dtype:
                    assert cast is not None
                    block = cast(block, part, box)
                digest.update(block)
                _write_all(file, block)
                advance(len(block))
        os.fsync(file.fileno())
        size = file.tell()
    pieces = [
        Piece(path.name, part.box.offsets, part.box.shape, (begin, begin + part.size))
        for part, begin in zip(parts, begins, strict=True)
    ]
    assert size == pieces[-1].bytes[1]
    return File(size, digest.hexdigest()), pieces


def _header(parts: list[Part]) -> tuple[bytes, list[int]]:
    """The first bytes of the file, and the byte at which each part begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, at = [], 0
    for part in parts:
        assert part.key not in entries, f"{part.key} is given twice"
        begins.append(at)
        at += part.size
        entries[part.key] = {"dtype": part.dtype, "shape": part.box.shape, "data_offsets": [begins[-1], at]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + begin for begin in begins]


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, whose one piece is the place of its bytes in the file. Raises ModelError for a damaged file."""
    try:
        with open(path, "rb") as file:
            total = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(_HEADER_BYTES, total - 8):
                raise ValueError("it ends within its header")
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            tensors = {name: _tensor(path.name, 8 + length, entry) for name, entry in entries.items()}
        ends = sorted(tensor.pieces[0].bytes for tensor in tensors.values())
        if max((end for _, end in ends), default=8 + length) != total:
            raise ValueError("its size is not what its header says")
    except FileNotFoundError:
        raise ModelError("there is no such file", where=str(path), fix="fetch the folder again") from None
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path), fix="fetch the file again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"is damaged: {error}", where=str(path), fix="fetch the file again") from None
    return tensors


def _tensor(file: str, data: int, entry: dict[str, Any]) -> Tensor:
    """data: where the numbers of the file begin. Raises ValueError, KeyError or TypeError for an entry that is none."""
    shape, (begin, end) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    dtype = str(entry["dtype"])
    fits = dtype not in ITEM_BYTES or end - begin == prod(shape) * ITEM_BYTES[dtype]
    if not fits or begin < 0 or end < begin or min(shape, default=0) < 0:
        raise ValueError("bytes and shape of a tensor do not fit together")
    return Tensor(dtype, shape, [Piece(file, (0,) * len(shape), shape, (data + begin, data + end))])
