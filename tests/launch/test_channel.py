"""Messages arrive whole and in order, however the stream was cut, and files come with theirs."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.launch.channel import Channel
from shoal.launch.messages import Failed, Fork, Returned

json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


class Recorded:
    """A socket that keeps what is sent."""

    def __init__(self) -> None:
        self.data = b""

    def sendall(self, data: bytes) -> None:
        self.data += data


@given(st.lists(json, min_size=1, max_size=4), st.data())
def test_messages_survive_any_cut(values, data):
    recorded = Recorded()
    sender = Channel(recorded, Returned)
    for value in values:
        sender.send(Returned(value))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(recorded.data) - 1), max_size=6)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receiver = Channel(theirs, Returned | Failed)
        received = []
        for start, end in zip([0, *cuts], [*cuts, len(recorded.data)], strict=True):
            ours.sendall(recorded.data[start:end])
            received += receiver.read()
        assert [message.value for message in received] == values
        ours.close()
        with pytest.raises(EOFError):
            receiver.wait()


def test_files_come_in_the_order_of_their_messages():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender, receiver = Channel(ours, Returned), Channel(theirs, Fork)
        for text in (b"one", b"two"):
            read, write = os.pipe()
            os.write(write, text)
            os.close(write)
            with os.fdopen(read, "rb") as file:
                sender.send(Fork(0, "", {}), file.fileno())
        assert receiver.wait() == receiver.wait()
        texts = [os.fdopen(receiver.files.popleft(), "rb").read() for _ in range(2)]
        assert texts == [b"one", b"two"]


def test_drain_returns_what_came_before_the_end():
    ours, theirs = socket.socketpair()
    with theirs:
        receiver = Channel(theirs, Returned)
        assert receiver.drain() == []
        with ours:
            Channel(ours, Returned).send(Returned(list(range(10_000))))
        assert receiver.drain() == [Returned(list(range(10_000)))]
