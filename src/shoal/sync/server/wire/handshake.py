"""How two sides prove to each other that they know the job token, and agree on keys for what follows.

    connecting side                      listening side
    magic c, version, 0, nonce  ------>
                                <------  magic s, version, flags, nonce
    name, proof as "client"     ------>
                                <------  verdict, proof as "server"

A proof is the HMAC-SHA256 of everything both have said so far, the name, and under TLS the listener's certificate, with
the token as key and the role as label (challenge and response in both directions, as in ISO/IEC 9798-4, mutual
authentication in three passes). The proof of one role is none of the other, so that it cannot be reflected, nor can it
be replayed, since both gave a nonce. The listener proves nothing to somebody who has not: who connects as a stranger
learns nothing of the token. The keys of the two directions are made in the same way, with labels of their own.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass

from shoal.errors import JobError
from shoal.sync.server.wire.frame import VERSION, FrameError
from shoal.sync.server.wire.stream import Stream

_HELLO = struct.Struct("!4sBB32s")
_PROOF = struct.Struct("!64s32s")
_VERDICT = struct.Struct("!B32s")
_CLIENT, _SERVER = b"shlc", b"shls"
_NAME = 64
_WELCOME, _WRONG_TOKEN, _FULL = range(3)
SAME_TOKEN = "give both sides the same token"
SAME_PROGRAM = "start the same shoal on both sides"
"""What to do about a side that is not let in."""


@dataclass(frozen=True)
class Session:
    """What both sides agreed on. checked: whether payload has CRCs. name: how the connecting side calls itself."""

    send_key: bytes
    receive_key: bytes
    checked: bool
    name: str


def ask(stream: Stream, token: str, name: str, fingerprint: bytes, deadline: float) -> Session:
    """The connecting side. fingerprint: of the listener's certificate, empty without TLS.

    JobError where the listener is another program or version, or refuses; ConnectionError, TimeoutError.
    """
    ours = _HELLO.pack(_CLIENT, VERSION, 0, secrets.token_bytes(32))
    try:
        stream.write([memoryview(ours)], deadline)
    except ConnectionError:
        # What it said before it went may tell why: that it does not take this side's certificate.
        _read(stream, 1, deadline)
        raise
    theirs = _read(stream, _HELLO.size, deadline)
    magic, version, checked, _ = _HELLO.unpack(theirs)
    if magic != _SERVER or version != VERSION:
        found = "is no parameter server" if magic != _SERVER else f"speaks version {version}, this side {VERSION}"
        raise JobError(f"what listens there {found}", where=stream.peer, fix=SAME_PROGRAM)
    padded = name.encode()[:_NAME].ljust(_NAME, b"\0")
    said = ours + theirs + padded + fingerprint
    stream.write([memoryview(_PROOF.pack(padded, _code(token, "client", said)))], deadline)
    verdict, proof = _VERDICT.unpack(_read(stream, _VERDICT.size, deadline))
    if verdict == _FULL:
        raise JobError("the listener has as many connections as it takes", where=stream.peer, fix="start fewer workers")
    if verdict != _WELCOME or not hmac.compare_digest(proof, _code(token, "server", said)):
        who = "the listener refuses this side's job token" if verdict else "the listener does not know the job token"
        raise JobError(who, where=stream.peer, fix=SAME_TOKEN)
    return Session(_code(token, "client to server", said), _code(token, "server to client", said), bool(checked), name)


def answer(
    stream: Stream, token: str, checked: bool, fingerprint: bytes, admit: Callable[[], bool], deadline: float
) -> Session:
    """The listening side. admit: whether there is a place for one more; asked for those that know the token only.

    FrameError where the other side is not to be let in; ConnectionError, TimeoutError.
    """
    theirs = _read(stream, _HELLO.size, deadline)
    magic, version, _, _ = _HELLO.unpack(theirs)
    if magic != _CLIENT:
        raise FrameError("no greeting", f"{stream.peer} is no worker")
    ours = _HELLO.pack(_SERVER, VERSION, checked, secrets.token_bytes(32))
    stream.write([memoryview(ours)], deadline)
    if version != VERSION:
        raise FrameError("another version", f"{stream.peer} speaks version {version}, this side {VERSION}")
    padded, proof = _PROOF.unpack(_read(stream, _PROOF.size, deadline))
    said = theirs + ours + padded + fingerprint
    if not hmac.compare_digest(proof, _code(token, "client", said)):
        stream.write([memoryview(_VERDICT.pack(_WRONG_TOKEN, bytes(32)))], deadline)
        raise FrameError("wrong token", f"{stream.peer} does not know the job token")
    full = not admit()
    verdict = _FULL if full else _WELCOME
    stream.write([memoryview(_VERDICT.pack(verdict, _code(token, "server", said)))], deadline)
    if full:
        raise FrameError("full", f"{stream.peer} is one connection too many")
    name = "".join(c for c in padded.rstrip(b"\0").decode(errors="replace") if c.isprintable())
    return Session(_code(token, "server to client", said), _code(token, "client to server", said), checked, name)


def _read(stream: Stream, size: int, deadline: float) -> bytes:
    data = bytearray(size)
    stream.read([memoryview(data)], deadline)
    return bytes(data)


def _code(token: str, label: str, said: bytes) -> bytes:
    return hmac.digest(token.encode(), f"shoal {label}\0".encode() + said, "sha256")
