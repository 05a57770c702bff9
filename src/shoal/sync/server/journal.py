"""The coordinator's journal as bytes: records with checksums, and what is left of them after a crash."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

import msgspec

from shoal.errors import CheckpointError
from shoal.sync.server.records import AnyRecord, Record

MAGIC = b"shoal-journal-1\n"
_HEAD = struct.Struct("<II")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyRecord)


def encode(records: Iterable[Record]) -> bytes:
    """Records to append: for each its length and CRC-32 (both little-endian, 4 bytes), then msgpack.

    A file begins with MAGIC.
    """
    parts = []
    for record in records:
        payload = _encoder.encode(record)
        parts.append(_HEAD.pack(len(payload), zlib.crc32(payload)) + payload)
    return b"".join(parts)


def decode(data: bytes, where: str = "journal") -> tuple[list[AnyRecord], int]:
    """(whole records, bytes that they take): a host cuts its file to so many bytes before it appends more.

    A last record that is torn (the host died while writing it, so nothing followed from it) is dropped. Damage before
    whole records, or another file, raises CheckpointError.
    """
    if data and not data.startswith(MAGIC):
        if MAGIC.startswith(data):
            return [], 0
        raise CheckpointError("not a journal of a parameter server", where=where, fix="name the file of this run")
    records, position = [], min(len(MAGIC), len(data))
    while (found := _record(data, position)) is not None:
        records.append(found[0])
        position = found[1]
    if position + _HEAD.size <= len(data):
        after = position + _HEAD.size + _HEAD.unpack_from(data, position)[0]
        if _record(data, after) is not None:
            raise CheckpointError(
                f"damaged at byte {position}, before records that are whole", where=where,
                fix="start from the last checkpoint: what was acknowledged after the damage cannot be known",
            )  # fmt: skip
    return records, position


def _record(data: bytes, position: int) -> tuple[AnyRecord, int] | None:
    """The record at `position` and where it ends; None if there is no whole one."""
    start = position + _HEAD.size
    if start > len(data):
        return None
    length, checksum = _HEAD.unpack_from(data, position)
    payload = data[start : start + length]
    if len(payload) < length or zlib.crc32(payload) != checksum:
        return None
    try:
        return _decoder.decode(payload), start + length
    except msgspec.DecodeError:
        return None
