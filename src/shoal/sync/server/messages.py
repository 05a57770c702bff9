"""What a worker, the coordinator and the shards say to each other, and what a state machine asks its host to do.

Messages are msgspec structs; tensors travel beside them (`Send.tensors`), in the order of the message's `pieces`.
Every message may be lost, delayed, doubled or overtaken: whoever waits for an answer says it again, and every receiver
takes it twice as once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec


class Key(NamedTuple):
    """Names one push. clock: how many pushes of this incarnation had been answered before it."""

    worker: int
    incarnation: int
    clock: int


class Address(NamedTuple):
    """role: `worker`, `coordinator` or `shard`. number: worker or shard. copy: of a shard; of a worker: its nonce."""

    role: str
    number: int = 0
    copy: int = 0


COORDINATOR = Address("coordinator")
# Why a gradient is rejected for being too old, in an Answer.
LATE = "late"


class Range(NamedTuple):
    """Samples start … stop − 1, in the global order of the data."""

    start: int
    stop: int


NOTHING = Range(0, 0)


class Piece(NamedTuple):
    """A block of one parameter. offsets: where it starts in the whole parameter."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class Square(NamedTuple):
    """Sum of squares, in float64, of the rows of a gradient that one shard holds. row: the first of them."""

    name: str
    row: int
    value: float


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Any of the messages below."""


# From a worker to the coordinator.


class Join(Message, frozen=True):
    """nonce: drawn by the process, so that a repeated Join is told from a new process. share: micro-batches a clock.

    model, tokenizer: hashes; the job's own, or the worker is refused.
    """

    worker: int
    nonce: int
    share: int
    model: str = ""
    tokenizer: str = ""


class Leave(Message, frozen=True):
    worker: int
    incarnation: int


class Heartbeat(Message, frozen=True):
    """epoch: of the Primaries that the worker knows."""

    worker: int
    incarnation: int
    epoch: int


class Ask(Message, frozen=True):
    """May this clock begin, on which samples, from which version? gone: grants whose version a shard had no more."""

    key: Key
    gone: int = 0


class Push(Message, frozen=True):
    """A gradient is on its way to the shards. version: pulled. weight: valid tokens in it; loss_sum: over them.

    samples: what it was computed from; less than was granted where a slow worker computed fewer micro-batches.
    """

    key: Key
    version: int
    weight: float
    loss_sum: float
    samples: Range


# From the coordinator to a worker.


class Joined(Message, frozen=True):
    """clock: of the worker's first push. epoch, primaries: as in Primaries."""

    worker: int
    nonce: int
    incarnation: int
    clock: int
    epoch: int
    primaries: tuple[int, ...]


class Refused(Message, frozen=True):
    """This worker, or this copy of a shard, cannot take part. why: one sentence. fix: what to do.

    nonce: of the Join; of a shard: its copy.
    """

    nonce: int
    why: str
    fix: str


class Grant(Message, frozen=True):
    """Begin this clock: pull `version`, compute on `samples`. gone: of the Ask that it answers."""

    key: Key
    version: int
    samples: Range
    gone: int = 0


class Finished(Message, frozen=True):
    """Every sample of the job is used up."""

    worker: int
    incarnation: int


class Missing(Message, frozen=True):
    """The push is known, but these shards do not have (all copies of) its bytes; none: wait."""

    key: Key
    shards: tuple[int, ...]


class Answer(Message, frozen=True):
    """What became of a push, the same however often it is asked for.

    accepted: it is in `version`. staleness: commits between its pull and its own. reason: why it was rejected.
    """

    key: Key
    accepted: bool
    version: int
    staleness: int
    reason: str = ""
    grad_norm: float = 0.0
    lr: float = 0.0


class Fenced(Message, frozen=True):
    """This incarnation was given up (its lease ended, or a new process took its place): nothing of it counts."""

    worker: int
    incarnation: int


