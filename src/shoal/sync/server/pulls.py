"""What one copy of a shard serves: weights of the version that is asked for, and who waits for one to come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server.effects import Send
from shoal.sync.server.held import Held
from shoal.sync.server.messages import Address
from shoal.sync.server.rows import fits, picked

if TYPE_CHECKING:
    from shoal.sync.server.shadow import Shadow

# Readers that may hold a copy of the weights, each on its way to one of them.
READERS = 4


class Pulls:
    """Answers pulls from `held`, which the shard moves from version to version: each method is told the present one.

    level: `snapshot` is served from the latest version or the one before it, in tensors that stay as they are; `shard`
    from the latest; `hogwild` from the weights themselves, which may change while they are being sent (Recht et al.
    2011, "Hogwild!": lock-free, updates lost or torn in single elements only).
    A reader (`master`) gets the weights of the very version that it names, in a copy of its own: if that is to come,
    when it is there, and otherwise only from the latest.
    Memory: `snapshot` at most two more copies of the weights. With a `shadow` one, and what that takes. One for each
    reader, of at most `READERS`.
    """

    def __init__(self, number: int, held: Held, level: str, shadow: Shadow | None):
        """As in `ServerShard`."""
        self.number, self.held, self.level, self.shadow = number, held, level, shadow
        self._frozen: dict[int, Any] = {}
        self._waiting: dict[Address, m.Pull] = {}
        self._readers: set[Address] = set()

    def pull(self, sender: Address, message: m.Pull, version: int) -> list[Send]:
        """The answer; none yet to who waits for a later version. Raises JobError for rows that are not served."""
        self._waiting.pop(sender, None)
        if message.rows and (self.shadow is not None or not fits(message.pieces or (), message.rows)):
            raise JobError(
                "rows were asked for that are not served", fix="start all workers and servers from the same job.toml"
            )
        exactly = self.level == "snapshot" or message.master
        wanted = message.version if exactly else max(message.version, version)
        if wanted > version:
            self._waiting[sender] = message
            return []
        answer, tensors = self._answer(sender, message, wanted, version)
        return [Send(sender, answer, tensors)]

    def waited(self, version: int, readers: bool = False) -> Iterator[Send]:
        """The answers to those that waited for `version`, one by one: where one raises, those before it count.

        readers: to these only.
        """
        for sender, pull in list(self._waiting.items()):
            if pull.master or not readers:
                yield from self.pull(sender, pull, version)

    def passing(self, version: int, wanted: bool) -> Any:
        """Before the next commit is applied: keeps the weights of `version` if they may yet be asked for.

        Returns them; None where they are not kept, nor `wanted`.
        """
        reached = self.shadow is not None and self.shadow.version >= version
        if wanted or (self.level == "snapshot" and not reached):
            self._freeze(version)
        kept = self._frozen.get(version)
        self._frozen = {version: kept} if kept is not None and self.level == "snapshot" else {}
        return kept

    def lost(self, sender: Address) -> None:
        """The connection with a reader ended."""
        self._readers.discard(sender)
        self._waiting.pop(sender, None)

    def cloned(self, copy: int) -> None:
        """Has become another copy's, of whom nobody has asked anything."""
        self._waiting, self._readers = {}, set()
        if self.shadow is not None:
            self.shadow.forget(self.shadow.chain._replace(copy=copy))

    def _answer(
        self, sender: Address, message: m.Pull, wanted: int, version: int
    ) -> tuple[m.Pulled | m.Gone, tuple[Any, ...]]:
        pieces = self.held.pieces() if message.pieces is None else message.pieces
        gone = m.Gone(message.key, self.number, wanted, version)
        if self.shadow is not None and not message.master:
            self._reach(self.shadow, wanted, version)
            base = message.held if message.chain == self.shadow.chain else -1
            served = self.shadow.serve(self.held, pieces, base, wanted)
            if served is None:
                return gone, ()
            pieces, base, links, tensors = served
            return m.Pulled(message.key, self.number, wanted, pieces, self.shadow.chain, base, links), tensors
        weights = self._weights(sender, message, wanted, version)
        if weights is None:
            return gone, ()
        pulled = m.Pulled(message.key, self.number, wanted, pieces, rows=message.rows)
        return pulled, picked(self.held.cut(weights, pieces), message.rows)

    def _weights(self, sender: Address, message: m.Pull, wanted: int, version: int) -> Any:
        """None where they are gone."""
        if message.master:
            return self._copied(sender) if wanted == version else None
        if self.level == "hogwild":
            return self.held.live()
        return self._freeze(version) if wanted == version else self._frozen.get(wanted)

    def _reach(self, shadow: Shadow, wanted: int, version: int) -> None:
        """Moves the shadow there, from weights that are kept for that alone."""
        if wanted <= shadow.version:
            return
        weights = self._freeze(version) if wanted == version else self._frozen.get(wanted)
        if weights is not None:
            shadow.reach(wanted, weights, self.held.pieces())
            del self._frozen[wanted]

    def _freeze(self, version: int) -> Any:
        """The weights of `held` as they are, at `version`."""
        if version not in self._frozen:
            self._frozen[version] = self.held.freeze()
        return self._frozen[version]

    def _copied(self, reader: Address) -> Any:
        """Master weights for a reader; None where as many have some as may, or this one has had its own."""
        if reader in self._readers or len(self._readers) >= READERS:
            return None
        self._readers.add(reader)
        return self.held.master()
