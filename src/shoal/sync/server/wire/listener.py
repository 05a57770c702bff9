"""Where connections begin: the listener with its threads, and `connect`.

Each connection has a thread of its own, of which there are at most `most`. Threads rather than one loop over all
sockets: moving bytes is the kernel's work, during which Python's lock is free, so that payloads of several workers are
received at once on several cores; and whatever a peer is, slow, silent or malicious, it holds up its own thread alone.
"""

from __future__ import annotations

import hashlib
import selectors
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle

from shoal.errors import JobError
from shoal.sync.server.wire import handshake
from shoal.sync.server.wire.connection import Connection
from shoal.sync.server.wire.credentials import Credentials, has_checksums, is_loopback, require_token
from shoal.sync.server.wire.frame import FrameError, Limits
from shoal.sync.server.wire.stream import Stream, configure

# Seconds in which a stranger has to prove who it is.
_GREETING = 10.0
# Strangers at a time. The one who has been here longest makes place for the next: they cannot keep others out.
_STRANGERS = 64
# Seconds between attempts to reach a listener that is not there yet.
_AGAIN = 0.05
# Seconds that threads have to end when their connections have.
_ENDING = 10.0

Handle = Callable[[Connection], None]
Refused = Callable[[str, str, str], None]

BOTH_TLS = "give both sides TLS files, or none; each side's certificate is signed by the other's authority"
"""What to do where TLS fails."""


class NotLetIn(ConnectionError):
    """The listener was reached and ended the connection before it had begun: one side uses TLS and the other does not,
    or the listener is ending."""


