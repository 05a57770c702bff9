"""The communication of a traced step: each operation from when it begins until it is done, whoever waits for it.

All of torch.distributed's operations, those of fully_shard and of a pipeline's schedule too, begin in a method of their
process group. While tracing, these methods are replaced.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch.distributed as dist

from shoal import device, operations
from shoal.mesh import Mesh
from shoal.observe.trace import Tracer

# Methods of ProcessGroup, some with the names of earlier releases of torch.
_METHODS = {
    "all_reduce": ("allreduce", "allreduce_coalesced"),
    "all_gather": ("allgather", "allgather_coalesced", "all_gather_single", "_allgather_base"),
    "reduce_scatter": ("reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base"),
    "all_to_all": ("alltoall", "all_to_all_single", "alltoall_base"),
    "broadcast": ("broadcast",),
    "send": ("send",),
    "recv": ("recv",),
}
# Seconds between two looks at an operation of a device that computes by itself, and for the last ones to end.
_LOOK, _PATIENCE = 1e-4, 5.0

Method = Callable[..., Any]
Landed = Callable[[], None]
Ended = SimpleQueue[BaseException | None]
"""What comes is how it ended."""


class Flights:
    """Makes each operation that begins `within` a flight of the tracer."""

    def __init__(self, tracer: Tracer, mesh: Mesh):
        self.tracer, self.mesh = tracer, mesh
        self._threads: list[Thread] = []
        self._messages: Counter[tuple[str, int, int]] = Counter()
        # By id, what nobody has waited for yet.
        self._open: dict[int, tuple[dist.Work, Landed, Ended | None]] = {}
        self._together: list[Landed] | None = None

    @contextmanager
    def within(self) -> Iterator[None]:
        """At its end, but for a failure, all that began has ended and is recorded."""
        self._wait: Method = dist.Work.wait
        group = dist.ProcessGroup
        with ExitStack() as stack:
            for kind, names in _METHODS.items():
                for name in (name for name in names if name in vars(group)):
                    stack.enter_context(replaced(group, name, functools.partial(self._operation, kind)))
            stack.enter_context(replaced(group, "_start_coalescing", self._start_together))
            stack.enter_context(replaced(group, "_end_coalescing", self._end_together))
            stack.enter_context(replaced(dist.Work, "wait", self._waiting))
            yield
        for thread in self._threads:
            thread.join(_PATIENCE)

    # The functions inside are called `watched`, through which `operations` looks.

    def _operation(self, kind: str, method: Method) -> Method:
        def watched(group: dist.ProcessGroup, tensors: Any, *args: Any, **kwargs: Any) -> Any:
            along = operations.along(group.group_name)
            link = self._link(kind, group, args[0]) if kind in ("send", "recv") else None
            name = f"{kind}, {along}" if along else kind
            landed = self.tracer.flight(name, link)
            # Beginning an operation is no computing, and where cores are few it may take as long as the operation.
            with self.tracer.span(name, "communication"):
                work = method(group, tensors, *args, **kwargs)
                if self._together is not None:
                    self._together.append(landed)
                elif work is not None:
                    self._follow(work, landed)
            return work

        return watched

    def _link(self, kind: str, group: dist.ProcessGroup, peer: int) -> str:
        """The how manieth message from one rank to the other: no message is under way when a step begins."""
        other = dist.get_process_group_ranks(group)[peer]
        source, target = (self.mesh.rank, other) if kind == "send" else (other, self.mesh.rank)
        key = group.group_name, source, target
        self._messages[key] += 1
        return f"{source} to {target}, {self._messages[key]} of group {group.group_name}"

    def _start_together(self, method: Method) -> Method:
        """NCCL: what begins from here is one operation."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._together = []
            return method(*args, **kwargs)

        return watched

    def _end_together(self, method: Method) -> Method:
        def watched(*args: Any, **kwargs: Any) -> Any:
            begun, self._together = self._together or [], None
            work = method(*args, **kwargs)
            if work is not None and begun:
                self._follow(work, functools.partial(_each, begun))
            return work

        return watched

    def _follow(self, work: dist.Work, landed: Landed) -> None:
        on_host = device.waits_on_host(self.mesh.device)
        ended: Ended | None = None
        if on_host:
            try:
                work.get_future().add_done_callback(lambda _: landed())
            except RuntimeError:
                # A send, a receive or a reduce-scatter of gloo's: it tells only who waits that it is done, and only
                # once. So a thread of ours waits, and whoever else does, for this thread.
                ended = SimpleQueue()
            self._open[id(work)] = work, landed, ended
        if on_host and ended is None:
            return
        thread = Thread(target=self._until_done, args=(work, landed, ended), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _until_done(self, work: dist.Work, landed: Landed, ended: Ended | None) -> None:
        error = None
        try:
            if ended is not None:
                self._wait(work)
            while ended is None and not work.is_completed():
                time.sleep(_LOOK)
        except BaseException as failure:  # it belongs to whoever waits for this operation
            error = failure
        landed()
        if ended is not None:
            ended.put(error)

    def _waiting(self, method: Method) -> Method:
        def watched(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            _, landed, ended = self._open.get(id(work), (None, _nothing, None))
            done = True
            if ended is None:
                done = method(work, *args, **kwargs)
            elif (error := ended.get()) is not None:
                raise error
            landed()
            self._open.pop(id(work), None)
            return done

        return watched


def _each(landed: list[Landed]) -> None:
    for land in landed:
        land()


def _nothing() -> None:
    pass


@contextmanager
def replaced(owner: Any, name: str, by: Callable[[Method], Method]) -> Iterator[None]:
    """While it lasts, `owner` has what `by` makes of its method."""
    # What a class has is not always what it gives: without its descriptor, a method of C++ would get no `self`.
    own = vars(owner).get(name)
    setattr(owner, name, by(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)  # it was inherited
        else:
            setattr(owner, name, own)
