"""The helper process that writes a rank's part of each checkpoint while the rank trains.

`python -m shoal.checkpoint.writer FD`: FD is the shared memory. Orders come on stdin, answers go to stdout.
The end of stdin is the end of the rank, however that came about, and ends this process at once. It imports no
torch.

Helpers of several ranks share nothing but the file system. Each writes its file and then a description of it,
a `.part`; rank 0's waits for all parts, checks them together, writes the manifest and renames the folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from mmap import ACCESS_READ, mmap
from pathlib import Path
from queue import SimpleQueue

import msgspec

from shoal.checkpoint import folders, manifest
from shoal.checkpoint.manifest import File, Manifest
from shoal.checkpoint.messages import Order, Part, Report, file_name, part_name
from shoal.errors import CheckpointError

# Bytes that are hashed and written at a time.
_CHUNK = 4 << 20
# Training goes first on a busy machine.
_NICE = 5


def main() -> None:
    # The rank decides when this process ends; a signal that goes to a whole process group is the rank's.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    memory = int(sys.argv[1])
    orders: SimpleQueue[Order] = SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    while True:
        report = msgspec.json.encode(obey(orders.get(), memory))
        try:
            os.write(sys.stdout.fileno(), report + b"\n")
        except BrokenPipeError:
            # The rank is gone, and `_listen` has not yet been told.
            os._exit(0)


def _listen(orders: SimpleQueue[Order]) -> None:
    rest = b""
    while read := os.read(sys.stdin.fileno(), 1 << 20):
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            orders.put(msgspec.json.decode(line, type=Order))
    os._exit(0)


def obey(order: Order, memory: int) -> Report:
    """Writes this rank's part and, on rank 0, makes the checkpoint complete. memory: file descriptor."""
    start = time.monotonic()
    folder = Path(order.root) / order.attempt.temporary(folders.name_of(order.step))
    part = _write_part(folder, order, memory)
    error = part.error
    if order.rank == 0:
        try:
            _complete(folder, order, part)
        except (OSError, CheckpointError) as failure:
            error = error or _what(failure)
            shutil.rmtree(folder, ignore_errors=True)
    return Report(time.monotonic() - start, error)


def _what(failure: OSError | CheckpointError) -> str:
    if isinstance(failure, CheckpointError):
        return failure.what
    return (failure.strerror or str(failure)) + (f": {failure.filename}" if failure.filename else "")


def _write_part(folder: Path, order: Order, memory: int) -> Part:
    """What this rank wrote, or why it could not; the same for rank 0's helper to read."""
    data, description = folder / file_name(order.rank), folder / part_name(order.rank)
    try:
        if order.rank == 0:
            folders.sweep(folder.parent, order.attempt)
        folder.mkdir(parents=True, exist_ok=True)
        file = _write_data(data, order.size, memory) if order.size else None
        part = Part(order.tensors, file)
        _write(description, msgspec.json.encode(part))
    except OSError as failure:
        part = Part({}, error=_what(failure))
        # On a full disk, there is space for the description where the data was.
        with contextlib.suppress(OSError):
            data.unlink(missing_ok=True)
            _write(description, msgspec.json.encode(part))
    return part


def _write_data(path: Path, size: int, memory: int) -> File:
    digest = sha256()
    with (
        mmap(memory, size, access=ACCESS_READ) as data,
        memoryview(data) as view,
        _naming(path),
        open(path, "xb", buffering=0) as file,
    ):
        for begin in range(0, size, _CHUNK):
            with view[begin : begin + _CHUNK] as chunk:
                digest.update(chunk)
                written = 0
                while written < len(chunk):
                    written += file.write(chunk[written:])
        os.fsync(file.fileno())
    return File(size, digest.hexdigest())


def _write(path: Path, content: bytes) -> None:
    """Under its name there is never less than the whole content."""
    unfinished = path.with_name(path.name + ".new")
    with _naming(path), open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(unfinished, path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk is an OSError that names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _complete(folder: Path, order: Order, own: Part) -> None:
    """Waits for all parts, checks them together, writes the manifest, and removes what is superseded."""
    parts = _gather(folder, order, own)
    for rank, part in enumerate(parts):
        if part.error:
            raise CheckpointError(f"rank {rank}: {part.error}")
        (folder / part_name(rank)).unlink()
    files = {file_name(rank): part.file for rank, part in enumerate(parts) if part.file}
    tensors = manifest.join([part.tensors for part in parts])
    whole = Manifest(step=order.step, values=order.values, files=files, tensors=tensors)
    _write(folder / manifest.FILE, manifest.seal(msgspec.json.encode(whole)))
    folders.finish(folder, order.step)
    # The new one stands, also where an older one cannot be removed.
    with contextlib.suppress(OSError):
        folders.prune(folder.parent, order.step, order.keep, order.attempt)


def _gather(folder: Path, order: Order, own: Part) -> list[Part]:
    """All ranks' parts, failed ones too: once all are there, nobody writes into the folder any more."""
    parts = {order.rank: own}
    pause, progress = 0.002, time.monotonic()
    while missing := [rank for rank in range(order.world) if rank not in parts]:
        ahead, present = _ahead(order, folder.parent), set(os.listdir(folder))
        for rank in missing:
            if part_name(rank) in present:
                parts[rank] = msgspec.json.decode((folder / part_name(rank)).read_bytes(), type=Part)
                pause, progress = 0.002, time.monotonic()
            elif file_name(rank) in ahead or part_name(rank) in ahead:
                raise CheckpointError(f"rank {rank} lost its helper process before its part was written")
            elif time.monotonic() - progress > order.timeout:
                raise CheckpointError(f"rank {rank} has not written its part after {order.timeout:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return [parts[rank] for rank in range(order.world)]


def _ahead(order: Order, root: Path) -> set[str]:
    """Files of later saves. A rank that has some, and has not finished its part of this one, never will."""
    later = [
        path
        for attempt, path in folders.temporary(root)
        if attempt.nonce == order.attempt.nonce and attempt.count > order.attempt.count
    ]
    return {file.name for path in later for file in path.glob("rank-*")}


if __name__ == "__main__":
    main()