class Listener:
    """Listens from its making until `close`, and calls `handle(connection)` in a thread for each peer that proved
    that it knows the token. The connection is closed when `handle` returns or raises; ConnectionError and TimeoutError
    are a peer's end and nothing more; anything else is a mistake of the program, and printed as of any thread.

    host: an address of one interface; beyond loopback JobError without a token. port: 0 = one that is free.
    most: connections at a time. `ended` counts why connections ended, also those that were never let in.
    """

    def __init__(
        self, handle: Handle, *, host: str = "127.0.0.1", port: int = 0, credentials: Credentials | None = None,
        limits: Limits | None = None, most: int = 256, refused: Refused | None = None,
    ):  # fmt: skip
        """refused: called with (address, reason, sentence) for each peer that is not let in, in that peer's thread.

        reason: as of FrameError, or `TLS`.
        """
        self.ended: Counter[str] = Counter()
        self._handle, self._most, self._refused = handle, most, refused
        self._credentials, self._limits = credentials or Credentials(), limits or Limits()
        require_token(host, self._credentials)
        tls = self._credentials.tls
        self._tls = self._credentials.context(ssl.Purpose.CLIENT_AUTH) if tls else None
        self._fingerprint = self._credentials.fingerprint() if tls else b""
        self._loopback, self._checked = is_loopback(host), has_checksums(host, self._credentials)
        self._socket = _listening(host, port, loopback=self._loopback)
        address = self._socket.getsockname()
        self.address: tuple[str, int] = (address[0], address[1])
        self._lock = threading.Lock()
        self._ends: dict[threading.Thread, Stream | Connection] = {}
        self._admitted: set[threading.Thread] = set()
        self._closed = False
        self._wake, self._waker = socket.socketpair()
        self._accepting = threading.Thread(target=self._accept, name="accepts workers", daemon=True)
        self._accepting.start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listens no more, ends all connections, and waits for their threads (10 s at most)."""
        if self._closed:
            return
        self._closed = True
        self._waker.send(b"x")
        self._accepting.join()
        for sock in (self._socket, self._wake, self._waker):
            sock.close()
        with self._lock:
            serving = dict(self._ends)
        for end in serving.values():
            end.close() if isinstance(end, Connection) else end.sever()
        deadline = time.monotonic() + _ENDING
        for thread in serving:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while self._wake not in [key.fileobj for key, _ in selector.select()]:
                try:
                    sock, address = self._socket.accept()
                except BlockingIOError:
                    continue
                except OSError:
                    # E.g. no descriptor is left: those that end give theirs back.
                    self._not_accepted()
                    time.sleep(_AGAIN)
                    continue
                self._start(sock, f"{address[0]}:{address[1]}")

    def _start(self, sock: socket.socket, peer: str) -> None:
        try:
            configure(sock, loopback=self._loopback)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            stream = Stream(sock, peer)
        except OSError:
            # It has gone already.
            sock.close()
            return self._not_accepted()
        thread = threading.Thread(target=self._serve, args=(stream,), name=f"serves {peer}", daemon=True)
        with self._lock:
            strangers = [end for end in self._ends.values() if isinstance(end, Stream) and not end.severed]
            self._ends[thread] = stream
        if len(strangers) >= _STRANGERS:
            strangers[0].sever()
        try:
            thread.start()
        except RuntimeError:
            # The system has no thread left.
            stream.close()
            with self._lock:
                del self._ends[thread]
            self._not_accepted()

    def _not_accepted(self) -> None:
        with self._lock:
            self.ended["not accepted"] += 1

    def _serve(self, stream: Stream) -> None:
        """The life of one connection."""
        end: Stream | Connection = stream
        why = "closed here"
        try:
            end = connection = self._let_in(stream)
            self._handle(connection)
        except FrameError as error:
            why = error.reason
        except TimeoutError:
            why = "late"
        except ConnectionError:
            why = "closed"
        finally:
            # The handler may have caught it.
            why = end.ended or why if isinstance(end, Connection) else why
            end.close()
            with self._lock:
                self.ended[why] += 1
                self._admitted.discard(threading.current_thread())
                del self._ends[threading.current_thread()]

    def _let_in(self, stream: Stream) -> Connection:
        try:
            return self._greet(stream)
        except ConnectionError as error:
            reason, what = error.reason if isinstance(error, FrameError) else "", str(error)
            if (cause := _tls_failure(error)) is not None:
                reason, what = "TLS", f"TLS with {stream.peer} failed: {cause}"
            if reason and self._refused is not None:
                self._refused(stream.peer.rpartition(":")[0], reason, what)
            raise

    def _greet(self, stream: Stream) -> Connection:
        deadline = time.monotonic() + _GREETING
        stream.secure(deadline)
        # TLS authenticates payload, and on loopback it stays in memory.
        session = handshake.answer(
            stream, self._credentials.token, self._checked, self._fingerprint, self._admit, deadline
        )  # fmt: skip
        if session.name:
            stream.peer = f"{session.name} ({stream.peer})"
        connection = Connection(stream, session, self._limits)
        with self._lock:
            self._ends[threading.current_thread()] = connection
        return connection

    def _admit(self) -> bool:
        """Whether there is a place for one more; takes it."""
        with self._lock:
            if len(self._admitted) >= self._most:
                return False
            self._admitted.add(threading.current_thread())
            return True


def connect(
    host: str, port: int, *, credentials: Credentials | None = None, name: str = "", peer: str = "", timeout: float,
    limits: Limits | None = None,
) -> Connection:  # fmt: skip
    """A connection with the listener there; tries until it is reached, which may still be starting.

    name: how this side is called in the listener's errors (64 bytes), e.g. `worker 2`; peer: how the listener is in
    this side's, e.g. `server 0`. timeout: seconds for everything. limits: of frames in both directions.
    JobError where the listener is another program or refuses, ConnectionError where it is not reached or goes away
    (NotLetIn: before anything was agreed on).
    """
    credentials, deadline = credentials or Credentials(), time.monotonic() + timeout
    address = f"{host}:{port}"
    peer = f"{peer} ({address})" if peer else address
    sock, fingerprint = _reach(host, port, peer, deadline), b""
    try:
        if credentials.tls:
            context = credentials.context(ssl.Purpose.SERVER_AUTH)
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        stream = Stream(sock, peer)
        stream.secure(deadline)
        if isinstance(sock, ssl.SSLSocket):
            fingerprint = hashlib.sha256(sock.getpeercert(binary_form=True) or b"").digest()
        session = handshake.ask(stream, credentials.token, name, fingerprint, deadline)
    except BaseException as error:
        sock.close()
        raise _not_let_in(error, peer) from error.__cause__
    return Connection(stream, session, limits or Limits())


def _not_let_in(error: BaseException, peer: str) -> BaseException:
    """What to say of a connection that ended before it had begun."""
    if (cause := _tls_failure(error)) is not None:
        return JobError(f"TLS failed: {cause}", where=peer, fix=BOTH_TLS)
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return NotLetIn(f"{error}, before it let this side in (both use TLS, or neither?)")
    return error


def _tls_failure(error: BaseException) -> ssl.SSLError | None:
    """What TLS did not agree to, where that is why the connection ended; that the other side has gone is nothing."""
    cause = error if isinstance(error, ssl.SSLError) else error.__cause__
    return cause if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError) else None


def _reach(host: str, port: int, peer: str, deadline: float) -> socket.socket:
    loopback = is_loopback(host)
    # A name may have several addresses, of which the listener has one.
    for family, kind, protocol, _, address in cycle(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)):
        sock = socket.socket(family, kind, protocol)
        try:
            configure(sock, loopback=loopback)
            sock.settimeout(max(_AGAIN, deadline - time.monotonic()))
            sock.connect(address)
            # Where nobody listens on a port of this machine, TCP may connect the socket with itself.
            if sock.getsockname() != sock.getpeername():
                return sock
            why = "nobody listens"
        except OSError as error:
            why = str(error)
        sock.close()
        if time.monotonic() + _AGAIN > deadline:
            raise ConnectionError(f"{peer} cannot be reached: {why}")
        time.sleep(_AGAIN)
    raise AssertionError("a host has at least one address")


def _listening(host: str, port: int, *, loopback: bool) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        configure(sock, loopback=loopback)
        sock.bind(address)
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        raise JobError(
            f"cannot listen: {error.strerror or error}", where=f"{host}:{port}",
            fix="take another port (0: one that is free), and an address of this machine (`ip -brief address`)",
        ) from None  # fmt: skip
    sock.setblocking(False)
    return sock
