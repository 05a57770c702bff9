"""Pushes in a codec's bytes: error feedback against one process, retries, what a shard makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.errors import JobError
from shoal.job.optim import OptimOptions
from shoal.sync.codec import Draws, codec_of
from shoal.sync.server import messages as m
from shoal.sync.server.effects import Send
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.messages import Address, Key, Piece
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.payload import from_bytes, to_bytes
from shoal.sync.server.placement import Block
from shoal.sync.server.rules import Rules
from shoal.sync.server.shard import ServerShard
from shoal.sync.server.worker import Pushed

WORKER = Address("worker", 0, 1)
SHAPES = {"a": (20, 40), "b": (7,), "s": ()}
# The rows of `a` lie on two shards.
PLACED = {
    0: (Piece("a", (0, 0), (9, 40)), Piece("s", (), ())),
    1: (Piece("a", (9, 0), (11, 40)), Piece("b", (0,), (7,))),
}
CODECS = ["int8", "int4:unbiased", "topk:0.05+int2", "randomk:0.25"]


def gradients(clock: int, dtype: torch.dtype = torch.float32) -> dict[int, Pushed]:
    generator = torch.Generator().manual_seed(clock)
    made = {
        shard: tuple(torch.randn(piece.shape, generator=generator).to(dtype) for piece in pieces)
        for shard, pieces in PLACED.items()
    }
    return {shard: Pushed(PLACED[shard], tensors) for shard, tensors in made.items()}


def flat(pushed: dict[int, Pushed]) -> list[tuple[Piece, Tensor]]:
    return [both for shard in sorted(pushed) for both in zip(pushed[shard].pieces, pushed[shard].tensors, strict=True)]


def same(one: dict[int, Pushed], other: dict[int, Pushed]) -> bool:
    return all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(flat(one), flat(other), strict=True))


# What one process does.


def one_process(codec: str, rules: Rules, answers: list[bool], weights: list[float], seed: int, worker: int):
    """Of each clock the payloads, in the order of shards; the recurrence of the paper, written out."""
    draws = Draws(seed, worker << 20)
    coded = codec_of(codec, draws)
    kept = {piece: torch.zeros(piece.shape) for pieces in PLACED.values() for piece in pieces}
    last = 0.0
    for clock, (accepted, weight) in enumerate(zip(answers, weights, strict=True)):
        draws.at(clock)
        after, payloads = {}, []
        for piece, gradient in flat(gradients(clock)):
            share = weight / last if last and rules.mode == "asp" else 1.0
            whole = torch.add(gradient, kept[piece], alpha=share)
            row = list(whole.flatten())
            while len(row) % coded.granule:
                row.append(row[-(whole.numel() % 64)] if coded.granule == 64 else torch.tensor(0.0))
            payloads.append(coded.encode(torch.stack(row)[None])[0])
            after[piece] = whole - coded.decode(payloads[-1][None], torch.float32)[0, : whole.numel()].view(whole.shape)
        if accepted:
            kept, last = after, weight
        yield payloads


@pytest.mark.parametrize("mode", ["bsp", "asp"])
@pytest.mark.parametrize("codec", CODECS)
def test_pushes_are_those_of_one_process_whatever_is_accepted(codec, mode):
    rng = random.Random(codec + mode)
    answers, weights = [rng.random() < 0.6 for _ in range(12)], [rng.choice((64.0, 128.0, 48.0)) for _ in range(12)]
    rules = Rules(mode, codec=codec)
    encoder = Encoder(rules, seed=5, worker=3)
    expected = one_process(codec, rules, answers, weights, 5, 3)
    for clock, (accepted, weight, payloads) in enumerate(zip(answers, weights, expected, strict=True)):
        pushed = encoder.encode(gradients(clock), weight, clock)
        assert all(one.encoded for one in pushed.values())
        assert all(torch.equal(mine, theirs) for (_, mine), theirs in zip(flat(pushed), payloads, strict=True))
        encoder.settle(accepted)


def balance(mode: str, settle: Callable[[Encoder, bool], None]) -> float:
    """How much is missing of all accepted gradients, in what was pushed and what is kept; float64.

    bsp: of sums over tokens. asp: of means over a push's tokens.
    """
    encoder, total = Encoder(Rules(mode, codec="topk:0.05+int2")), {}
    codec, rng = encoder.codec, random.Random(2)
    for clock in range(30):
        given = gradients(clock, torch.float64)
        weight, accepted = rng.choice((2.0, 6.0)), rng.random() < 0.7
        unit = weight if mode == "asp" else 1.0
        pushed = encoder.encode(given, weight, clock)
        for (piece, payload), (_, gradient) in zip(flat(pushed), flat(given), strict=True):
            sent = from_bytes(codec, payload, piece, torch.float64)
            total[piece] = total.get(piece, 0.0) + accepted * (gradient - sent) / unit
        settle(encoder, accepted)
    kept, weight = encoder.rest()
    unit = weight if mode == "asp" else 1.0
    return max((total[piece] - tensor / unit).norm().item() for piece, tensor in flat(kept))


@pytest.mark.parametrize("mode", ["bsp", "asp"])
def test_what_was_pushed_and_the_rest_are_all_accepted_gradients(mode):
    assert balance(mode, Encoder.settle) < 1e-12


def always_kept(encoder: Encoder, accepted: bool) -> None:
    Encoder.settle(encoder, True)


def never_kept(encoder: Encoder, accepted: bool) -> None:
    Encoder.settle(encoder, accepted and encoder.draws.calls < 1 << 20)


def not_rescaled(encoder: Encoder, accepted: bool) -> None:
    encoder.rescaled = not encoder.rescaled
    Encoder.settle(encoder, accepted)


@pytest.mark.parametrize("mode", ["bsp", "asp"])
@pytest.mark.parametrize("mistake", [always_kept, never_kept, not_rescaled])
def test_other_residuals_are_seen(mistake, mode):
    assert balance(mode, mistake) > 0.1


@pytest.mark.parametrize("codec", ["randomk:0.25", "int8:unbiased"])
def test_what_is_random_follows_from_seed_worker_part_and_clock(codec):
    def pushed(clock: int, seed: int = 0, worker: int = 1, part: int = 0):
        return Encoder(Rules(codec=codec), seed=seed, worker=worker, part=part).encode(gradients(0), 1.0, clock)

    assert same(pushed(4), pushed(4))
    for other in (pushed(5), pushed(4, seed=1), pushed(4, worker=2), pushed(4, part=1)):
        assert not same(pushed(4), other)


def test_the_rest_is_all_that_was_lost_until_it_is_accepted():
    encoder = Encoder(Rules("asp", codec="sign"))
    codec = encoder.codec
    first = encoder.encode(gradients(0), 8.0, 0)
    assert not encoder.owed
    encoder.settle(True)
    encoder.encode(gradients(1), 4.0, 1)
    encoder.settle(False)
    lost = {
        p: g - from_bytes(codec, b, p, g.dtype) for (p, b), (_, g) in zip(flat(first), flat(gradients(0)), strict=True)
    }
    for accepted in (False, True):
        assert encoder.owed
        rest, weight = encoder.rest()
        assert weight == 8.0
        assert {shard: pushed.pieces for shard, pushed in rest.items()} == PLACED
        assert not any(one.encoded for one in rest.values())
        assert all(torch.equal(tensor, lost[piece]) for piece, tensor in flat(rest))
        encoder.settle(accepted)
    assert not encoder.owed
    anew = Encoder(Rules("asp", codec="sign"))
    assert same(encoder.encode(gradients(2), 4.0, 2), anew.encode(gradients(2), 4.0, 2))


def test_without_feedback_nothing_is_kept():
    encoder = Encoder(Rules("asp", codec="sign", feedback=False))
    first = encoder.encode(gradients(0), 1.0, 0)
    encoder.settle(True)
    assert not encoder.owed
    assert same(encoder.encode(gradients(0), 1.0, 0), first)


def test_what_is_not_finite_is_seen_and_leaves_no_trace():
    encoder, other = (Encoder(Rules("asp", codec="topk:0.05+int2")) for _ in range(2))
    for one in (encoder, other):
        one.encode(gradients(0), 1.0, 0)
        one.settle(True)
    broken = gradients(1)
    broken[0].tensors[0][3, 3] = torch.nan
    pushed = encoder.encode(broken, 1.0, 1)
    assert not from_bytes(encoder.codec, pushed[0].tensors[0], PLACED[0][0], torch.float32).isfinite().all()
    encoder.settle(False)
    assert same(encoder.encode(gradients(2), 1.0, 2), other.encode(gradients(2), 1.0, 2))


# What a shard makes of it.


def shard(codec: str = "int8", **options) -> ServerShard:
    values = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    sgd = OptimOptions(name="sgd", momentum=0.0, weight_decay=0.0)
    held = Parameters(blocks(values, [Block("a", 0, 9), Block("s", 0, 1)]), Rules("asp", codec=codec), sgd, 10)
    return ServerShard(0, held, **options)


def test_a_shard_stages_what_the_bytes_say_also_from_its_log_and_in_other_copies():
    pushed = Encoder(Rules("asp", codec="int8")).encode(gradients(0), 1.0, 0)[0]
    codec, key = codec_of("int8"), Key(0, 0, 0)
    expected = [from_bytes(codec, b, p, torch.float32) for p, b in zip(pushed.pieces, pushed.tensors, strict=True)]
    assert (expected[0] - gradients(0)[0].tensors[0]).abs().max() < 0.02
    first, logged = shard(others=(1,)), shard(logged=True)
    stage = m.Stage(key, 0, 1, pushed.pieces, encoded=True)
    forward = first.handle(WORKER, stage, pushed.tensors, 0.0)[0]
    assert isinstance(forward, Send)
    write = logged.handle(WORKER, stage, pushed.tensors, 0.0)[0]
    second, back = shard(), shard(logged=True)
    second.handle(first.address, forward.message, forward.tensors, 0.0)
    back.recover([(write.what, write.tensors)])
    for server in (first, logged, second, back):
        assert all(map(torch.equal, server.staged[key].gradient, expected))


def test_bytes_that_cannot_be_of_this_job_are_refused():
    pushed = Encoder(Rules("asp", codec="int4")).encode(gradients(0), 1.0, 0)[0]
    stage = m.Stage(Key(0, 0, 0), 0, 1, pushed.pieces, encoded=True)
    with pytest.raises(JobError, match=r"204 bytes of torch.uint8 came for a \[9, 40\], not 396"):
        shard("int8").handle(WORKER, stage, pushed.tensors, 0.0)
    with pytest.raises(JobError, match="no codec"):
        shard("none").handle(WORKER, stage, pushed.tensors, 0.0)


@pytest.mark.parametrize("codec", ["fp16", "sign", "topk:0.05+int2", "dct:0.1"])
def test_pieces_of_any_size_keep_their_shape(codec):
    coded = codec_of(codec)
    for shape in ((), (0, 3), (1,), (5, 13), (64,), (4, 256)):
        piece, tensor = Piece("x", (0,) * len(shape), shape), torch.ones(shape)
        back = from_bytes(coded, to_bytes(coded, tensor), piece, torch.float32)
        assert back.shape == tensor.shape
        assert back.isfinite().all()
    column = torch.arange(12.0).view(4, 3)[:, 1:2]
    cast = codec_of("bf16")
    assert torch.equal(from_bytes(cast, to_bytes(cast, column), Piece("x", (0, 1), (4, 1)), torch.float32), column)
