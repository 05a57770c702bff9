"""Calibrating measures this machine within its time and leaves an entry from which steps can be predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.cli.main import main
from shoal.errors import JobError
from shoal.launch import calibrate, measure
from shoal.planning import entry, local
from tests.planning.test_local import JOB


def test_powers_of_two_and_the_most():
    assert [calibrate.worlds(n) for n in (1, 2, 3, 4, 6)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6]]


def test_as_many_calls_as_fit_and_one_at_least(monkeypatch):
    """By a clock that each call moves on by a second, the first by 100."""
    clock, calls = [0.0], [0]

    def call() -> None:
        clock[0] += 1.0 if calls[0] else 100.0
        calls[0] += 1

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    where = torch.device("cpu")
    assert measure.timed(call, where, 4.5) == 1.0
    assert calls[0] == 1 + 5
    calls[0] = 1
    assert measure.timed(call, where, 0.0) == 1.0
    assert calls[0] == 1 + 2


def test_products_end_when_their_time_is_over(monkeypatch):
    """By a clock on which each shape takes a second: the smallest come first."""
    clock = [0.0]

    def timed(call, where, seconds):
        clock[0] += 1.0
        return 1.0

    monkeypatch.setattr(measure, "timed", timed)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    found, odd = measure._products(torch.device("cpu"), torch.float32, 12.0)
    assert odd == 1.0
    assert len(found["shapes"]) == 12 - 2 * 3 + 1
    assert found["shapes"][0] == [16, 16, 16]


def test_this_machine(tmp_path: Path):
    said: list[str] = []
    made, path = calibrate.calibrate(ranks=2, seconds=5, out=str(tmp_path / "new" / "machine.toml"), say=said.append)
    assert entry.read(path) == made
    assert [side.ranks for side in made.sides] == [1, 2]
    assert len(said) == 2
    assert made.versions["torch"] == torch.__version__
    for layout in ("replicas=1", "replicas=2", "fsdp=2", "tensor=2", "pipeline=2,micro_batch=1"):
        job = replace(JOB, layout=type(JOB.layout).parse(layout))
        found = local.predict(job, made)
        assert 0 < found.seconds < 1e4
        assert found.parts["products"] > 0
    assert made.machine in calibrate.summary(made)


def test_a_place_where_nothing_can_be_written_is_found_before_measuring(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(calibrate, "Pool", None)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "machine.toml", tmp_path):
        with pytest.raises(JobError, match="cannot be written") as caught:
            calibrate.calibrate(out=str(out))
        assert "--out" in caught.value.fix


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--ranks", "0"], "--ranks=0 is less than 1"),
        (["--ranks", "65"], "--ranks 65 is more than 64"),
        (["--seconds", "1"], "--seconds=1.0 is less than 5"),
        (["--rank", "2"], "did you mean --ranks?"),
    ],
)
def test_mistakes(args: list[str], what: str, capsys: pytest.CaptureFixture):
    assert main(["calibrate", *args]) == 2
    assert what in capsys.readouterr().err
