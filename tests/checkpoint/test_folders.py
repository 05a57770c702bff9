"""Names of checkpoint folders, what is swept and what is kept."""

from __future__ import annotations

from shoal.checkpoint.folders import Attempt, complete, finish, name_of, prune, sweep
from tests.checkpoint.fleet import names


def make(root, *folders):
    for name in folders:
        (root / name).mkdir(parents=True)
        (root / name / "file").write_bytes(b"x")


def test_newest_first_and_strangers_are_left_out(tmp_path):
    make(
        tmp_path,
        "step-00000009",
        "step-00000010",
        "step-00000010-2",
        "step-00000010-10",
        "step-100000000",
        "best",
    )
    make(tmp_path, "step-00000011.abc-1.tmp", "step-12")
    found = [path.name for path in complete(tmp_path)]
    assert found == [
        "step-100000000",
        "step-00000010-10",
        "step-00000010-2",
        "step-00000010",
        "step-00000009",
    ]
    assert complete(tmp_path / "nowhere") == []


def test_a_step_that_is_there_is_not_replaced(tmp_path):
    for expected in ("step-00000005", "step-00000005-1", "step-00000005-2"):
        make(tmp_path, "step-00000005.abc-1.tmp")
        finish(tmp_path / "step-00000005.abc-1.tmp", 5)
        assert names(tmp_path)[-1] == expected


def test_sweep_leaves_what_other_ranks_write_now(tmp_path):
    now = Attempt("new", 3)
    make(tmp_path, *(Attempt("new", count).temporary(name_of(7)) for count in (1, 2, 3, 4)))
    make(tmp_path, Attempt("old", 9).temporary(name_of(7)), "step-00000006", "notes.tmp")
    sweep(tmp_path, now)
    assert names(tmp_path) == [
        "notes.tmp",
        "step-00000006",
        "step-00000007.new-3.tmp",
        "step-00000007.new-4.tmp",
    ]


def test_prune_keeps_the_newest_steps_and_those_that_the_run_has_yet_to_reach_again(tmp_path):
    make(tmp_path, "step-00000010", "step-00000020", "step-00000030", "step-00000030-1", "step-00000040")
    prune(tmp_path, step=30, keep=2, attempt=Attempt("new", 1))
    assert names(tmp_path) == ["step-00000020", "step-00000030-1", "step-00000040"]
    prune(tmp_path, step=30, keep=1, attempt=Attempt("new", 2))
    assert names(tmp_path) == ["step-00000030-1", "step-00000040"]
