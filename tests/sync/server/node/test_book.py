"""Where everybody listens, and the token that a run makes for itself."""

from __future__ import annotations

import stat
from pathlib import Path

from shoal.sync.server.messages import COORDINATOR, Address
from shoal.sync.server.node.book import FOLDER, Book, Entry, own_token


def test_whoever_listens_anew_is_found_there(tmp_path: Path):
    book = Book(tmp_path)
    assert book.find(COORDINATOR) is None
    for who in (COORDINATOR, Address("shard", 0, 0), Address("shard", 1, 0), Address("shard", 1, 2)):
        book.enter(who, "127.0.0.1", 1000 + 10 * who.number + who.copy)
    book.enter(Address("shard", 1, 0), "::1", 4)
    assert Book(tmp_path).find(COORDINATOR) == Entry("127.0.0.1", 1000)
    assert book.find(Address("shard", 1, 0)) == Entry("::1", 4)
    assert book.find(Address("shard", 1, 2)) == Entry("127.0.0.1", 1012)
    assert book.find(Address("shard", 2, 0)) is None
    (tmp_path / FOLDER / "coordinator.json").write_text('{"host": "127')
    assert book.find(COORDINATOR) is None, "torn"


def test_parts_of_two_starts_of_a_run_do_not_find_each_other(tmp_path: Path):
    """Who has no start of its own, as a reader, finds those of the coordinator's."""
    before, after, reader = Book(tmp_path, "1"), Book(tmp_path, "2"), Book(tmp_path)
    shard = Address("shard", 1, 0)
    before.enter(COORDINATOR, "::1", 10)
    before.enter(shard, "::1", 11)
    assert [book.find(shard) is not None for book in (before, after, reader)] == [True, False, True]
    after.enter(COORDINATOR, "::1", 20)
    assert [book.find(COORDINATOR) is not None for book in (before, after, reader)] == [False, True, True]
    assert [book.find(shard) is not None for book in (before, after, reader)] == [True, False, False]
    after.enter(shard, "::1", 21)
    assert [book.find(shard) is not None for book in (before, after, reader)] == [False, True, True]


def test_a_runs_own_token_is_one_and_secret(ranks, tmp_path: Path):
    """Several processes ask for it at once."""
    tokens = set(ranks.run("tests.sync.server.node.cases:token", 4, folder=str(tmp_path)))
    assert tokens == {own_token(tmp_path)}
    file = tmp_path / FOLDER / "token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["token"]
    assert len(file.read_text()) >= 32
    other = tmp_path / "other"
    assert own_token(other) != file.read_text()
