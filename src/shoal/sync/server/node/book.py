"""Where everybody listens: one small file for each role in the run's folder, which all machines of a job share.

Whoever lives on when the run is resumed finds nobody of the later start, and is found by nobody: its options may be
other ones, and what it holds may be no part of the run any more.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import msgspec

from shoal.sync.server.messages import COORDINATOR, Address

FOLDER = "server"
_TOKEN = "token"


class Entry(msgspec.Struct, frozen=True):
    """nonce: of the start of the run in which it listens; trials of links have none."""

    host: str
    port: int
    nonce: str = ""


class Book:
    """The addresses of the coordinator and of the copies of shards. Whoever listens enters itself, at each start."""

    def __init__(self, run: Path, nonce: str | None = None):
        """run: folder of the run. nonce: of the start of the run in which this side takes part; None: of the
        coordinator's, whichever that is."""
        self.folder, self.nonce = run / FOLDER, nonce

    def enter(self, who: Address, host: str, port: int) -> None:
        """From now on `who` is found there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".{_name(who)}.{os.getpid()}"
        new.write_bytes(msgspec.json.encode(Entry(host, port, self.nonce or "")))
        os.replace(new, self.folder / _name(who))

    def find(self, who: Address) -> Entry | None:
        """None where it has not listened in this start of the run."""
        entry, nonce = self._read(who), self.nonce
        if nonce is None and (lead := self._read(COORDINATOR)) is not None:
            nonce = lead.nonce
        return entry if entry is None or nonce is None or entry.nonce == nonce else None

    def _read(self, who: Address) -> Entry | None:
        try:
            return msgspec.json.decode((self.folder / _name(who)).read_bytes(), type=Entry)
        except (FileNotFoundError, msgspec.DecodeError):
            return None


def _name(who: Address) -> str:
    return "-".join([who.role, *([str(who.number), str(who.copy)] if who.role == "shard" else [])]) + ".json"


def own_token(run: Path) -> str:
    """The token of a run whose job names none: the first to ask makes it. Readable to this user alone."""
    path = run / FOLDER / _TOKEN
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{_TOKEN}.{secrets.token_hex(4)}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(16))
    # Whole or not at all, and only if there is none.
    with contextlib.suppress(FileExistsError):
        os.link(new, path)
    new.unlink()
    return path.read_text()
