"""The parameter server's transport against a raw TCP copy: a push of 64 MiB and a pull of 64 MiB, transfer only.

    python benchmarks/push_pull.py [--mib 64] [--pieces 16] [--blocks 24] [--starts 3]

Two processes, one thread each, on loopback; the same tensors on both sides of all contenders, allocated and touched
before. connection: frames through `shoal.sync.server.wire`, authenticated headers, received into the server's and the
worker's tensors. station: the path that a run takes, messages through `shoal.sync.server.node.station` with its queues
and threads, received into memory that is given back (what a run does with the numbers then is left out). raw:
`sendall` and `recv_into` of each piece on a plain socket, as the kernel makes it, the shortest
program that does this. raw, tuned: with the transport's own socket options (buffers that fit into the cache), so that
it shows what frames and codes cost, while `raw` shows what options bring. A/A: connection against connection in two
more processes. They take turns, block by block.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from queue import Queue
from threading import Event
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.paired import ratio
from benchmarks.turns import over_starts, take_turns

CONTENDERS = ("connection", "station", "raw", "raw, tuned", "connection again")
TIMEOUT = 600.0


def rank_main(seat: Any, contender: str, folder: str, mib: int, pieces: int, exchanges: int) -> None:
    """Rank 0 is the worker, rank 1 the server. A block is so many exchanges, its seconds are those of one."""
    import torch

    torch.set_num_threads(1)
    length = (mib << 20) // 4 // pieces
    out, back = ([torch.ones(length) for _ in range(pieces)] for _ in range(2))
    begin = {"connection": by_connection, "station": by_station}.get(contender.split()[0], by_socket)
    with begin(Path(folder, f"{contender} port"), seat.member, out, back, "tuned" in contender) as exchange:

        def block() -> float:
            start = time.perf_counter()
            for _ in range(exchanges):
                exchange()
            return (time.perf_counter() - start) / exchanges

        block()
        take_turns(folder, contender, seat.member, block)


@contextmanager
def by_connection(
    port: Path, rank: int, out: Sequence[Any], back: Sequence[Any], _: bool = False
) -> Iterator[Callable[[], object]]:
    from shoal.sync.server.wire import Connection, Credentials, Listener, connect

    trusted, ends, done = Credentials("the token of this benchmark"), Queue[Connection](), Event()

    def handle(connection: Connection) -> None:
        """The rank's own thread serves; this one keeps the connection open."""
        ends.put(connection)
        done.wait()

    def push() -> None:
        connection.send(b"header", out, timeout=TIMEOUT)

    def pull() -> None:
        connection.receive(lambda *_: back, timeout=TIMEOUT)

    if rank == 0:
        with connect("127.0.0.1", await_port(port), credentials=trusted, timeout=TIMEOUT) as connection:
            yield lambda: (push(), pull())
        return
    with Listener(handle, credentials=trusted) as listener:
        tell_port(port, listener.address[1])
        connection = ends.get(timeout=TIMEOUT)
        try:
            yield lambda: (pull(), push())
        finally:
            done.set()


@contextmanager
def by_station(
    port: Path, rank: int, out: Sequence[Any], back: list[Any], _: bool = False
) -> Iterator[Callable[[], object]]:
    """back: becomes what came last, until the next exchange."""
    import torch

    from shoal.sync.server import messages as m
    from shoal.sync.server.messages import Address, Key, Piece
    from shoal.sync.server.node.book import Book
    from shoal.sync.server.node.station import Said, Station
    from shoal.sync.server.wire import Credentials

    worker, shard = Address("worker", 0, 1), Address("shard")
    pieces = tuple(Piece(str(number), (0,), tuple(tensor.shape)) for number, tensor in enumerate(out))
    clocks = count()

    def come() -> m.AnyMessage:
        event = station.next(TIMEOUT)
        assert isinstance(event, Said), event
        if event.tensors:
            back[:] = event.tensors
            station.give_back(event.tensors)
        return event.message

    def ask() -> None:
        key = Key(0, 0, next(clocks))
        station.send(shard, m.Stage(key, 0, 1, pieces), out)
        station.send(shard, m.Pull(key, 0, pieces))
        come()

    def answer() -> None:
        come()
        asked = come()
        assert isinstance(asked, m.Pull), asked
        station.send(worker, m.Pulled(asked.key, 0, 0, pieces), out)

    trusted, calls = Credentials("the token of this benchmark"), ("shard",) if rank == 0 else ()
    with Station(worker if rank == 0 else shard, Book(port.parent), trusted, torch.float32, calls) as station:
        if rank == 1:
            station.listen("127.0.0.1")
        yield ask if rank == 0 else answer


