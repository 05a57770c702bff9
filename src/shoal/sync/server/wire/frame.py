"""What a frame looks like: everything before its buffers, packed, checked against limits, and authenticated.

    prefix   magic, version, flags, length of the header, number of buffers, sequence number
    table    of each buffer: its length in bytes, its CRC-32 (0 where payload is not checked)
    header   the caller's bytes
    tag      HMAC-SHA256 (RFC 2104) of all of the above, with the key of this session and direction
    buffers  raw bytes

All numbers are big-endian. The sequence number counts the frames of one direction from 0.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAGIC = b"shlf"
VERSION = 1
CHECKED = 1
TAG = 32
PREFIX = struct.Struct("!4sBBxxIIQ")
_ENTRY = struct.Struct("!QI")


@dataclass(frozen=True)
class Limits:
    """What a peer may ask for in one frame; more ends the connection before any memory is taken for it."""

    header: int = 1 << 25
    """Bytes of a header. A message names each tensor in it in some 60 bytes."""
    buffers: int = 1 << 19
    """Number of buffers. DeepSeek-V3 has 45,000 matrices; a new copy of a shard gets those of AdamW, too."""
    payload: int = 1 << 40
    """Bytes of all buffers together. What they are must fit the message before there is memory for them."""


class FrameError(ConnectionError):
    """A frame that must not be believed. The connection has been closed. `reason`: one or two words, to count by."""

    def __init__(self, reason: str, text: str):
        self.reason = reason
        super().__init__(text)


class Prefix(NamedTuple):
    """The part of fixed length, by which the receiver knows how much to read next."""

    checked: bool
    header: int
    buffers: int
    sequence: int

    @property
    def rest(self) -> int:
        """Bytes from here to the first buffer."""
        return self.buffers * _ENTRY.size + self.header + TAG


def pack(
    key: bytes, sequence: int, header: bytes, lengths: Sequence[int], checksums: Sequence[int] | None = None
) -> bytes:
    """Everything before the buffers. checksums: one for each buffer, or None where payload is not checked."""
    flags = 0 if checksums is None else CHECKED
    prefix = PREFIX.pack(MAGIC, VERSION, flags, len(header), len(lengths), sequence)
    table = b"".join(map(_ENTRY.pack, lengths, [0] * len(lengths) if checksums is None else checksums))
    told = prefix + table + header
    return told + hmac.digest(key, told, "sha256")


def read_prefix(data: bytes | bytearray, limits: Limits) -> Prefix:
    """FrameError where this is no frame of ours, or asks for more than the limits."""
    magic, version, flags, header, buffers, sequence = PREFIX.unpack(data)
    if magic != MAGIC or version != VERSION:
        raise FrameError("no frame", "sent something that is not a frame")
    if header > limits.header or buffers > limits.buffers:
        raise FrameError(
            "too large", f"announced a header of {header:,} bytes and {buffers:,} buffers; at most {limits.header:,}"
            f" and {limits.buffers:,} are taken",
        )  # fmt: skip
    return Prefix(flags == CHECKED, header, buffers, sequence)


def read_rest(
    key: bytes, expected: int, data: bytes | bytearray, prefix: Prefix, rest: bytes | bytearray, limits: Limits
) -> tuple[bytes, list[int], list[int]]:
    """(header, length of each buffer, CRC-32 of each buffer) of what was read as `data` and then `rest`.

    expected: the sequence number that is due. FrameError where the frame is not the peer's next one.
    """
    tag = hmac.digest(key, bytes(data) + bytes(rest[:-TAG]), "sha256")
    if not hmac.compare_digest(tag, bytes(rest[-TAG:])):
        raise FrameError("not authentic", "sent a frame whose header is not authentic")
    if prefix.sequence != expected:
        raise FrameError("out of order", f"sent frame {prefix.sequence}, where {expected} was due")
    table = memoryview(rest)[: prefix.buffers * _ENTRY.size]
    entries = list(_ENTRY.iter_unpack(table))
    if (total := sum(length for length, _ in entries)) > limits.payload:
        raise FrameError("too large", f"announced {total:,} bytes; at most {limits.payload:,} are taken")
    header = bytes(rest[len(table) : -TAG])
    return header, [length for length, _ in entries], [checksum for _, checksum in entries]
