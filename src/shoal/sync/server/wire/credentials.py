"""What lets two sides of a connection believe each other: the job token, and TLS if its files are given."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import JobError
from shoal.job.server import ServerOptions

# Bytes of a token that nobody finds by trying, who has listened to a handshake.
_LEAST = 16
_FILES = ("certificate", "key", "authority")
_NEW_TOKEN = 'python -c "import secrets; print(secrets.token_hex(16))"'


@dataclass(frozen=True)
class Credentials:
    """The same on both sides, but for certificate and key, which may be each machine's own."""

    token: str = ""
    """The job token: any text of at least 16 bytes that only this job knows. Empty: on loopback only, where then every
    user of the machine may connect."""
    certificate: Path | None = None
    """PEM file with this side's certificate (and chain). Given together with `key` and `authority`: TLS 1.3."""
    key: Path | None = None
    """PEM file with its private key, without a passphrase."""
    authority: Path | None = None
    """PEM file with the certificates that the other side's must be signed by. Host names are not compared: the proof
    of the token covers the listener's certificate, so that no other one of that authority can stand between."""

    @classmethod
    def of(cls, options: ServerOptions) -> Credentials:
        """Those of a job whose options have been checked; without a token where none is named.

        Raises JobError for a file of the token that cannot be read or that holds too little.
        """
        files = [Path(file) if (file := getattr(options, name)) else None for name in _FILES]
        if not options.token:
            return cls("", *files)
        try:
            token = Path(options.token).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            what = f"server.token={options.token}: cannot read the job token: {reason}"
            raise JobError(what, fix=f"a file with the text that {_NEW_TOKEN} prints, the same everywhere") from None
        if len(token.encode()) < _LEAST:
            what = f"server.token={options.token}: the job token in it has fewer than {_LEAST} bytes"
            raise JobError(what, fix=f"make one by {_NEW_TOKEN}")
        return cls(token, *files)

    @property
    def tls(self) -> bool:
        return any((self.certificate, self.key, self.authority))

    def context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """For a listener (`CLIENT_AUTH`) or one that connects (`SERVER_AUTH`). JobError names a file that is wrong."""
        files = {name: getattr(self, name) for name in _FILES}
        if missing := [name for name, file in files.items() if file is None]:
            raise JobError(
                "TLS needs three files", where=missing[0], fix="give certificate, key and authority, or none"
            )
        try:
            context = ssl.create_default_context(purpose, cafile=files["authority"])
            context.load_cert_chain(files["certificate"], files["key"], password=_no_passphrase)
        except (OSError, ValueError) as error:
            where = ", ".join(map(str, files.values()))
            mismatch = getattr(error, "reason", None) == "KEY_VALUES_MISMATCH"
            fix = "the key has to be the certificate's own" if mismatch else "give readable PEM files"
            raise JobError(f"TLS cannot use these files: {error}", where=where, fix=fix) from None
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context

    def fingerprint(self) -> bytes:
        """SHA-256 of this side's certificate, as the other side sees it."""
        assert self.certificate
        text = self.certificate.read_text()
        first = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
        assert first, "the file was loaded before"
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first[0])).digest()


def require_token(host: str, credentials: Credentials) -> None:
    """JobError for a listener beyond loopback without a token that keeps strangers out."""
    if is_loopback(host):
        return
    if not credentials.token:
        raise JobError("token missing beyond loopback", where=host, fix=f"give all machines one, made by {_NEW_TOKEN}")
    if len(credentials.token.encode()) < _LEAST:
        raise JobError(
            f"the job token has fewer than {_LEAST} bytes, too few beyond loopback", where=host,
            fix=f"make one by {_NEW_TOKEN}",
        )  # fmt: skip


def has_checksums(host: str, credentials: Credentials) -> bool:
    """Whether what a listener there sends and receives is checked by CRCs: not on loopback, and TLS has its own."""
    return not credentials.tls and not is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether all addresses of this name are of this machine only. JobError for a name that nobody knows."""
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise JobError(f"no such host ({error})", where=host, fix="give an address, or a name that resolves") from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def _no_passphrase() -> str:
    raise ValueError("the private key asks for a passphrase")