@contextmanager
def by_socket(
    port: Path, rank: int, out: Sequence[Any], back: Sequence[Any], tuned: bool = False
) -> Iterator[Callable[[], object]]:
    from shoal.sync.server.wire.stream import configure

    sent, received = ([memoryview(tensor.numpy()).cast("B") for tensor in tensors] for tensors in (out, back))

    def push() -> None:
        for piece in sent:
            sock.sendall(piece)

    def pull() -> None:
        for piece in received:
            left = piece
            while left:
                count = sock.recv_into(left)
                if not count:
                    raise EOFError
                left = left[count:]

    with socket.socket() as first:
        if tuned:
            configure(first, loopback=True)
        if rank == 0:
            first.connect(("127.0.0.1", await_port(port)))
            sock = first
            yield lambda: (push(), pull())
            return
        first.bind(("127.0.0.1", 0))
        first.listen()
        tell_port(port, first.getsockname()[1])
        with first.accept()[0] as sock:
            yield lambda: (pull(), push())


def tell_port(file: Path, port: int) -> None:
    unfinished = file.with_suffix(".new")
    unfinished.write_text(str(port))
    unfinished.rename(file)


def await_port(file: Path) -> int:
    while not file.exists():
        time.sleep(0.01)
    return int(file.read_text())


def measure(mib: int, pieces: int, exchanges: int, blocks: int, starts: int) -> dict[str, Any]:
    """Seconds of one exchange, and the transport's speed as a part of the others'."""
    shape = {"mib": mib, "pieces": pieces, "exchanges": exchanges}
    contenders = {name: {"contender": name, **shape} for name in CONTENDERS}
    seconds, _ = over_starts("benchmarks.push_pull:rank_main", contenders, blocks, starts)
    raw, raw_low = ratio(seconds["raw"], seconds["connection"], starts)
    tuned, tuned_low = ratio(seconds["raw, tuned"], seconds["connection"], starts)
    run, run_low = ratio(seconds["raw"], seconds["station"], starts)
    return {
        **shape, "blocks": blocks, "starts": starts,
        "seconds": {name: statistics.median(column) for name, column in seconds.items()},
        "of_raw": raw, "of_raw_low": raw_low, "of_tuned": tuned, "of_tuned_low": tuned_low,
        "station_of_raw": run, "station_of_raw_low": run_low,
        "aa": ratio(seconds["connection again"], seconds["connection"])[0],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    moved = 2 * found["mib"] / 1024
    lines = [f"push and pull of {found['mib']} MiB in {found['pieces']} pieces, medians of {found['blocks']} blocks:"]
    for name, seconds in found["seconds"].items():
        lines.append(f"  {name:<17} {seconds * 1000:7.1f} ms   {moved / seconds:5.2f} GiB/s")
    lines.append(
        f"speed of connection ÷ raw {found['of_raw']:.3f} (≥ {found['of_raw_low']:.3f})   ÷ raw, tuned "
        f"{found['of_tuned']:.3f} (≥ {found['of_tuned_low']:.3f})   A/A {found['aa']:.3f}"
    )
    lines.append(f"speed of station ÷ raw {found['station_of_raw']:.3f} (≥ {found['station_of_raw_low']:.3f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="of a push, and of a pull (default 64)")
    parser.add_argument("--pieces", type=int, default=16, help="tensors that these are (default 16)")
    parser.add_argument("--exchanges", type=int, default=8, help="in a block (default 8)")
    parser.add_argument("--blocks", type=int, default=24, help="paired blocks (default 24)")
    parser.add_argument("--starts", type=int, default=3, help="that the blocks are spread over (default 3)")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    asked = parser.parse_args()
    found = measure(asked.mib, asked.pieces, asked.exchanges, asked.blocks, asked.starts)
    print(json.dumps(found) if asked.format == "json" else table(found))


if __name__ == "__main__":
    main()
