"""The parts of the server that know nothing of each other: placement, samples, journal, rules."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import msgspec
import pytest

from shoal.errors import CheckpointError, JobError
from shoal.job import Job
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.server import ServerOptions
from shoal.models.spec import parameters
from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.journal import MAGIC, decode, encode
from shoal.sync.server.messages import Key, Range
from shoal.sync.server.placement import Block, of_job, place
from shoal.sync.server.rules import Rules
from shoal.sync.server.samples import Samples

SHAPES = {"embed": (100, 8), "a": (30, 10), "b": (30, 10), "c": (20, 10), "norm": (10,), "scale": ()}


def load(blocks: list[Block]) -> int:
    rows = {name: (shape[0] if shape else 1) for name, shape in SHAPES.items()}
    elements = {name: (shape[1] if len(shape) > 1 else 1) for name, shape in SHAPES.items()}
    assert all(0 <= b.start < b.stop <= rows[b.name] for b in blocks)
    return sum((b.stop - b.start) * elements[b.name] for b in blocks)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 3, 6])
def test_every_row_is_on_one_shard_and_the_largest_load_is_near_the_best(shards, split):
    placed = place(SHAPES, shards, split_rows=split)
    rows = sorted((b.name, row) for blocks in placed for b in blocks for row in range(b.start, b.stop))
    assert rows == sorted((name, row) for name, shape in SHAPES.items() for row in range(shape[0] if shape else 1))
    loads = [load(blocks) for blocks in placed]
    whole = 1 if split else 800
    assert max(loads) <= 4 / 3 * max(-(-sum(loads) // shards), min(whole, 800)) + 10
    assert all(blocks == sorted(blocks) and blocks for blocks in placed)
    if not split:
        assert all((b.start, b.stop) == (0, SHAPES[b.name][0] if SHAPES[b.name] else 1) for p in placed for b in p)


def test_more_shards_than_parameters_are_refused_with_a_sentence():
    with pytest.raises(JobError, match="7 server shards for 6 parameters"):
        place(SHAPES, 7)
    assert len(place(SHAPES, 7, split_rows=True)) == 7


def test_of_a_job_every_row_has_its_shard():
    """Rows of the embedding, most of this model, are on both shards where the optimizer goes number by number. What is
    not learned needs no shard of its own, and has none."""
    experts = {
        "num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "kv_lora_rank": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    model = ModelOptions("deepseek_v3", vocab_size=5000, hidden_size=32, num_hidden_layers=2, **experts)
    job = Job(model=model, server=ServerOptions(shards=2))
    specs = parameters(model)
    shapes = {name: spec.shape for name, spec in specs.items()}
    learned = {name for name, spec in specs.items() if spec.learned}
    assert len(learned) < len(specs), "a router's bias is not learned"
    for optimizer, on_shards in (("adamw", 2), ("sgd", 2), ("muon", 1)):
        placed = of_job(replace(job, optim=OptimOptions(name=optimizer)))
        rows = sorted((b.name, row) for blocks in placed for b in blocks for row in range(b.start, b.stop))
        assert rows == sorted((name, row) for name, shape in shapes.items() for row in range(shape[0]))
        assert sum(any(b.name == "model.embed_tokens.weight" for b in blocks) for blocks in placed) == on_shards
    most = of_job(replace(job, server=ServerOptions(shards=len(learned))))
    assert all(any(b.name in learned for b in blocks) for blocks in most)
    with pytest.raises(JobError, match=f"{len(learned) + 1} server shards for {len(learned)} parameters"):
        of_job(replace(job, server=ServerOptions(shards=len(learned) + 1)))


def test_samples_are_used_once_whatever_is_given_back():
    rng = random.Random(0)
    for end in (37, 200):
        samples, leased, used = Samples(end), [], []
        while not samples.finished:
            if leased and rng.random() < 0.6:
                taken = leased.pop(rng.randrange(len(leased)))
                if rng.random() < 0.3:
                    samples.give_back(taken)
                    continue
                samples.consume(taken)
                used += range(*taken)
            elif (taken := samples.lease(rng.randint(1, 9))) is not None:
                assert not any(taken.start < r.stop and r.start < taken.stop for r in leased)
                leased.append(taken)
            watermark, exceptions = samples.state()
            covered = set(range(watermark)).union(*(range(*e) for e in exceptions))
            assert covered == set(used)
            assert samples.used == len(used)
        assert sorted(used) == list(range(end))


def test_samples_go_on_from_watermark_and_exceptions():
    samples = Samples(20, 5, (Range(8, 10), Range(10, 12)))
    assert [samples.lease(6) for _ in range(3)] == [Range(5, 8), Range(12, 18), Range(18, 20)]
    assert samples.lease(1) is None
    assert not samples.available
    samples.give_back(Range(12, 18))
    assert samples.claim(Range(14, 16))
    assert not samples.claim(Range(15, 17))
    assert [samples.lease(9) for _ in range(2)] == [Range(12, 14), Range(16, 18)]
    assert not samples.claim(Range(18, 22))


RECORDS = [
    r.Opened("job", 3, 12, (Range(14, 16),)),
    r.Entered(0, 77, 0, 0, 2),
    r.Granted(Key(0, 0, 0), 3, Range(12, 14), 0),
    r.Begun((r.Granted(Key(1, 0, 0), 3, Range(16, 18), 1), r.Granted(Key(2, 0, 0), 3, Range(18, 20), 1))),
    r.Changed(0, (0, 2)),
    r.Committed(4, (Key(0, 0, 0),), (0,), (2.0,), (Range(12, 14),), 0.5, 1.0, 0.1, (1,)),
    r.Rejected(Key(0, 0, 1), 4, 1, r.LATE),
    r.Left(0, 0, "expired"),
    r.Anew(),
    r.Answered(m.Answer(Key(0, 0, 1), False, 4, 1, r.LATE)),
    r.Paced(0, 2, 1, 3),
]


def test_a_journal_cut_anywhere_gives_its_whole_records():
    data = MAGIC + encode(RECORDS)
    ends = [len(MAGIC) + len(encode(RECORDS[:count])) for count in range(len(RECORDS) + 1)]
    for cut in range(len(data) + 1):
        records, size = decode(data[:cut])
        whole = sum(end <= cut for end in ends[1:])
        assert records == RECORDS[:whole]
        assert size == (ends[whole] if cut >= len(MAGIC) else 0)


def test_a_damaged_journal_is_refused_and_a_damaged_tail_is_dropped():
    data = bytearray(MAGIC + encode(RECORDS))
    last = len(MAGIC) + len(encode(RECORDS[:-1]))
    data[-1] ^= 1
    assert decode(bytes(data)) == (RECORDS[:-1], last)
    data[-1] ^= 1
    data[len(MAGIC) + 10] ^= 1
    with pytest.raises(CheckpointError, match="damaged at byte 16"):
        decode(bytes(data))
    with pytest.raises(CheckpointError, match="not a journal"):
        decode(b"something else entirely")


KEY = Key(1, 2, 3)
SAID: list[m.Message] = [
    m.Join(0, 2**40, 4, "model", "bpe"),
    m.Ask(KEY, 1),
    m.Push(KEY, 7, 12.0, 3.5, Range(4, 8)),
    m.Grant(KEY, 7, Range(4, 8)),
    m.Answer(KEY, False, 9, 2, r.LATE),
    m.Stage(KEY, 0, 2, (m.Piece("a", (0, 2), (3, 4)), m.Piece("scale", (), ()))),
    m.Staged(KEY, 0, 1, (m.Square("a", 0, 0.1), m.Square("a", 8, 1e-300))),
    m.Apply(8, (KEY, Key(2, 0, 0)), 1 / 3, 0.1, 2, (4, 5)),
    m.Pull(KEY, 7, (m.Piece("a", (0, 2), (3, 4)),), rows=(m.Rows(0, b"\x05"),)),
    m.Primaries(3, (0, 2)),
]


@pytest.mark.parametrize("message", SAID)
def test_messages_as_bytes(message):
    header = m.encode(message)
    assert m.decode(header) == message
    for wrong in (header[:-1], b"", header + b"x", m.encode(SAID[0]).replace(b"Join", b"Jain")):
        with pytest.raises(msgspec.DecodeError):
            m.decode(wrong)


def test_every_message_can_be_decoded():
    assert {kind.__name__ for kind in m.Message.__subclasses__()} == {kind.__name__ for kind in get_args(m.AnyMessage)}
    kinds = {kind.__name__ for kind in r.Record.__subclasses__()}
    assert kinds == {kind.__name__ for kind in get_args(r.AnyRecord)}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"workers": 0}, "workers=0 is less than 1"),
        ({"quorum": 0}, "quorum=0 is less than 1"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"retry": 0.0}, "retry=0.0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, what):
    """What is an option of a job besides: tests/job/test_server.py."""
    with pytest.raises(JobError, match=what):
        Rules(**options).validate()


def test_rules_are_what_the_options_of_a_job_say():
    options = ServerOptions(
        mode="ssp", staleness=3, max_staleness=9, quorum=2, grace=0.2, level="shard", compensation="rate",
        strength=0.3, lease=7.0, reconnect=0.1,
    )  # fmt: skip
    rules = Rules.of(options, workers=4, micro_batch=8, clip=0.5, retry=2.0)
    assert rules == Rules("ssp", 4, 3, 9, 2, 0.2, "shard", 7.0, 0.1, 2.0, 0.5, 8, "rate", 0.3)
    usual = Rules.of(ServerOptions(mode="asp", compensation="age"), workers=4, micro_batch=1, clip=0.0)
    assert (usual.max_staleness, usual.quorum, usual.power) == (None, 3, 0.5)
    with pytest.raises(JobError, match=r"server.quorum=3 of 2 workers"):
        Rules.of(ServerOptions(quorum=3), workers=2, micro_batch=1, clip=0.0)


def test_bounds_of_the_modes():
    assert Rules("bsp").bound(3) == Rules("quorum").bound(3) == 0
    assert Rules("asp").bound(3) is None
    assert Rules("asp", max_staleness=5).bound(3) == 5
    assert Rules("ssp", staleness=4).bound(3) == 27
    assert Rules("ssp", staleness=4, max_staleness=6).bound(3) == 6
