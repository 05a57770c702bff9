"""Where a run computed, and what of it ends bitwise equality."""

from __future__ import annotations

import errno
import os
import subprocess

import torch

from shoal.observe import environment


def collected(threads: int) -> dict:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return environment.collect(torch.device("cpu"), 2, ["shoal", "train", "a b.toml"])
    finally:
        torch.set_num_threads(before)


def test_collected_and_read_again(tmp_path):
    found = collected(2)
    assert found["torch"] == torch.__version__
    assert (found["threads"], found["ranks"], found["command"]) == (2, 2, ["shoal", "train", "a b.toml"])
    environment.write(tmp_path, found)
    assert environment.read(tmp_path) == found
    assert environment.read(tmp_path / "missing") is None


def test_differences_name_what_changes_rounding_and_nothing_else():
    old = collected(1)
    assert environment.differences(old, old | {"time": "later", "command": [], "commit": "x"}) == []
    new = old | {"threads": 3, "torch": "9.9", "ranks": 5}
    assert environment.differences(old, new) == [f"torch {torch.__version__} → 9.9", "ranks 2 → 5", "threads 1 → 3"]
    assert environment.differences({}, {"host": "a"}) == ["host unknown → a"]


def test_record_says_what_changed_on_resume(tmp_path):
    said: list[str] = []
    environment.record(tmp_path, {"threads": 1, "time": "1"}, said.append)
    environment.record(tmp_path, {"threads": 1, "time": "2"}, said.append)
    assert said == []
    environment.record(tmp_path, {"threads": 2}, said.append)
    assert len(said) == 1
    assert "threads 1 → 2" in said[0]
    assert environment.read(tmp_path) == {"threads": 2}


def test_a_record_that_cannot_be_written_is_told_and_the_old_one_kept(tmp_path, monkeypatch):
    environment.write(tmp_path, {"threads": 1})

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    said: list[str] = []
    environment.record(tmp_path, {"threads": 2}, said.append)
    assert "threads 1 → 2" in said[0]
    assert said[1:] == ["warning: cannot write environment.json (No space left on device); training goes on without"]
    assert environment.read(tmp_path) == {"threads": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


def test_commit_of_a_checkout_and_outside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert collected(1)["commit"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first", "--no-gpg-sign"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert collected(1)["commit"] == commit
    (tmp_path / "file").write_text("2")
    assert collected(1)["commit"] == commit + "+"
