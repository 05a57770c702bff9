"""What this rank is in with others: the step, its operations of late, and where the program stands.

Nothing is done for this while all goes well: PyTorch's flight recorder notes collectives anyway (c10d keeps the last
2,000). It knows no sends and receives of gloo, so their few places note them here. Both are of the process, not of
one mesh: whoever asks may stand outside of what failed.
"""

from __future__ import annotations

import json
import math
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from msgspec import Struct

# Functions of torch's that send or receive.
_DIRECT = {"send", "recv", "isend", "irecv", "batch_isend_irecv", "_wait_batch_p2p"}
# Of each group (or peer), how many operations are told.
_LATEST = 6


class Operation(Struct):
    """One operation. kind: all_reduce, …, send, recv. along: axes of the layout. ranks: of the group, or the peer.

    number: the how manieth of the group; of a send or recv, of its direction between the two. size: elements of the
    input. begun: nanoseconds. open: not known to be done.
    """

    kind: str
    along: str
    ranks: list[int]
    number: int
    size: int
    begun: int
    open: bool

    @property
    def direct(self) -> bool:
        """Whether it is a send or receive."""
        return self.kind in ("send", "recv")


class Doing(Struct, tag=True):
    """What a rank is in. step: 0 before the first one. waits: its main thread is in an operation (or failed in one).

    direct: that is a send or receive. at: the innermost line that is not a library's. operations: oldest first.
    """

    step: int
    waits: bool
    direct: bool
    at: str
    operations: list[Operation]


class _Notes:
    """Of the mesh that this process has, or had last. groups: of a name, its axes and ranks."""

    def __init__(self, groups: dict[str, tuple[str, list[int]]]):
        self.groups, self.step, self.since = groups, 0, time.time_ns()
        self.sent: dict[tuple[str, int, str], Operation] = {}
        self.counts: Counter[tuple[str, int, str]] = Counter()


_notes = _Notes({})


def begin(groups: dict[str, tuple[str, list[int]]]) -> None:
    """There is a new mesh with these groups: of the name that torch gives one, the axes and the ranks."""
    global _notes
    _notes = _Notes(groups)


def step(number: int) -> None:
    """This step begins."""
    _notes.step = number


def noted(operations: list[Any]) -> list[Any]:
    """Notes `torch.distributed.P2POp`s that are about to begin; returns them."""
    for operation in operations:
        name = operation.group.group_name
        along, ranks = _notes.groups.get(name, (name, []))
        kind = "recv" if operation.op.__name__ == "irecv" else "send"
        peer = ranks[operation.group_peer] if ranks else operation.group_peer
        key = name, peer, kind
        _notes.counts[key] += 1
        # The last one of each, put at the end: the order is that of time.
        _notes.sent.pop(key, None)
        size = operation.tensor.numel()
        _notes.sent[key] = Operation(kind, along, [peer], _notes.counts[key], size, time.time_ns(), True)
    return operations


def along(group: str) -> str:
    """The axes of the layout along which the group of this name lies; empty of one that is not the mesh's."""
    return _notes.groups.get(group, ("", []))[0]


def doing(error: BaseException | None = None) -> Doing:
    """What this rank is in; with an error, what it failed in. Callable from any thread; takes about 0.1 s."""
    frames = _frames(error)
    waits, sends = _waits(frames)
    operations = sorted([*_collectives(), *_notes.sent.values()], key=lambda operation: operation.begun)
    return Doing(_notes.step, waits, sends, _place(frames), operations)


def _frames(error: BaseException | None) -> list[tuple[FrameType, int]]:
    """Frames and their lines, innermost first: of the error's own cause, or of the main thread now."""
    found: list[tuple[FrameType, int]] = []
    if error is None:
        main = threading.main_thread().ident
        frame = sys._current_frames().get(main) if main else None
        while frame is not None:
            found.append((frame, frame.f_lineno))
            frame = frame.f_back
        return found
    while error.__cause__ is not None:
        error = error.__cause__
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        found.insert(0, (trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _waits(frames: Sequence[tuple[FrameType, int]]) -> tuple[bool, bool]:
    """Whether the innermost frame is in an operation or waits for one, and whether that is a send or receive."""
    import torch.distributed as dist

    # While a step is traced, waiting is in a frame of its own.
    inner = [frame for frame, _ in frames if frame.f_code.co_name != "watched"]
    library = str(Path(dist.__file__).parent)
    inside = [f.f_code.co_name for f in takewhile(lambda f: f.f_code.co_filename.startswith(library), inner)]
    # Begun as well as waited for: to begin one with a rank that is gone fails at once.
    if {*inside} & _DIRECT:
        return True, True
    works = [value for frame in inner[:1] for value in frame.f_locals.values() if isinstance(value, dist.Work)]
    direct = any(_kind(work) in ("SEND", "RECV") for work in works)
    return bool(works or inside), direct


def _kind(work: Any) -> str:
    """`SEND`, `ALLREDUCE`, …"""
    from torch._C import _distributed_c10d as c10d

    types: Any = getattr(c10d, "OpType", None)  # not in torch's type stubs
    return types(work._get_op_type()).name if types is not None else ""


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """`training/loop.py:120, _step`: the innermost line of shoal's or of the user's."""
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    for frame, line in frames:
        file = frame.f_code.co_filename
        if not file.startswith((*libraries, "<")):
            return f"{'/'.join(Path(file).parts[-2:])}:{line}, {frame.f_code.co_name}"
    return ""


def _collectives() -> list[Operation]:
    """Of each group of this mesh all that are under way, and the latest; none where this torch cannot tell."""
    of_group: dict[str, list[Operation]] = {}
    for entry in _recorded():
        name, described = entry["process_group"]
        if entry["is_p2p"] or entry["time_created_ns"] < _notes.since:
            continue
        along, ranks = _notes.groups.get(name, (described, []))
        size = sum(math.prod(shape) for shape in entry["input_sizes"])
        kind, number = entry["profiling_name"].partition(":")[2], entry["collective_seq_id"]
        operation = Operation(kind, along, ranks, number, size, entry["time_created_ns"], not entry["retired"])
        of_group.setdefault(name, []).append(operation)
    return [o for found in of_group.values() for i, o in enumerate(found) if o.open or i >= len(found) - _LATEST]


def _recorded() -> list[dict[str, Any]]:
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace_json", None)  # of the flight recorder for what is not NCCL
    recorded: dict[str, Any] = json.loads(dump()) if dump is not None else {}
    return recorded.get("entries", [])
