"""A peer that is killed in the middle of a transfer, and a network that cuts, delays and repeats frames."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from queue import Queue

import pytest

from shoal.sync.server.wire import Connection, Listener, connect
from tests.sync.server.faulty import Faulty
from tests.sync.server.killed import SIZE
from tests.sync.server.peers import TRUSTED, echo, eventually, serving


def test_a_worker_that_is_killed_in_the_middle_of_a_push_and_a_pull():
    """64 MiB are on the way in both directions, and the server knows within a second of the kill."""
    errors: Queue[tuple[Exception, float]] = Queue()
    pushing, killed = threading.Event(), threading.Event()
    place = bytearray(SIZE)

    def into(header: bytes, lengths: list[int]) -> list[bytearray] | None:
        if header == b"pull":
            return None
        pushing.set()
        assert killed.wait(120)
        return [place]

    def serve(connection: Connection) -> None:
        try:
            connection.receive(into, timeout=180)
            connection.send(b"weights", [place], timeout=180)
        except Exception as error:
            errors.put((error, time.monotonic()))
            raise

    with Listener(serve, credentials=TRUSTED) as listener:
        command = [sys.executable, "-m", "tests.sync.server.killed", str(listener.address[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert pushing.wait(120)
            assert process.stdout.readline() == "in the middle of a pull\n"
            start = time.monotonic()
            process.kill()
            killed.set()
            for _ in range(2):
                error, when = errors.get(timeout=60)
                assert isinstance(error, ConnectionError)
                assert "worker 3 (127.0.0.1:" in str(error)
                assert when - start < 1
        assert eventually(lambda: listener.ended["cut off"] == 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_bad_network_spoils_no_frame(seed: int):
    """Every question gets its own answer, with as many connections as it takes."""
    answers, connection = {}, None
    with (
        Listener(echo, credentials=TRUSTED) as listener,
        Faulty(listener.address, seed, cut=0.1, duplicate=0.1, delay=0.1, seconds=0.01) as network,
    ):
        while len(answers) < 60:
            number = len(answers)
            question, payload = f"question {number}".encode(), bytes([number]) * (997 * number)
            try:
                connection = connection or connect(*network.address, credentials=TRUSTED, timeout=20)
                connection.send(question, [payload], timeout=20)
                answer = connection.receive(timeout=20)
                # Of a question that was sent before the connection was lost, no answer comes on the next one.
                assert answer == (question, [payload])
                answers[number] = answer
            except ConnectionError:
                if connection:
                    connection.close()
                connection = None
        if connection:
            connection.close()
        assert all(count > 0 for count in network.happened.values())
        assert eventually(lambda: listener.ended["out of order"] > 0)
    assert serving() == 0


def test_faults_come_by_the_seed():
    def faults(seed: int) -> list[int]:
        with Listener(echo) as listener, Faulty(listener.address, seed, delay=0.5, seconds=0) as network:
            seen = []
            with connect(*network.address, timeout=20) as connection:
                for _ in range(20):
                    connection.send(b"", timeout=20)
                    connection.receive(timeout=20)
                    seen.append(network.happened["delay"])
            return seen

    assert faults(3) == faults(3) != faults(4)
