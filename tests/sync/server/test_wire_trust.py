"""Who may speak: only those with the job token, from loopback unless told otherwise; and TLS."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.job.server import ServerOptions
from shoal.sync.server.wire import Credentials, FrameError, Listener, NotLetIn, connect
from shoal.sync.server.wire.handshake import answer, ask
from shoal.sync.server.wire.stream import Stream
from shoal.training.server.hold import served
from tests.launch.sockets import listening
from tests.sync.server.peers import TOKEN, TRUSTED, echo, ended, eventually, in_thread, pair, serving


def reach(listener: Listener, credentials: Credentials = TRUSTED) -> None:
    """A frame there and back."""
    with connect("127.0.0.1", listener.address[1], credentials=credentials, timeout=20) as worker:
        worker.send(b"hello", [b"payload"], timeout=20)
        assert worker.receive(timeout=20) == (b"hello", [b"payload"])


def test_it_listens_on_loopback_only():
    before = listening([os.getpid()])
    with Listener(echo):
        assert sorted(listening([os.getpid()])) == sorted([*before, "127.0.0.1"])


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "::1"])
def test_loopback_needs_no_token(host: str):
    with Listener(echo, host=host) as listener, connect(host, listener.address[1], timeout=20) as worker:
        worker.send(b"", timeout=20)
        worker.receive(timeout=20)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_beyond_loopback_a_token_is_needed(host: str):
    with pytest.raises(JobError, match="token missing beyond loopback") as caught:
        Listener(echo, host=host)
    assert caught.value.where == host
    assert "secrets.token_hex" in caught.value.fix
    with pytest.raises(JobError, match="fewer than 16 bytes"):
        Listener(echo, host=host, credentials=Credentials("short"))


def test_the_credentials_of_a_job_are_in_files(tmp_path: Path):
    file = tmp_path / "job.token"
    file.write_text(f"{TOKEN}\n")
    files = {"certificate": "one.pem", "key": "one.key", "authority": "all.pem"}
    found = Credentials.of(ServerOptions(token=str(file), **files))
    assert found == Credentials(TOKEN, Path("one.pem"), Path("one.key"), Path("all.pem"))
    assert Credentials.of(ServerOptions()) == Credentials()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "cannot read the job token: No such file"),
        (b" " * 20 + b"fifteen letters", "has fewer than 16 bytes"),
        (b"", "has fewer than 16 bytes"),
        (b"\xff" * 32, "cannot read the job token: it is not UTF-8 text"),
    ],
)
def test_a_file_without_a_token_is_refused_by_name(content: bytes | None, what: str, tmp_path: Path):
    file = tmp_path / "job.token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(JobError) as caught:
        Credentials.of(ServerOptions(token=str(file)))
    assert caught.value.what.startswith(f"server.token={file}: ")
    assert what in caught.value.what
    assert "secrets.token_hex" in caught.value.fix


def test_an_address_of_another_machine_or_a_port_that_is_taken():
    with pytest.raises(JobError, match="cannot listen"):
        Listener(echo, host="192.0.2.1", credentials=TRUSTED)
    with Listener(echo) as first, pytest.raises(JobError, match="in use"):
        Listener(echo, port=first.address[1])
    with pytest.raises(JobError, match="no such host"):
        connect("no.such.host.invalid", 1, timeout=1)


@pytest.mark.parametrize("token", ["", "another", TOKEN + " "])
def test_a_wrong_token_is_refused_and_told_and_the_listener_goes_on(token: str):
    refused = []
    with Listener(echo, credentials=TRUSTED, refused=lambda *told: refused.append(told)) as listener:
        with pytest.raises(JobError, match="the listener refuses this side's job token") as caught:
            connect(*listener.address, credentials=Credentials(token), peer="server 0", timeout=20)
        assert caught.value.where == f"server 0 (127.0.0.1:{listener.address[1]})"
        reach(listener)
        assert eventually(lambda: listener.ended["wrong token"] == 1)
    ((address, reason, what),) = refused
    assert (address, reason) == ("127.0.0.1", "wrong token")
    assert what.startswith("127.0.0.1:")
    assert what.endswith(" does not know the job token")


def test_the_worker_s_own_name_is_harmless_where_it_is_printed():
    with pair() as (_, server):
        assert server.peer.startswith("worker 1 (127.0.0.1:")
    ends = []
    with Listener(ends.append) as listener:
        connect(*listener.address, name="\x1b[31m" + "é" * 80, timeout=20).close()
        assert eventually(lambda: listener.ended)
    assert ends[0].peer.startswith("[31mééé")
    assert ends[0].peer.isprintable()


def false_listener(conversation):
    """(port, thread) of a listener of another kind, for one connection."""
    server = socket.create_server(("127.0.0.1", 0))

    def main() -> None:
        with server, server.accept()[0] as sock, suppress(OSError):
            conversation(sock)

    threading.Thread(target=main, daemon=True).start()
    return server.getsockname()[1]


def test_what_a_worker_says_is_no_proof_when_it_comes_back():
    """A listener without the token that sends everything back as it came."""

    def reflect(sock: socket.socket) -> None:
        while data := sock.recv(4096):
            sock.sendall(data)

    with pytest.raises(JobError, match="no parameter server"):
        connect("127.0.0.1", false_listener(reflect), credentials=TRUSTED, timeout=20)

    def reflect_as_a_listener(sock: socket.socket) -> None:
        hello = sock.recv(38)
        sock.sendall(b"shls" + hello[4:])
        # The proof, behind the name; and a verdict before it.
        sock.sendall(b"\0" + sock.recv(96)[64:])
        sock.recv(1)

    with pytest.raises(JobError, match="the listener does not know the job token"):
        connect("127.0.0.1", false_listener(reflect_as_a_listener), credentials=TRUSTED, timeout=20)


def test_what_was_overheard_is_no_proof_later():
    """Everything that a worker said, said again to the same listener."""
    with Listener(echo, credentials=TRUSTED) as listener:
        ours, theirs = socket.socketpair()
        said = []

        def overhear() -> None:
            with socket.create_connection(listener.address) as server, theirs:
                for there, back in ((38, 38), (96, 33)):
                    said.append(theirs.recv(there))
                    server.sendall(said[-1])
                    theirs.sendall(server.recv(back))

        with in_thread(overhear):
            ask(Stream(ours, "the listener"), TOKEN, "worker", b"", time.monotonic() + 20)
        ours.close()
        with socket.create_connection(listener.address) as again:
            again.settimeout(20)
            again.sendall(said[0])
            assert len(again.recv(38)) == 38
            again.sendall(said[1])
            assert again.recv(33)[0] != 0
        assert eventually(lambda: listener.ended["wrong token"] == 1)


def test_both_sides_and_both_directions_have_keys_of_their_own():
    ours, theirs = socket.socketpair()
    deadline = time.monotonic() + 20
    with ours, theirs, in_thread(
        lambda: answer(Stream(theirs, "b"), TOKEN, True, b"", lambda: True, deadline)
    ) as other:  # fmt: skip
        mine = ask(Stream(ours, "a"), TOKEN, "worker", b"", deadline)
        its = other.get(timeout=20)
    assert (mine.send_key, mine.receive_key) == (its.receive_key, its.send_key)
    assert mine.send_key != mine.receive_key
    assert mine.checked is its.checked is True


def test_another_version_is_named():
    def older(sock: socket.socket) -> None:
        sock.recv(38)
        sock.sendall(b"shls\0\0" + bytes(32))
        sock.recv(1)

    with pytest.raises(JobError, match="speaks version 0, this side 1"):
        connect("127.0.0.1", false_listener(older), timeout=20)
    with Listener(echo) as listener, socket.create_connection(listener.address) as sock:
        sock.settimeout(20)
        sock.sendall(b"shlc\0\0" + bytes(32))
        assert ended(sock)
        assert eventually(lambda: listener.ended["another version"] == 1)


def test_strangers_who_say_nothing_do_not_keep_a_worker_out():
    with Listener(echo, credentials=TRUSTED) as listener:
        strangers = [socket.create_connection(listener.address) for _ in range(150)]
        reach(listener)
        # A thread for each stranger that may stay, no more.
        assert eventually(lambda: serving() < 70)
        for stranger in strangers:
            stranger.close()
    assert serving() == 0


@pytest.mark.parametrize("damaged", [False, True])
def test_beyond_loopback_payload_is_checked(damaged: bool):
    """On all interfaces, of which this test uses loopback."""
    with pair(host="0.0.0.0") as (worker, server):
        worker.send(b"", [b"as it was", b""], timeout=20)
        assert server.receive(timeout=20).buffers == [b"as it was", b""]
        payload = bytearray(b"as it was")
        head, write = [], worker._stream.write

        def flip(views, deadline):
            head.append(views[0])
            if damaged:
                payload[3] ^= 4
            write(views, deadline)

        worker._stream.write = flip
        worker.send(b"", [payload], timeout=20)
        if damaged:
            with pytest.raises(FrameError, match="CRC-32"):
                server.receive(timeout=20)
            assert server.ended == "damaged"
        else:
            server.receive(timeout=20)


# TLS.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with two certificates, and a stranger that signs its own."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl program to make certificates")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("authority", "stranger"):
        openssl("req", "-x509", *new, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    for name in ("one", "two"):
        openssl("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "authority.pem", "-CAkey", "authority.key",
                "-CAcreateserial", "-out", f"{name}.pem")  # fmt: skip
    return folder


def tls(files: Path, name: str, authority: str = "authority", token: str = TOKEN) -> Credentials:
    return Credentials(token, files / f"{name}.pem", files / f"{name}.key", files / f"{authority}.pem")


def test_tls_both_ways_and_at_once(files: Path):
    with pair(tls(files, "one")) as (worker, server):
        there, back = bytearray(os.urandom(1 << 20)) * 8, bytearray(os.urandom(1 << 20)) * 8
        with in_thread(lambda: worker.send(b"push", [there], timeout=60)), in_thread(
            lambda: server.send(b"pull", [back], timeout=60)
        ), in_thread(lambda: server.receive(timeout=60)) as arrived:  # fmt: skip
            assert worker.receive(timeout=60) == (b"pull", [back])
            assert arrived.get(timeout=60) == (b"push", [there])
        with pytest.raises(TimeoutError):
            server.receive(timeout=0.1)
        with in_thread(lambda: server.receive(timeout=60)) as done:
            worker.close()
            assert isinstance(done.get(timeout=20), ConnectionError)


@pytest.mark.parametrize("hidden", [True, False])
def test_tls_hides_what_is_said(files: Path, hidden: bool):
    """What a wire between the two carries, with TLS and without."""
    credentials, seen = tls(files, "one") if hidden else TRUSTED, bytearray()
    with Listener(echo, credentials=credentials) as listener:
        port = false_listener(lambda sock: relay(sock, socket.create_connection(listener.address), seen))
        with connect("127.0.0.1", port, credentials=credentials, timeout=20) as worker:
            worker.send(b"a header", [b"a payload"], timeout=20)
            worker.receive(timeout=20)
    assert seen
    assert (b"a header" in seen) == (b"a payload" in seen) == (not hidden)


def relay(a: socket.socket, b: socket.socket, seen: bytearray) -> None:
    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                seen.extend(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    with a, b:
        back = threading.Thread(target=pump, args=(b, a))
        back.start()
        pump(a, b)
        back.join()


def test_a_certificate_that_the_authority_did_not_sign(files: Path):
    refused: list[str] = []
    with Listener(echo, credentials=tls(files, "one"), refused=lambda *told: refused.append(told[1])) as listener:
        # The worker's, which the listener refuses; and the listener's, which the worker does.
        for credentials in (tls(files, "stranger"), tls(files, "one", authority="stranger")):
            with pytest.raises(JobError, match="TLS failed"):
                connect(*listener.address, credentials=credentials, timeout=20)
        reach(listener, tls(files, "two"))
        assert eventually(lambda: refused == ["TLS", "TLS"])


def test_tls_on_one_side_only(files: Path):
    refused: list[str] = []

    def told(_: str, reason: str, __: str) -> None:
        refused.append(reason)

    with Listener(echo, credentials=tls(files, "one"), refused=told) as listener:
        with pytest.raises(NotLetIn, match="both use TLS, or neither"):
            connect(*listener.address, credentials=TRUSTED, timeout=20)
        reach(listener, tls(files, "one"))
        assert eventually(lambda: refused == ["TLS"])
    with Listener(echo, credentials=TRUSTED, refused=told) as listener:
        with pytest.raises(NotLetIn, match="both use TLS, or neither"):
            connect(*listener.address, credentials=tls(files, "one"), timeout=20)
        reach(listener)
        assert eventually(lambda: refused == ["TLS", "no greeting"])


def test_nobody_stands_between_with_another_certificate_of_the_same_authority(files: Path):
    """It ends TLS on both sides and passes everything on, the proofs too: they are of the listener's certificate."""
    between, passed_on = tls(files, "two"), []
    with Listener(echo, credentials=tls(files, "one")) as listener:

        def stand_between(sock: socket.socket) -> None:
            inside = between.context(ssl.Purpose.CLIENT_AUTH).wrap_socket(sock, server_side=True)
            outside = socket.create_connection(listener.address)
            with inside, between.context(ssl.Purpose.SERVER_AUTH).wrap_socket(outside) as onwards:
                for there, back in ((38, 38), (96, 33)):
                    onwards.sendall(inside.recv(there))
                    inside.sendall(onwards.recv(back))
                    passed_on.append(there + back)
                inside.recv(1)

        with pytest.raises(JobError, match="refuses this side's job token"):
            connect("127.0.0.1", false_listener(stand_between), credentials=tls(files, "one"), timeout=20)
        assert len(passed_on) >= 1
        assert eventually(lambda: listener.ended["wrong token"] == 1)


