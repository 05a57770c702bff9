"""A rank's shards as the bytes of one safetensors file (header length, JSON header, numbers row by row)."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from shoal.checkpoint.manifest import Piece, Tensor
from shoal.shard import Shard

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Packing:
    """Where everything goes. size: of the file in bytes, 0 if this rank has nothing to write.

    tensors: every tensor this rank knows of, with its pieces in the file, also where these are none.
    places: shard -> its first and last byte + 1.
    """

    size: int
    header: bytes
    tensors: dict[str, Tensor]
    places: list[tuple[Shard, int, int]]

    def copy(self, memory: torch.Tensor) -> None:
        """Puts the file into the first `size` bytes of `memory` (uint8, CPU); returns when it is there."""
        if not self.size:
            return
        memory[: len(self.header)] = torch.frombuffer(bytearray(self.header), dtype=torch.uint8)
        for shard, begin, end in self.places:
            local = shard.local.detach()
            memory[begin:end].view(local.dtype).view(local.shape).copy_(local)


def pack(shards: list[Shard], file: str) -> Packing:
    """Only shards with `owner` are written; a piece of a tensor is named `<tensor>@<offset>,<offset>`."""
    tensors = {s.name: Tensor(NAMES[s.local.dtype], tuple(s.global_shape), []) for s in shards}
    # Widest numbers first, so that each begins at a multiple of its width.
    written = sorted((s for s in shards if s.owner and s.local.numel()), key=lambda s: -s.local.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, size = [], 0
    for shard in written:
        at = "" if shard.whole else "@" + ",".join(map(str, shard.offsets))
        assert shard.name + at not in entries, f"{shard.name + at} is given twice"
        begins.append(size)
        size += shard.local.nbytes
        entries[shard.name + at] = {
            "dtype": NAMES[shard.local.dtype],
            "shape": list(shard.local.shape),
            "data_offsets": [begins[-1], size],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = [(s, len(header) + b, len(header) + b + s.local.nbytes) for s, b in zip(written, begins, strict=True)]
    for shard, begin, end in places:
        piece = Piece(file, tuple(shard.offsets), tuple(shard.local.shape), (begin, end))
        tensors[shard.name].pieces.append(piece)
    return Packing(len(header) + size if written else 0, header, tensors, places)
