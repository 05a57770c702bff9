"""Threads per rank, and the warning for more workers than cores."""

from __future__ import annotations

import pytest

from shoal.launch import cores


@pytest.mark.parametrize(
    ("there", "threads", "ranks", "each"), [(8, 0, 2, 4), (8, 0, 3, 2), (2, 0, 8, 1), (2, 5, 8, 5)]
)
def test_threads_are_an_equal_part_of_the_cores(monkeypatch, there, threads, ranks, each):
    monkeypatch.setattr(cores, "cores", lambda: there)
    assert cores.threads_per_rank(threads, ranks) == each


def test_more_workers_than_cores_are_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "cores", lambda: 2)
    monkeypatch.setattr(cores, "DEVICES", tmp_path)
    assert cores.too_many_workers(2) == ""
    assert cores.too_many_workers(3) == "3 workers share 2 cores; 2 would be faster"
    monkeypatch.setattr(cores, "cores", lambda: 1)
    assert cores.too_many_workers(2) == "2 workers share 1 core; 1 would be faster"
    assert cores.too_many_workers(1) == ""


def test_workers_that_have_gpus_are_not_warned_of_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "cores", lambda: 2)
    monkeypatch.setattr(cores, "DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert cores.too_many_workers(3)
    (tmp_path / "nvidia0").touch()
    assert cores.too_many_workers(3) == ""


def test_a_containers_quota_counts(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(64)))
    assert cores.cores() == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores.cores() == 64
