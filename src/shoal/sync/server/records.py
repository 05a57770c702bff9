"""What the coordinator writes into its journal: all that it must know after a crash."""

from __future__ import annotations

import msgspec

from shoal.sync.server.messages import NOTHING, Answer, Apply, Key, Range

# Why a gradient is rejected for being too old.
LATE = "late"


class Record(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Any of the records below."""


class Opened(Record, frozen=True):
    """The first record: of which job this is the journal, from which version and which samples on.

    watermark, exceptions: as in `Samples.state`. started: all workers of the job had joined. epoch: as in Primaries.
    """

    job: str
    version: int = 0
    watermark: int = 0
    exceptions: tuple[Range, ...] = ()
    started: bool = False
    epoch: int = 0


class Entered(Record, frozen=True):
    worker: int
    nonce: int
    incarnation: int
    clock: int
    share: int


class Left(Record, frozen=True):
    """why: `left`, `lost` (its connection), `expired` (its lease), `replaced` (by a new process)."""

    worker: int
    incarnation: int
    why: str


class Anew(Record, frozen=True):
    """All processes of the job are new, in one record: no worker of before lives, and nothing begins before as many as
    at first have joined."""


class Granted(Record, frozen=True):
    """peers: other incarnations that may commit before it does, so far as is known. gone: of the Ask."""

    key: Key
    version: int
    samples: Range
    peers: int
    gone: int = 0


class Begun(Record, frozen=True):
    """All grants of a round of bsp, or of all rests, in one: after a crash it has all its workers, or has not begun."""

    grants: tuple[Granted, ...]


class Committed(Record, frozen=True):
    """One version: what is in it. Per push: key, staleness, weight (valid tokens), samples and sum of losses.

    Without samples: a rest, what a codec had lost of earlier pushes; of no loss.
    grad_norm: of the mean, before clipping. clip: what the mean is multiplied with (age weighting included).
    """

    version: int
    keys: tuple[Key, ...]
    staleness: tuple[int, ...]
    weights: tuple[float, ...]
    samples: tuple[Range, ...]
    grad_norm: float
    clip: float
    lr: float
    holders: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()

    def apply(self) -> Apply:
        """What the shards are told of it."""
        scale = self.clip / sum(self.weights)
        return Apply(self.version, self.keys, scale, self.lr, max(self.staleness), self.holders)

    def answer(self, i: int) -> Answer:
        """What the worker of its push `i` is told."""
        return Answer(self.keys[i], True, self.version, self.staleness[i], "", self.grad_norm, self.lr)


class Rejected(Record, frozen=True):
    """skipped: samples that are used up all the same, because nothing can be learned from them."""

    key: Key
    version: int
    staleness: int
    reason: str
    skipped: Range = NOTHING

    def answer(self) -> Answer:
        return Answer(self.key, False, self.version, self.staleness, self.reason)


class Answered(Record, frozen=True):
    """In the place of what led to it, where a journal begins anew: the answer to a worker's latest push."""

    answer: Answer


class Paced(Record, frozen=True):
    """Likewise: how many micro-batches a worker's next gradient has, and why. size, rejected, peers: as of a Member."""

    worker: int
    size: int
    rejected: int
    peers: int


class Changed(Record, frozen=True):
    """From now on a shard has these copies, the first of which workers talk to."""

    shard: int
    copies: tuple[int, ...]


AnyRecord = Opened | Entered | Left | Anew | Granted | Begun | Committed | Rejected | Changed | Answered | Paced
