"""Whatever a peer sends, it is refused and counted, costs no memory, and nobody else notices."""

from __future__ import annotations

import random
import socket
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.sync.server.wire import Connection, Limits, Listener, connect
from shoal.sync.server.wire.frame import MAGIC, PREFIX, VERSION, pack
from shoal.sync.server.wire.handshake import Session
from tests.sync.server.peers import TRUSTED, ended, eventually, raw, serving

LIMITS = Limits(header=4096, buffers=64, payload=1 << 20)
HUGE = [4097, 1 << 16, 1 << 24, 2**32 - 1]
ONE = b"one frame"


def valid(session: Session, sequence: int = 0) -> bytes:
    """Frame `sequence` as an honest peer would send it."""
    buffers = [bytes(1000), b"", bytes(24)]
    return pack(session.send_key, sequence, ONE, list(map(len, buffers))) + b"".join(buffers)


def noise(session: Session, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(1, 4000))


def noise_behind_a_prefix(session: Session, chance: random.Random) -> bytes:
    return PREFIX.pack(MAGIC, VERSION, 0, chance.randrange(4096), chance.randrange(64), 0) + chance.randbytes(6000)


def truncated(session: Session, chance: random.Random) -> bytes:
    frame = valid(session)
    return frame[: chance.randrange(1, len(frame))]


def huge_head(session: Session, chance: random.Random) -> bytes:
    header, buffers = chance.choice([(chance.choice(HUGE), 1), (1, chance.choice(HUGE))])
    return PREFIX.pack(MAGIC, VERSION, 0, header, buffers, 0) + bytes(chance.randrange(100))


def huge_payload(session: Session, chance: random.Random) -> bytes:
    """From one who has the token."""
    lengths = [chance.choice([1 << 20, 1 << 40, 2**64 - 1]) for _ in range(chance.randrange(1, 4))]
    return pack(session.send_key, 0, ONE, [*lengths, 1])


def flipped(session: Session, chance: random.Random) -> bytes:
    """One bit of what is authenticated. (Payload on loopback is not.)"""
    frame = bytearray(valid(session))
    at = chance.randrange(len(frame) - 1024)
    frame[at] ^= 1 << chance.randrange(8)
    return bytes(frame)


def replayed(session: Session, chance: random.Random) -> bytes:
    return valid(session) * 2


def reordered(session: Session, chance: random.Random) -> bytes:
    return valid(session, chance.randrange(1, 2**63)) + valid(session, 0)


def reflected(session: Session, chance: random.Random) -> bytes:
    """What this side might have got."""
    return pack(session.receive_key, 0, ONE, [])


def checked(session: Session, chance: random.Random) -> bytes:
    """With the CRCs that nobody agreed on."""
    return pack(session.send_key, 0, ONE, [4], [0]) + bytes(4)


# Of each kind, why the connection may end, and how many of its frames are good.
KINDS: dict[Callable[[Session, random.Random], bytes], tuple[set[str], int]] = {
    noise: ({"no frame", "cut off"}, 0),
    noise_behind_a_prefix: ({"not authentic"}, 0),
    truncated: ({"cut off"}, 0),
    huge_head: ({"too large"}, 0),
    huge_payload: ({"too large"}, 0),
    flipped: ({"no frame", "too large", "not authentic", "cut off"}, 0),
    replayed: ({"out of order"}, 1),
    reordered: ({"out of order"}, 0),
    reflected: ({"not authentic"}, 0),
    checked: ({"no frame"}, 0),
}


def resident(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("frames", [300, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_malformed_frames(frames: int):
    chance, place, good = random.Random(frames), bytearray(4096), Counter()

    def into(header: bytes, lengths: list[int]) -> list[memoryview]:
        return [memoryview(place)[:length] for length in lengths]

    def handle(connection: Connection) -> None:
        while True:
            frame = connection.receive(into, timeout=60)
            good[frame.header] += 1
            connection.send(frame.header, frame.buffers, timeout=60)

    with (
        Listener(handle, credentials=TRUSTED, limits=LIMITS) as listener,
        connect(*listener.address, credentials=TRUSTED, timeout=20) as honest,
    ):
        tracemalloc.start()
        for number in range(frames):
            if number == frames // 10:
                # Caches are full, and threads have had their stacks.
                (before, _), resident_before = tracemalloc.get_traced_memory(), resident()
                tracemalloc.reset_peak()
            kind = chance.choice([*KINDS])
            reasons, accepted = KINDS[kind]
            had, had_good = Counter(listener.ended), good[ONE]
            sock, session = raw(listener)
            with sock:
                attack(sock, kind(session, chance))
            assert eventually(lambda had=had: listener.ended != had), kind.__name__
            (reason,) = listener.ended - had
            assert reason in reasons, f"{kind.__name__}: {reason}"
            assert good[ONE] - had_good == accepted, kind.__name__
            if number % 10 == 0:
                honest.send(b"%d" % number, [b"undisturbed"], timeout=20)
                assert honest.receive(timeout=20) == (b"%d" % number, [b"undisturbed"])
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert after - before < 200_000
        assert peak - before < 1_000_000
        assert resident() - resident_before < 16 << 20
        assert sum(listener.ended.values()) == frames
        assert len(good) == 1 + (frames + 9) // 10


def attack(sock: socket.socket, data: bytes) -> None:
    """Sends all of it, and waits until the listener has had enough."""
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        # It may have had enough before the end.
        return
    assert ended(sock)


@pytest.mark.parametrize("greetings", [100, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_malformed_greetings(greetings: int):
    """Strangers who have no token, and say anything."""
    chance, hello = random.Random(greetings), b"shlc\1\0"
    with Listener(lambda connection: pytest.fail("let in"), credentials=TRUSTED) as listener:
        for _ in range(greetings):
            said = chance.choice([b"", hello, hello + bytes(32)]) + chance.randbytes(chance.randrange(200))
            with socket.create_connection(listener.address) as sock:
                sock.settimeout(20)
                attack(sock, said)
        assert eventually(lambda: sum(listener.ended.values()) == greetings)
        assert set(listener.ended) <= {"no greeting", "wrong token", "closed"}
        assert min(listener.ended[why] for why in ("no greeting", "wrong token")) > greetings // 10
    assert serving() == 0
