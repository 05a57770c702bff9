"""What a worker, the coordinator and the shards say to each other.

Messages are msgspec structs; tensors travel beside them (`effects.Send`), in the order of the message's `pieces`.
Every message may be lost, delayed, doubled or overtaken: whoever waits for an answer says it again, and every receiver
takes it twice as once.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Key(NamedTuple):
    """Names one push. clock: how many pushes of this incarnation had been answered before it."""

    worker: int
    incarnation: int
    clock: int


class Address(NamedTuple):
    """role: `worker`, `coordinator`, `shard` or `reader`. number: worker or shard. copy: of a shard; else a nonce."""

    role: str
    number: int = 0
    copy: int = 0


COORDINATOR = Address("coordinator")


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


class Rows(NamedTuple):
    """Of a piece only some rows. place: which of a message's `pieces`. bits: one a row of it; row i is bit i % 8 (of
    value 2^(i % 8)) of byte i // 8."""

    place: int
    bits: bytes


class Chain(NamedTuple):
    """Names one shadow of the weights (`shadow`). copy: of the shard. drawn: by its process, another one each time."""

    copy: int
    drawn: int


NO_CHAIN = Chain(-1, 0)


class Square(NamedTuple):
    """Sum of squares, in float64, of the rows of a gradient that one shard holds. row: the first of them."""

    name: str
    row: int
    value: float


class Spent(NamedTuple):
    """What a push has cost its worker, for the run's metrics.

    waited: seconds without work since the push before, or since the first grant. computed: seconds of forward and
    backward. memory_gib: of its fullest rank so far. sent, received: bytes. wasted: seconds computed since then on
    what was void before it could be pushed. drift: how far the worker's own steps took it from what it had pulled,
    the root of the sum of squares; 0 where it takes none. experts: how these samples used them, the rows of
    `parallel.expert.Use.totals_NX`.
    """

    waited: float = 0.0
    computed: float = 0.0
    memory_gib: float = 0.0
    sent: int = 0
    received: int = 0
    wasted: float = 0.0
    drift: float = 0.0
    experts: tuple[tuple[float, ...], ...] = ()


UNKNOWN = Spent()


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
    """May this clock begin, on which samples, from which version? gone: grants whose version a shard had no more.

    owes: what a codec lost of earlier pushes is still to be pushed. leaves: it wants to begin nothing more.
    """

    key: Key
    gone: int = 0
    owes: bool = False
    leaves: bool = False


class Push(Message, frozen=True):
    """A gradient is on its way to the shards. version: pulled. weight: valid tokens in it; loss_sum: over them.

    samples: what it was computed from; less than was granted where a slow worker computed fewer micro-batches.
    None of them: the rest, what a codec lost of earlier pushes and is still owed; weight: tokens of the last of these.
    """

    key: Key
    version: int
    weight: float
    loss_sum: float
    samples: Range
    spent: Spent = UNKNOWN

    @property
    def rest(self) -> bool:
        return self.samples.stop <= self.samples.start


