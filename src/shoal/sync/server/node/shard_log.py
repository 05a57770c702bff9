"""What workers have pushed to a shard of one copy, on a disk: so that it is there after a crash.

Segments, one for each checkpoint that was begun: `<version>.log`. In a segment, first, where stale gradients are
compensated by it, the weights that workers computed on at that version. Of each of these and of each push: length and
CRC-32 of its header, the header (msgpack: the message, and the CRC-32 of each tensor's bytes), the tensors' bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from shoal.durable import sync
from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server.node import frames
from shoal.sync.server.wire.buffers import to_send

Logged = m.Stage | m.Backup
_HEAD = struct.Struct("<II")
# Seconds that a process which was killed may take to be gone.
_PATIENCE = 10.0


class _Entry(msgspec.Struct, array_like=True):
    message: bytes
    lengths: tuple[int, ...]
    checksums: tuple[int, ...]


class ShardLog:
    """OSError where the disk is full: what was not written was not staged either."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        """folder: of this shard alone. dtype: of gradients that are not encoded."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dtype = folder, dtype
        self._version = max([version for version, _ in self._segments()], default=0)
        self._file = self._open(self._version)

    def read(self, version: int = 0) -> Iterator[tuple[Logged, Sequence[Tensor]]]:
        """All that is not part of `version` for sure, in the order in which it came; of a segment, up to the first push
        that is torn."""
        segments = self._segments()
        since = max([first for first, _ in segments if first <= version], default=0)
        for first, path in segments:
            if first >= since:
                yield from _entries(path, self.dtype)

    def append(self, message: Logged, tensors: Sequence[Tensor], durable: bool) -> None:
        """durable: returns when it is on the disk, and all before it."""
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        views = [to_send(tensor) for tensor in frames.buffers(tensors)]
        entry = _Entry(m.encode(message), tuple(map(len, views)), tuple(map(zlib.crc32, views)))
        header = msgspec.msgpack.encode(entry)
        try:
            head = _HEAD.pack(len(header), zlib.crc32(header)) + header
            for left in (memoryview(head), *views):
                while left:
                    left = left[os.write(self._file, left) :]
        except OSError:
            # Half of it would hide what comes after.
            os.ftruncate(self._file, start)
            os.lseek(self._file, start, os.SEEK_SET)
            raise
        if durable:
            os.fdatasync(self._file)

    def turn(self, version: int) -> None:
        """From now on into a new segment: what comes is not part of `version`."""
        if version != self._version:
            os.close(self._file)
            self._version, self._file = version, self._open(version)

    def forget(self, version: int) -> None:
        """A checkpoint of `version` is complete: removes the segments before it."""
        for first, path in self._segments():
            if first < min(version, self._version):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._file)

    def _segments(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem), path) for path in self.folder.glob("*.log") if path.stem.isdigit())

    def _open(self, version: int) -> int:
        path = self.folder / f"{version:010d}.log"
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        whole = sum(size for size, _, _ in _walk(path))
        os.ftruncate(file, whole)
        os.lseek(file, whole, os.SEEK_SET)
        sync(self.folder)
        return file


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Within, no other process writes a log there; the kernel lets go whatever ends this one. JobError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    fix = "end the `shoal join` or the run that holds it"
                    raise JobError("another process holds this server shard", where=str(folder), fix=fix) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(file)


def _walk(path: Path) -> Iterator[tuple[int, _Entry, bytes]]:
    """(bytes it takes, entry, payload) of each whole push."""
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, checksum = _HEAD.unpack(head)
            header = file.read(length)
            if len(header) < length or zlib.crc32(header) != checksum:
                return
            entry = msgspec.msgpack.decode(header, type=_Entry)
            payload = file.read(sum(entry.lengths))
            if len(payload) < sum(entry.lengths) or not _sound(entry, payload):
                return
            yield _HEAD.size + length + len(payload), entry, payload


def _sound(entry: _Entry, payload: bytes) -> bool:
    parts = _parts(entry, memoryview(payload))
    return all(zlib.crc32(part) == checksum for part, checksum in zip(parts, entry.checksums, strict=True))


def _parts(entry: _Entry, payload: memoryview) -> Iterator[memoryview]:
    start = 0
    for length in entry.lengths:
        yield payload[start : start + length]
        start += length


def _entries(path: Path, dtype: torch.dtype) -> Iterator[tuple[Logged, Sequence[Tensor]]]:
    for _, entry, payload in _walk(path):
        message = m.decode(entry.message)
        assert isinstance(message, Logged), "nothing else is logged"
        tensors = frames.places(message, entry.lengths, dtype)
        for tensor, part in zip(tensors, _parts(entry, memoryview(payload)), strict=True):
            memoryview(to_send(tensor))[:] = part
        yield message, tensors
