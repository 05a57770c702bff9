"""What a state machine asks its host to do, in the order in which it asks."""

from __future__ import annotations

from typing import Any

import msgspec

from shoal.sync.server.messages import Address, Message


class Send(msgspec.Struct, frozen=True):
    to: Address
    message: Message
    tensors: tuple[Any, ...] = ()


class Write(msgspec.Struct, frozen=True):
    """Append to the log. durable: be sure that it is on disk before doing what follows.

    what: a record of the coordinator (`records`); a shard's Stage, with its tensors.
    """

    what: Any
    tensors: tuple[Any, ...] = ()
    durable: bool = True


class Keep(msgspec.Struct, frozen=True):
    """A shard is at `version` now, of which it was told to save its part. values: as in Save."""

    version: int
    values: bytes


class Summary(msgspec.Struct, frozen=True):
    """Of a version that is being saved: the records that a journal begins with from there (`Standing.summary`)."""

    version: int
    records: tuple[Any, ...]


Effect = Send | Write | Keep | Summary