def test_tls_needs_all_of_its_files(files: Path, tmp_path: Path):
    with pytest.raises(JobError, match="TLS needs three files") as caught:
        Listener(echo, credentials=Credentials(TOKEN, files / "one.pem", files / "one.key"))
    assert caught.value.where == "authority"
    with pytest.raises(JobError, match="TLS cannot use these files"):
        Listener(echo, credentials=tls(tmp_path, "one"))
    with pytest.raises(JobError, match="TLS cannot use these files"):
        Listener(echo, credentials=Credentials(TOKEN, files / "one.pem", files / "two.key", files / "authority.pem"))


def test_weights_that_change_on_their_way_are_not_sent_where_payload_is_checked(monkeypatch: pytest.MonkeyPatch):
    """A CRC of them would be of other bytes, and each pull would end the connection."""
    monkeypatch.setattr("shoal.sync.server.wire.credentials.is_loopback", lambda host: host.startswith("127."))
    secure = Credentials(TOKEN, Path("certificate"), Path("key"), Path("authority"))
    assert served("hogwild", "127.0.0.1", TRUSTED) == "hogwild"
    assert served("hogwild", "10.0.0.1", secure) == "hogwild"
    assert served("hogwild", "10.0.0.1", TRUSTED) == "shard"
    assert served("snapshot", "10.0.0.1", TRUSTED) == "snapshot"
