"""The parameter server's transport: framed TCP for data and control alike.

A frame is a header, which is the caller's business (msgpack of messages), and buffers, which are raw bytes of tensors.

    listener:   with Listener(handle, credentials=Credentials(token)) as listener: listener.address
    worker:     with connect("127.0.0.1", port, credentials=..., name="worker 2", timeout=10) as connection:
                    connection.send(header, [gradient], timeout=60)
                    header, buffers = connection.receive(lambda header, lengths: [weights], timeout=60)

**Who may speak.** Both sides prove that they know the job token (`handshake`), and every header, with the lengths and
the sequence number of its frame, is authenticated with a key of that session and direction: a frame that was altered,
replayed, reordered, reflected or made up ends the connection. **Payload** (the buffers) is not in that code, because
hashing 64 MiB costs more than moving it: on loopback, where the kernel copies memory, it is not checked; beyond
loopback each buffer has a CRC-32, which finds what TCP's 16-bit sum lets through (Stone and Partridge 2000, "When the
CRC and TCP checksum disagree") but not what somebody has altered on purpose. Nothing is secret without TLS. With TLS
(`Credentials`) header and payload are both secret and authentic, and no CRC is added.

**Loss of a peer** is a ConnectionError with the peer's name, as soon as the kernel knows of it: at once when its
process ends; by keepalive when its machine does. Every call that may block has a timeout. Whether a peer that is
connected also makes progress is the coordinator's business (leases).

**On the server**, each connection has a thread, which is best left in `receive`, where a loss is noticed: answers that
other threads find go through an `Outbox`. Tensors of a GPU go through pinned memory of the host.
"""

from shoal.sync.server.wire.connection import Connection, Frame
from shoal.sync.server.wire.credentials import Credentials
from shoal.sync.server.wire.frame import FrameError, Limits
from shoal.sync.server.wire.listener import BOTH_TLS, Listener, NotLetIn, connect
from shoal.sync.server.wire.outbox import Outbox

__all__ = [
    "BOTH_TLS", "Connection", "Credentials", "Frame", "FrameError", "Limits", "Listener", "NotLetIn", "Outbox",
    "connect",
]  # fmt: skip
