"""The shadow that shards serve with a codec: the same bits for everybody, near the weights, in few bytes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from shoal.job.optim import OptimOptions
from shoal.sync.codec import codec_of
from shoal.sync.server import messages as m
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.follower import Follower
from shoal.sync.server.messages import NO_CHAIN, Address, Chain, Key, Piece
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.placement import Block
from shoal.sync.server.rules import Rules
from shoal.sync.server.shadow import Shadow
from shoal.sync.server.shard import ServerShard
from shoal.sync.server.worker import Pushed, Worker

SHAPES = {"a": (24, 48), "b": (256, 16), "s": ()}
HELD = [Block("a", 0, 24), Block("b", 0, 256), Block("s", 0, 1)]
WHOLE = tuple(Piece(name, (0,) * len(shape), shape) for name, shape in SHAPES.items())
COLUMNS = (Piece("a", (0, 20), (24, 28)), Piece("b", (64, 0), (128, 16)))
CODECS = ["bf16", "int8", "sign", "topk:0.05+int2", "randomk:0.25"]


def shard(codec: str = "int4", level: str = "snapshot", most: int = 16, **rules) -> ServerShard:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    sgd = OptimOptions(name="sgd", lr=1.0, momentum=0.5, weight_decay=0.0)
    held = Parameters(blocks(values, HELD), Rules("asp", codec=codec, **rules), sgd, 10)
    return ServerShard(0, held, level=level, shadow=Shadow(codec, Chain(0, 77), most=most))


def commit(server: ServerShard) -> None:
    """One more version, by a push that is drawn from its number."""
    version = server.version + 1
    key, generator = Key(9, 0, version), torch.Generator().manual_seed(version)
    tensors = tuple(torch.randn(piece.shape, generator=generator) for piece in WHOLE)
    server.handle(Address("worker", 9, 1), m.Stage(key, 0, 1, WHOLE), tensors, 0.0)
    server.handle(m.COORDINATOR, m.Apply(version, (key,), 0.1, 0.5, 0), (), 0.0)


def pull(
    server: ServerShard, follower: Follower, wanted: tuple[Piece, ...] | None = None, version: int | None = None
) -> tuple[m.Pulled | m.Gone, Sequence[Tensor]]:
    """What was answered, and what the follower made of it."""
    asked = m.Pull(
        Key(0, 0, 0), server.version if version is None else version, wanted, False, *follower.holds(0, wanted)
    )
    (effect,) = server.handle(Address("worker", 0, 1), asked, (), 0.0)
    if isinstance(effect.message, m.Gone):
        return effect.message, ()
    taken = follower.take(effect.message, effect.tensors, wanted)
    assert taken is not None
    assert taken[0] == (wanted or WHOLE)
    return effect.message, taken[1]


def equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(one.view(torch.int32), other.view(torch.int32)) for one, other in zip(some, others, strict=True)
    )


# The same bits.


def differences(codec: str, seed: int) -> Counter[str]:
    """A random schedule of pulls by four workers, one of them rare, one of parts of blocks, from one copy of the shard
    or the other; counts what happened, and pulls that were not bit for bit what the copy has at that version."""
    rng, counts = random.Random(seed), Counter()
    copies = [shard(codec, level=rng.choice(("snapshot", "shard")), most=6)]
    followers = [(Follower(codec), COLUMNS if number == 2 else None) for number in range(4)]
    server = copies[0]
    for _ in range(50):
        for _ in range(rng.choice((0, 1, 1, 3))):
            for copy in copies:
                commit(copy)
        if rng.random() < 0.1:
            copies = copies if len(copies) > 1 else [*copies, server.clone(1)]
            server = rng.choice(copies)
        follower, wanted = followers[rng.choice((0, 0, 0, 1, 1, 1, 2, 2, 2, 3))]
        answer, tensors = pull(server, follower, wanted, version=max(0, server.version - (rng.random() < 0.2)))
        if isinstance(answer, m.Gone):
            counts["gone"] += 1
            continue
        counts["dense" if answer.base < 0 else "some deltas" if answer.links else "nothing"] += 1
        counts["several"] += len(answer.links) > 1
        assert server.pulls.shadow is not None
        here = server.held.cut(server.pulls.shadow._dense[answer.version], wanted or WHOLE)
        counts["different"] += not equal(tensors, here)
    return counts


@pytest.mark.parametrize("codec", CODECS)
def test_whoever_follows_has_the_bits_of_whoever_pulls_dense(codec):
    total = sum((differences(codec, seed) for seed in range(4)), Counter())
    assert total["different"] == 0
    assert min(total["dense"], total["some deltas"], total["nothing"], total["gone"]) > 0
    assert total["several"] > 0 or codec == "bf16"


def sums_first(self, held, message, tensors):
    """The mistake of adding the sum of the deltas."""
    sums = held._replace(tensors=tuple(torch.zeros_like(tensor) for tensor in held.tensors))
    MOVE(self, sums, message, tensors)
    for tensor, step in zip(held.tensors, sums.tensors, strict=True):
        tensor += step


def one_chain(self, chain=None):
    """The mistake of taking all copies of a shard for one."""
    FORGET(self)


def first_alone(self, base, version):
    """The mistake of leaving out what came after the first delta."""
    found = SINCE(self, base, version)
    return found and found[:1]


def as_it_was_meant(self, version, weights, blocks):
    """The mistake of moving the shard's own copy to the weights."""
    REACH(self, version, weights, blocks)
    self._dense[version] = weights


