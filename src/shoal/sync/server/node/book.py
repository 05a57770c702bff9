"""Where everybody listens: one small file for each role in the run's folder, which all machines of a job share."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import msgspec

from shoal.sync.server.messages import Address

FOLDER = "server"
_TOKEN = "token"


class Entry(msgspec.Struct, frozen=True):
    host: str
    port: int


class Book:
    """The addresses of the coordinator and of the copies of shards. Whoever listens enters itself, at each start."""

    def __init__(self, run: Path):
        """run: folder of the run."""
        self.folder = run / FOLDER

    def enter(self, who: Address, host: str, port: int) -> None:
        """From now on `who` is found there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".{_name(who)}.{os.getpid()}"
        new.write_bytes(msgspec.json.encode(Entry(host, port)))
        os.replace(new, self.folder / _name(who))

    def find(self, who: Address) -> Entry | None:
        """None where it has never listened."""
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
    new = path.with_name(f".{_TOKEN}.{os.getpid()}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(16))
    # Whole or not at all, and only if there is none.
    with contextlib.suppress(FileExistsError):
        os.link(new, path)
    new.unlink()
    return path.read_text()