class Primaries(Message, frozen=True):
    """Which copy of each shard to talk to from now on. epoch: the higher one is the later."""

    epoch: int
    copies: tuple[int, ...]


# Between a worker and a shard.


class Pull(Message, frozen=True):
    """Give me weights of `version` (`shard`, `hogwild`: of what is there, but not older). pieces: none = all."""

    key: Key
    version: int
    pieces: tuple[Piece, ...] = ()


class Pulled(Message, frozen=True):
    """With the tensors of `pieces`."""

    key: Key
    shard: int
    version: int
    pieces: tuple[Piece, ...]


class Gone(Message, frozen=True):
    """The shard has no weights of `version` any more: it is at `newest`."""

    key: Key
    shard: int
    version: int
    newest: int


class Stage(Message, frozen=True):
    """With the tensors of `pieces`: sums over tokens of the gradient, of one of the worker's `parts` ranks.

    forwarded: by the shard's first copy, to the others.
    """

    key: Key
    part: int
    parts: int
    pieces: tuple[Piece, ...]
    forwarded: bool = False


# Between a shard and the coordinator.


class Hello(Message, frozen=True):
    """A copy of a shard is there, with all commits up to `version` applied."""

    shard: int
    copy: int
    version: int


class Staged(Message, frozen=True):
    """All of a push's bytes for this shard are here, and will be after a crash."""

    key: Key
    shard: int
    copy: int
    squares: tuple[Square, ...]


class Combine(Message, frozen=True):
    """Add up these pushes, in this order, for what may become `version`."""

    version: int
    keys: tuple[Key, ...]


class Combined(Message, frozen=True):
    """squares: of the sum."""

    version: int
    keys: tuple[Key, ...]
    shard: int
    copy: int
    squares: tuple[Square, ...]


class Apply(Message, frozen=True):
    """Commit `version`: the sum of these pushes times `scale`, at rate `lr`.

    scale: normalises and clips. staleness: of the oldest push in it. holders: workers that hold weights of
    `version − 1` and whose gradients will be measured against it (delay compensation).
    """

    version: int
    keys: tuple[Key, ...]
    scale: float
    lr: float
    staleness: int
    holders: tuple[int, ...] = ()


class Applied(Message, frozen=True):
    shard: int
    copy: int
    version: int


class Drop(Message, frozen=True):
    """These pushes will never be applied."""

    keys: tuple[Key, ...]


# What the coordinator writes into its journal.


class Record(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Any of the records below."""


class Opened(Record, frozen=True):
    """The first record: of which job this is the journal, from which version and which samples on.

    watermark, exceptions: as in `Samples.state`. started: enough workers had joined. epoch: as in Primaries.
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


class Granted(Record, frozen=True):
    """peers: other incarnations that may commit before it does, so far as is known. gone: of the Ask."""

    key: Key
    version: int
    samples: Range
    peers: int
    gone: int = 0


class Begun(Record, frozen=True):
    """All grants of a round of bsp, in one: after a crash the round has all its workers, or has not begun."""

    grants: tuple[Granted, ...]


class Committed(Record, frozen=True):
    """One version: what is in it. Per push: key, staleness, weight (valid tokens) and samples.

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


class Changed(Record, frozen=True):
    """From now on a shard has these copies, the first of which workers talk to."""

    shard: int
    copies: tuple[int, ...]


AnyRecord = Opened | Entered | Left | Granted | Begun | Committed | Rejected | Changed | Answered


# What a state machine asks its host to do, in this order.


class Send(msgspec.Struct, frozen=True):
    to: Address
    message: Message
    tensors: tuple[Any, ...] = ()


class Write(msgspec.Struct, frozen=True):
    """Append to the log. durable: be sure that it is on disk before doing what follows.

    what: a Record of the coordinator; a shard's Stage, with its tensors.
    """

    what: Record | Stage
    tensors: tuple[Any, ...] = ()
    durable: bool = True


Effect = Send | Write