MOVE, FORGET, SINCE, REACH = Follower._move, Shadow.forget, Shadow.since, Shadow.reach


@pytest.mark.parametrize(
    ("where", "name", "mistake"),
    [
        (Follower, "_move", sums_first),
        (Shadow, "forget", one_chain),
        (Shadow, "since", first_alone),
        (Shadow, "reach", as_it_was_meant),
    ],
)
def test_other_bits_are_seen(monkeypatch, where, name, mistake):
    monkeypatch.setattr(where, name, mistake)
    assert any(differences("int4", seed)["different"] for seed in range(8))


@pytest.mark.parametrize("drawn", [77, 78])
def test_a_shard_that_was_killed_is_not_taken_for_what_it_was(drawn):
    """At the same version its shadow is another one; a process that drew the number of the one before would hide it."""
    before, after = shard(), shard()
    after.pulls.shadow.forget(Chain(0, drawn))
    held, new = Follower("int4"), Follower("int4")
    pull(before, held)
    for server in (before, after):
        commit(server)
    pull(before, held)
    pull(after, new)
    commit(after)
    pull(after, new)
    _, tensors = pull(after, held)
    assert equal(tensors, pull(after, new)[1]) == (drawn != 77)


# Near the weights.


@pytest.mark.parametrize(("codec", "lost"), [("int8", 0.004), ("int4", 0.15), ("sign", 0.6), ("topk:0.25+int8", 0.75)])
def test_the_shadow_stays_near_the_weights(codec, lost):
    """lost: ‖x − C(x)‖² / ‖x‖² at most, here of each step; the bound of the docstring follows from the largest."""
    server, follower = shard(codec), Follower(codec)
    furthest = longest = worst = 0.0
    old = [value.clone() for value in server.held.live()]
    held = [tensor.clone() for tensor in pull(server, follower)[1]]
    for _ in range(40):
        for _ in range(3):
            commit(server)
        new = [value.clone() for value in server.held.live()]
        _, tensors = pull(server, follower)
        left, way = away(new, tensors), away(new, old)
        worst = max(worst, left / away(new, held))
        furthest, longest = max(furthest, left), max(longest, way)
        old, held = new, [tensor.clone() for tensor in tensors]
    assert worst < lost**0.5
    assert 0 < furthest <= worst / (1 - worst) * longest
    for _ in range(60):
        key = Key(9, 0, server.version + 1)
        zeros = tuple(torch.zeros(piece.shape) for piece in WHOLE)
        server.handle(Address("worker", 9, 1), m.Stage(key, 0, 1, WHOLE), zeros, 0.0)
        server.handle(m.COORDINATOR, m.Apply(key.clock, (key,), 0.1, 0.0, 0), (), 0.0)
        _, tensors = pull(server, follower)
    assert away(server.held.live(), tensors) < 0.05 * furthest, "where the weights stay, the shadow comes to them"


