"""The pristine process that ranks are forked from: it imports, waits and forks, and does nothing else.

A process that has run one parallel tensor operation, compiled, or opened a GPU cannot be forked safely: the
child has the memory of those threads but not the threads, and hangs. So launchers, tests and trainers never
fork; they execute this module and ask it to. It counts its threads before each fork.

It lives as long as its launcher, whatever ends that: at the end of their connection it kills all descendants.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from shoal.launch.channel import Channel
from shoal.launch.messages import ASK, Ended, Fork, Refused, Signal

# prctl(2)
_SET_PDEATHSIG, _SET_NAME, _SET_CHILD_SUBREAPER = 1, 15, 36
# What ranks leave behind (helpers that end with their rank) gets so long to end by itself, in seconds.
_FINISH = 0.5

_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0


def resolve(entry: str) -> Callable:
    """The function named `package.module:function`."""
    module, _, function = entry.partition(":")
    return getattr(importlib.import_module(module), function)


def set_name(name: str) -> None:
    """Names this process, as `ps -o comm` and `top` show it; 15 bytes at most."""
    _prctl(_SET_NAME, name.encode()[:15] + b"\0")


def threads() -> list[str]:
    """Names of this process's threads."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        return ["python"] * len(sys._current_frames())
    return [(task / "comm").read_text().strip() for task in tasks.iterdir()]


class Server:
    """Forks on request, reports which children ended. `run` returns in the server and in every child."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.launcher = os.getppid()
        self.children: dict[int, int] = {}
        self.wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.channel, selectors.EVENT_READ)
        self.selector.register(self.wake, selectors.EVENT_READ)
        # Only the end of the connection ends us; a signal that the terminal sends to all is the launcher's.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)
        # A question to ranks, which answer in a thread; it may come before they can.
        signal.pthread_sigmask(signal.SIG_BLOCK, [ASK])
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        # Whatever a dead rank leaves behind becomes our child, so that we can end it.
        _prctl(_SET_CHILD_SUBREAPER, 1)

    def preload(self, modules: Iterable[str]) -> None:
        """Imports what ranks will need. A module that fails is left to the rank, which will report it."""
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception:
                continue
            self._count_threads(f"after importing {module}")
        # Ranks share these objects' memory as long as the collector does not write into them.
        gc.collect()
        gc.freeze()

    def _count_threads(self, when: str) -> None:
        found = threads()
        if len(found) > 1:
            what = f"{when} the fork server has {len(found)} threads ({', '.join(found)}): ranks would hang"
            self.channel.send(Refused(what, "start threads in functions, not when a module is imported"))
            raise SystemExit(1)

    def run(self) -> Callable[[], int] | None:
        """Serves until the launcher is gone, then returns None. In a child: returns what it has to call."""
        while os.getppid() == self.launcher:
            # The time limit is for a launcher that died while a process it had forked holds the connection.
            for key, _ in self.selector.select(timeout=1.0):
                if key.fileobj is self.wake:
                    self.wake.recv(4096)
                    continue
                try:
                    messages = self.channel.read()
                except EOFError:
                    return None
                for message in messages:
                    work = self._obey(message)
                    if work is not None:
                        return work
            self._reap()
        return None

    def _obey(self, message: Fork | Signal) -> Callable[[], int] | None:
        if isinstance(message, Fork):
            return self._fork(message)
        for pid, id in self.children.items():
            if id == message.id:
                os.kill(pid, message.number)
        return None

    def _fork(self, order: Fork) -> Callable[[], int] | None:
        file = self.channel.files.popleft()
        self._count_threads("before a fork")
        server = os.getpid()
        # A SIGTERM to a child that still ignores it, as we do, waits until it no longer does.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            os.close(file)
            self.children[pid] = order.id
            return None
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        self._leave()
        return partial(resolve(order.entry), socket.socket(fileno=file), **order.args)

    def _leave(self) -> None:
        """In a child: forgets all that is the server's. SIGINT stays ignored: the launcher decides."""
        self.wake_no_more()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        for waiting in self.channel.files:
            os.close(waiting)
        self.selector.close()
        for sock in (self.channel, self.wake, self._waker):
            sock.close()

    def wake_no_more(self) -> None:
        """A child that ends writes to no socket any more: ours are closed before the process ends, and the
        interpreter would complain, to whoever reads the launcher's standard error, that it cannot write there."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.children:
                ended = Ended(self.children.pop(pid), os.waitstatus_to_exitcode(status))
                try:
                    self.channel.send(ended)
                except OSError:
                    return

    def end(self) -> None:
        """Kills the children at once, and what they left behind when it has had time to finish."""
        deadline = time.monotonic() + _FINISH
        doomed = set(self.children)
        while time.monotonic() < deadline + 10 * _FINISH:
            for pid in doomed:
                os.kill(pid, signal.SIGKILL)
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            doomed.discard(pid)
            if pid == 0:
                time.sleep(0.01)
            if time.monotonic() > deadline:
                doomed |= _descendants()


def _descendants() -> set[int]:
    """This process's children now, adopted ones included."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(pid) for pid in listed.read_text().split()} if listed.exists() else set()


def main() -> int:
    """`python -m shoal.launch.forkserver FD MODULE...`: FD is the connection to the launcher."""
    set_name("shoal-fork")
    server = Server(Channel(socket.socket(fileno=int(sys.argv[1])), Fork | Signal))
    try:
        server.preload(["torch", "shoal.device", *sys.argv[2:]])
        os.environ.update(resolve("shoal.device:loopback_environment")())
        work = server.run()
    finally:
        server.wake_no_more()
    if work is None:
        server.end()
        return 0
    code = work()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by returning: taking torch apart object by object would cost each rank 0.2 s, and frees nothing.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
