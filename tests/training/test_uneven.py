"""Runs on uneven machines: shares and paces, given or measured; resumed, and with every sample once."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from shoal.job import read, shares
from shoal.observe import metrics
from shoal.observe.exchange import exchange
from shoal.training import measure, settle
from tests.training.test_local_steps import broken_off

LEDGER, SLOW = "tests.training.cases:ledger", "tests.training.slow:ledger"
PACED = {"name": "local", "every": 4, "fragments": 2, "delay": 2, "mix": 0.25, "pace": "1+3+2"}


def stream(seen: list[list[list[int]]]) -> list[int]:
    """All samples of a run, step after step, from what its readers have read."""
    return [sample for step in zip(*seen, strict=True) for sample in chain(*step)]


@pytest.fixture(scope="module")
def paced(train, tiny, tmp_path_factory) -> tuple[Path, list[int]]:
    """12 steps of three replicas, the first of which takes one in three; and the samples. Saved in the middle of a
    round, before a step that the first replica leaves out."""
    run = tmp_path_factory.mktemp("paced") / "whole"
    job = tiny(run, "replicas=3", train={"steps": 12}, sync=PACED, checkpoint={"every": 7, "keep": 9})
    return run, stream(train(job, entry=LEDGER))


def test_a_pace_uses_every_sample_once(paced, train, tiny, tmp_path):
    """In the order of the data, as one process reads it."""
    run, samples = paced
    steps = 4 + 12 + 8
    job = tiny(tmp_path / "run", "replicas=1", train={"steps": 12})
    whole = stream(train(job, entry=LEDGER))
    assert samples == whole[: 4 * steps]
    rows = metrics.read(run)
    # Replica 0 takes the last of each three steps, and writes no loss of the others.
    assert [row["loss"] is not None for row in rows] == [step % 3 == 0 for step in range(1, 13)]
    assert rows[-1]["val_loss"] < rows[2]["loss"]
    outer = sum(row["outer_tokens"] for row in rows if "outer_tokens" in row)
    assert outer == pytest.approx(sum(row["tokens"] for row in rows[2:]), rel=0.2)


def test_a_paced_run_goes_on_bitwise_where_it_was(paced, train, tiny, tmp_path):
    run = broken_off(paced[0], tmp_path / "run")
    again = stream(train(tiny(run), resume=True, entry=LEDGER))
    assert again == paced[1][-len(again) :]
    first, second = metrics.read(paced[0]), metrics.read(run)
    for key in ("loss", "grad_norm", "lr", "outer_common", "val_loss"):
        assert [row.get(key) for row in first] == [row.get(key) for row in second], key
    for one, two in zip(
        *(sorted(r.glob("checkpoints/step-00000012/*.safetensors")) for r in (paced[0], run)), strict=True
    ):
        assert one.read_bytes() == two.read_bytes()


def test_who_is_slow_is_told_and_what_a_codec_saves_between_replicas_of_several_ranks(train, tiny, tmp_path):
    run = tmp_path / "run"
    job = tiny(run, "replicas=2,fsdp=2", train={"steps": 4, "validate_tokens": 256}, sync={"codec": "int8"})
    train(job, entry=SLOW, victim=2, seconds=0.05)
    rows = metrics.read(run)
    assert ["waited_s" in row for row in rows] == [False, True, True, True]
    waited = [sum(row["waited_s"][replica] for row in rows[1:]) for replica in ("0", "1")]
    # Three sequences a step; what a busy machine adds to both is small beside that.
    assert waited[1] < waited[0]
    facts = dict(exchange(job, rows))
    assert facts["waiting"].startswith("replica 0 waited for others most, ")
    # int8 with scales is 0.27 of float32; so small a model adds what gloo says of each tensor.
    assert 2 < float(facts["compression"].split()[0]) < 4
    assert all(0 < row["sent_across_bytes"] < row["sent_bytes"] for row in rows)


@pytest.mark.nightly
@pytest.mark.parametrize("option", ["replica_share", "pace"])
def test_a_slow_replica_gets_less_to_do(train, tiny, tmp_path, option):
    """Measured once, said, written into the job, and not measured again by a run that goes on."""
    run = tmp_path / "run"
    auto = "replicas=2,replica_share=auto" if option == "replica_share" else "replicas=2"
    sync = {"name": "local", "every": 4, "pace": "auto"} if option == "pace" else {}
    job = tiny(run, auto, train={"steps": 4}, sync=sync)
    seen = train(job, entry=SLOW, victim=1, seconds=0.05)
    found = read(run / "job.toml")
    text = found.sync.pace if option == "pace" else found.layout.replica_share
    fast, slow = shares.parse(text)
    assert fast > slow
    assert len(list(chain(*seen[0]))) > len(list(chain(*seen[1])))
    assert len(set(stream(seen))) == len(stream(seen))
    said = f"{'sync.pace' if option == 'pace' else 'replica_share'} by measured speed: {text} ("
    assert said in (run / "log.txt").read_text()
    train(tiny(run), resume=True, entry=SLOW, victim=0, seconds=0.05)
    assert (run / "log.txt").read_text().count("by measured speed") == 1
    assert read(run / "job.toml") == found


@pytest.mark.parametrize(
    ("layout", "seconds", "share"),
    [
        ("replicas=3", [1.0, 1.0, 2.0], "5+5+2"),
        ("replicas=2,fsdp=2,micro_batch=2", [1.0, 2.0], "2+1"),
        ("replicas=2,pipeline=2,micro_batch=3", [1.0, 9.0], "1+1"),  # 1f1b needs two micro-batches of each
        ("replicas=3", [1.0, 1.04, 1.0], ""),
        ("replicas=5", [1.0, 1.0, 1.0, 1.0, 1.0], "3+3+2+2+2"),  # 12 sequences
        ("replicas=2", [1.0, 1e-6], "1+11"),
    ],
)
def test_shares_go_by_what_replicas_take(monkeypatch, tiny, tmp_path, layout, seconds, share):
    job = tiny(tmp_path, f"{layout},replica_share=auto")
    monkeypatch.setattr(measure, "of_replicas", lambda *_: seconds)
    said: list[str] = []
    settled = settle.settle(job, None, [None], said.append)
    assert settled.layout.replica_share == ("" if share == "1+1" else share)
    assert settled.validate() == settled
    assert said[0].startswith(f"replica_share by measured speed: {settled.layout.replica_share or 'equal'} (")
    monkeypatch.setattr(measure, "of_replicas", None)
    assert settle.settle(settled, None, [None], said.append) == settled


@pytest.mark.parametrize(
    ("layout", "seconds", "pace"),
    [
        ("replicas=3", [2.0, 1.0, 3.0], "25+50+17"),
        ("replicas=2", [1.0, 1000.0], "50+1"),
        ("replicas=2", [1.02, 1.0], ""),
        ("replicas=2,replica_share=1+2", [2.0, 1.0], ""),
        ("replicas=2,replica_share=2+1", [2.0, 1.0], "6+25"),  # of 50 steps a quarter, 12.5, rounded to 12
        ("replicas=2,replica_share=auto", [2.0, 1.0], ""),
    ],
)
def test_a_pace_goes_by_what_whole_shares_leave(monkeypatch, tiny, tmp_path, layout, seconds, pace):
    job = tiny(tmp_path, layout, sync={"name": "local", "pace": "auto"})
    monkeypatch.setattr(measure, "of_replicas", lambda *_: seconds)
    settled = settle.settle(job, None, [None], lambda _: None)
    assert settled.sync.pace == pace
    assert settled.validate() == settled


def test_one_replica_has_no_pace(tiny, tmp_path):
    job = tiny(tmp_path, "fsdp=2", sync={"name": "local", "pace": "auto"})
    assert settle.settle(job, None, [None], lambda _: None).sync.pace == ""