def away(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return (
        sum((one.double() - other.double()).square().sum().item() for one, other in zip(some, others, strict=True))
        ** 0.5
    )


def test_look_ahead_is_followed_too():
    server, follower = shard("int8", compensation="look-ahead", workers=4), Follower("int8")
    pull(server, follower)
    for _ in range(3):
        commit(server)
        _, tensors = pull(server, follower)
    assert away(server.held.freeze(), tensors) < 0.03 * away(server.held.freeze(), server.held.live())


# Which pulls are dense, which are refused.


def test_the_version_before_is_there_and_what_was_passed_over_is_gone():
    server, first, second = shard(), Follower("int4"), Follower("int4")
    assert pull(server, first)[0].base == -1
    commit(server)
    assert pull(server, first)[0].links == (1,)
    commit(server)
    assert pull(server, first, version=1)[0].links == ()
    assert pull(server, second, version=1)[0] == m.Pulled(Key(0, 0, 0), 0, 1, WHOLE, Chain(0, 77))
    commit(server)
    # Nobody has pulled version 2 yet; once 3 has been, there is no way to it.
    assert pull(server, second, version=2)[0].links == (2,)
    commit(server)
    commit(server)
    assert pull(server, first, version=5)[0].links == (2, 5)
    assert isinstance(pull(server, second, version=4)[0], m.Gone)
    assert pull(server, second, version=5)[0].links == (5,)


def test_so_many_deltas_are_kept_and_never_more_bytes_than_the_weights():
    server, busy, slow = shard("sign", most=5), Follower("sign"), Follower("sign")
    for commits, links in ((0, 0), (5, 5), (6, 0)):
        for _ in range(commits):
            commit(server)
            pull(server, busy)
            assert not server.pulls._frozen, "the shadow takes the place of copies of the weights"
        assert len(pull(server, slow)[0].links) == links
    assert len(server.pulls.shadow._deltas) == 5
    coarse, busy = shard("int8"), Follower("int8")
    for _ in range(8):
        pull(coarse, busy)
        commit(coarse)
    assert len(coarse.pulls.shadow._deltas) == 3


def test_a_small_part_of_a_block_travels_as_it_is_where_that_is_less():
    server, follower, row = shard("int8"), Follower("int8"), (Piece("b", (3, 0), (1, 16)),)
    pull(server, follower, row)
    commit(server)
    assert pull(server, follower, row)[0].base == -1
    assert pull(server, follower, COLUMNS)[0].base == -1, "other pieces than before"
    commit(server)
    answer, _ = pull(server, follower, COLUMNS)
    assert answer.pieces == WHOLE[:2]
    assert answer.links == (2,)


def test_what_is_being_sent_does_not_change():
    server, follower = shard(), Follower("int4")
    asked = m.Pull(Key(0, 0, 0), 0)
    (start,) = server.handle(Address("worker", 0, 1), asked, (), 0.0)
    kept = [tensor.clone() for tensor in start.tensors]
    pull(server, follower)
    for _ in range(3):
        commit(server)
        pull(server, follower)
    assert equal(start.tensors, kept)


def test_a_worker_says_what_it_holds_and_passes_over_what_does_not_fit():
    server, key = shard(), Key(4, 2, 7)
    worker = Worker(4, share=1, shards=1, follower=Follower("int4"))
    worker.start(99, 0.0)
    worker.handle(m.Joined(4, 99, 2, 7, 0, (0,)), (), 0.0)
    asked = worker.handle(m.Grant(key, 0, m.Range(0, 1)), (), 0.0)[0].message
    assert (asked.chain, asked.held) == (NO_CHAIN, -1)
    (dense,) = server.handle(worker.address, asked, (), 0.0)
    assert worker.handle(dense.message, dense.tensors, 0.0) == []
    assert worker.state == "computing"
    worker.push({0: Pushed(WHOLE, tuple(torch.zeros(piece.shape) for piece in WHOLE))}, 1.0, 0.0, 0.0)
    worker.handle(m.Answer(key, True, 1, 0), (), 0.0)
    commit(server)
    asked = worker.handle(m.Grant(worker.key, 1, m.Range(1, 2)), (), 0.0)[0].message
    assert (asked.chain, asked.held) == (Chain(0, 77), 0)
    (step,) = server.handle(worker.address, asked, (), 0.0)
    other = m.Pulled(worker.key, 0, 1, step.message.pieces, Chain(0, 78), 0, (1,))
    worker.handle(other, step.tensors, 0.0)
    assert worker.state == "pulling"
    worker.handle(step.message, step.tensors, 0.0)
    pulled, tensors = worker.pulled[0]
    assert (pulled.pieces, pulled.encoded) == (WHOLE, False)
    assert equal(tensors, server.pulls.shadow._dense[1])


# Bytes.


@pytest.mark.parametrize(("codec", "most"), [("int8", 0.27), ("topk:0.05+int2", 0.02), ("topk:0.01+int2", 0.02)])
def test_bytes_of_a_push_and_a_pull(codec, most):
    """Of matrices; once a worker has pulled dense."""
    shape = (256, 384)
    values = {name: torch.randn(shape) for name in ("a", "b")}
    held = Parameters(blocks(values, [Block(name, 0, 256) for name in values]), Rules("asp", codec=codec), SGD, 10)
    server, follower = ServerShard(0, held, shadow=Shadow(codec, Chain(0, 1))), Follower(codec)
    encoder, pieces = Encoder(Rules("asp", codec=codec)), held.pieces()
    took = 0
    for clock in range(3):
        asked = m.Pull(Key(0, 0, clock), clock, None, False, *follower.holds(0, None))
        (pulled,) = server.handle(Address("worker", 0, 1), asked, (), 0.0)
        assert follower.take(pulled.message, pulled.tensors, None) is not None
        pushed = encoder.encode({0: Pushed(pieces, tuple(torch.randn(shape) for _ in pieces))}, 1.0, clock)[0]
        key = Key(0, 0, clock)
        server.handle(Address("worker", 0, 1), m.Stage(key, 0, 1, pieces, encoded=True), pushed.tensors, 0.0)
        server.handle(m.COORDINATOR, m.Apply(clock + 1, (key,), 1.0, 0.1, 0), (), 0.0)
        encoder.settle(True)
        if clock:
            took += sum(tensor.numel() * tensor.element_size() for tensor in (*pushed.tensors, *pulled.tensors))
    assert 0 < took / (2 * 2 * 2 * 4 * 256 * 384) <= most


SGD = OptimOptions(name="sgd", momentum=0.0, weight_decay=0.0)


def test_a_draw_is_made_once_for_all():
    """What a shard draws at random is in the bytes; of the other shards it is other."""
    one, other = (Shadow("randomk:0.25", Chain(0, 1), shard=number) for number in (0, 1))
    for shadow in (one, other):
        shadow.reach(0, [torch.zeros(64)], WHOLE[:1])
        shadow.reach(1, [torch.ones(64)], [Piece("a", (0,), (64,))])
    keys = [codec_of("randomk:0.25").decode(s._deltas[0].payloads[0][None], torch.float32) for s in (one, other)]
    assert not torch.equal(*keys)
