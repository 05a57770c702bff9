"""What a forked rank does: takes its seat, then calls what the launcher names until that hangs up."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback

import msgspec
import torch
import torch.distributed as dist

from shoal import device, errors, operations
from shoal.errors import ShoalError
from shoal.launch.channel import Channel
from shoal.launch.failure import LESS_MEMORY
from shoal.launch.forkserver import resolve, set_name
from shoal.launch.messages import ASK, Call, Failed, Returned
from shoal.launch.store import HOST
from shoal.mesh import Seat


def main(sock: socket.socket, name: str, port: int) -> int:
    """Serves calls over `sock`. name: as `ps -o comm` shows the process. port: of the store."""
    set_name(name)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    channel = Channel(sock, Call)
    threading.Thread(target=_tell, args=[channel], daemon=True).start()
    store = dist.TCPStore(HOST, port, is_master=False)
    while True:
        try:
            call = channel.wait()
        except EOFError:
            return 0
        channel.send(_answer(call, store))
        # A call may have asked for signals (SIGTERM = save and stop); the next one starts without.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _tell(channel: Channel) -> None:
    """Says what this rank is in whenever it is asked, whatever the main thread is stuck in."""
    with contextlib.suppress(OSError):
        while True:
            signal.sigwait([ASK])
            channel.send(operations.doing())


def _answer(call: Call, store: dist.Store) -> Returned | Failed:
    torch.set_num_threads(call.threads)
    os.environ["OMP_NUM_THREADS"] = str(call.threads)
    keys = dist.PrefixStore(f"call-{call.number}", store)
    seat = Seat(call.rank, call.world, call.local, call.neighbours, keys)
    try:
        value = resolve(call.entry)(seat, **call.args)
        if dist.is_initialized():
            dist.destroy_process_group()
        # A model that lies in a cycle holds its groups, and their threads would go on in the next call.
        gc.collect()
        # Encoded here, so that a value that is not JSON fails like anything else the entry does.
        return Returned(msgspec.Raw(msgspec.msgpack.encode(value)))
    except BaseException as error:
        return _failed(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _failed(error: BaseException) -> Failed:
    at, follows = time.monotonic(), device.peer_gone(error)
    if isinstance(error, ShoalError):
        known = next(base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__)
        return Failed(known, error.what, error.where, error.fix, at, follows)
    if asked := device.out_of_memory(error):
        return Failed("RankError", f"out of memory: {asked} more could not be had", "", LESS_MEMORY, at, follows)
    doing = operations.doing(error)
    doing.waits &= follows
    # The first frame is ours and says nothing.
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    text = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    return Failed("", text, "", "", at, follows, doing)