class Noted(Message, frozen=True):
    """A worker has measured the loss on held-out text, of the weights of this version."""

    version: int
    nats: float
    tokens: int


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

    nonce: of the Join; of a shard: the version that it said it holds.
    """

    nonce: int
    why: str
    fix: str


class Grant(Message, frozen=True):
    """Begin this clock: pull `version`, compute on `samples`. gone: of the Ask that it answers.

    No samples: it is to compute nothing more, and to push what it owes, without a pull.
    """

    key: Key
    version: int
    samples: Range
    gone: int = 0

    @property
    def rest(self) -> bool:
        return self.samples.stop <= self.samples.start


class Finished(Message, frozen=True):
    """This worker owes nothing, and all samples are used up, or the job is asked to end, or it wants to leave."""

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


# Between the coordinator and somebody who only reads weights.


class Look(Message, frozen=True):
    """Which version is there? model: as in Join."""

    model: str = ""


class Seen(Message, frozen=True):
    """version: of the latest commit. samples: used up by then. primaries: as in Primaries."""

    version: int
    samples: int
    primaries: tuple[int, ...]


# Between a worker and a shard.


class Pull(Message, frozen=True):
    """Give me weights of `version` (`shard`, `hogwild`: of what is there, but not older). pieces: None = all.

    master: for readers: the weights that updates move (those that workers compute on may look ahead of them), of
    exactly that version whatever the level; once for each connection.
    chain, held: the shadow that the worker holds of these pieces, and its version; −1 = none.
    rows: of which pieces it takes some rows only; not of a shadow's.
    """

    key: Key
    version: int
    pieces: tuple[Piece, ...] | None = None
    master: bool = False
    chain: Chain = NO_CHAIN
    held: int = -1
    rows: tuple[Rows, ...] = ()


class Pulled(Message, frozen=True):
    """With the tensors of `pieces`.

    chain: where a codec is used, what the weights are the shadow of. base: −1, or the version that the deltas begin
    from; then the tensors are bytes, for each of `links`, the versions where a delta ends, those of all `pieces`, which
    are whole blocks of the shard. rows: as in Pull.
    """

    key: Key
    shard: int
    version: int
    pieces: tuple[Piece, ...]
    chain: Chain = NO_CHAIN
    base: int = -1
    links: tuple[int, ...] = ()
    rows: tuple[Rows, ...] = ()

    @property
    def encoded(self) -> bool:
        """Whether the tensors are bytes."""
        return self.base >= 0


class Gone(Message, frozen=True):
    """The shard has no weights of `version` any more, or for no more readers: it is at `newest`."""

    key: Key
    shard: int
    version: int
    newest: int


class Stage(Message, frozen=True):
    """With the tensors of `pieces`: sums over tokens of the gradient, of one of the worker's `parts` ranks.

    forwarded: by the shard's first copy, to the others. encoded: as bytes of the job's codec, a tensor for each piece.
    """

    key: Key
    part: int
    parts: int
    pieces: tuple[Piece, ...]
    forwarded: bool = False
    encoded: bool = False


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


class Clone(Message, frozen=True):
    """From a new copy to the one that workers talk to: give me all that you have, and pass on what comes."""

    shard: int
    copy: int


class Whole(Message, frozen=True):
    """With the tensors of `pieces`: all that a shard holds at `version`.

    pieces: weights and the optimizer's state, `<slot>.<name>`; then, for each of `backups` (workers), the weights that
    it pulled. values: of the optimizer, as JSON. staged: pushes that are not applied, and come by themselves.
    """

    version: int
    pieces: tuple[Piece, ...]
    backups: tuple[int, ...]
    values: bytes
    staged: tuple[Key, ...] = ()


class Backup(Message, frozen=True):
    """In a shard's log, with the tensors of `pieces`: weights that a worker computes on, as of `version`, where delay
    compensation will measure from them."""

    worker: int
    version: int
    pieces: tuple[Piece, ...]


class Copies(Message, frozen=True):
    """Which copies this shard has now: the first of them passes on to the others what workers push."""

    epoch: int
    copies: tuple[int, ...]


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


class Save(Message, frozen=True):
    """Keep what you hold at `version` as your part of a checkpoint. values: of its manifest, as JSON."""

    version: int
    values: bytes


class Saved(Message, frozen=True):
    """A part of a checkpoint, of the first shard the whole of it, is on disk; or why not, in `error`."""

    shard: int
    version: int
    error: str = ""


class Kept(Message, frozen=True):
    """A checkpoint of `version` is complete: what led to it need not be kept in logs any more."""

    version: int


class Over(Message, frozen=True):
    """The job has ended."""


AnyMessage = (
    Join | Leave | Heartbeat | Ask | Push | Noted
    | Look | Seen
    | Joined | Refused | Grant | Finished | Missing | Answer | Fenced | Primaries
    | Pull | Pulled | Gone | Stage
    | Hello | Staged | Copies | Combine | Combined | Apply | Applied | Drop
    | Clone | Whole | Backup | Save | Saved | Kept | Over
)  # fmt: skip
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """The header of a frame; its tensors travel beside it."""
    return _encoder.encode(message)


def decode(header: bytes) -> AnyMessage:
    """Raises msgspec.DecodeError for anything that is no message."""
    message: AnyMessage = _decoder.decode(header)
    return message
