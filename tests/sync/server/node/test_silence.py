"""What a part that another machine has started says of the coordinator, and when it gives up."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import RankError
from shoal.sync.server.messages import COORDINATOR
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.silence import Silence


def silence(run: Path, said: list[str] | None) -> Silence:
    book = Book(run)
    book.enter(COORDINATOR, "10.0.0.1", 4321)
    return Silence("worker 1", book, said.append if said is not None else None, 0.0)


def test_it_takes_part_when_the_coordinator_has_answered_and_not_before(tmp_path):
    said: list[str] = []
    link = silence(tmp_path, said)
    link.check(0.9)
    assert said == []
    for now in (1.0, 2.0, 119.0):
        link.check(now)
    assert said == ["worker 1 waits for the coordinator at 10.0.0.1:4321, up to 120 s"]
    link.heard(119.5)
    link.heard(119.6)
    assert said[1:] == [f"worker 1 takes part in {tmp_path}"]


def test_a_silence_is_said_once_and_so_is_its_end(tmp_path):
    said: list[str] = []
    link = silence(tmp_path, said)
    link.heard(0.1)
    said.clear()
    for now in (5.0, 5.2, 100.0):
        link.check(now)
    assert said == ["the coordinator at 10.0.0.1:4321 is silent; worker 1 waits up to 120 s"]
    link.heard(101.0)
    link.check(105.9)
    assert said[1:] == ["the coordinator is back"]
    link.check(106.1)
    assert len(said) == 3, "another silence"


def test_with_a_connection_it_may_be_silent_for_longer(tmp_path):
    said: list[str] = []
    link = silence(tmp_path, said)
    link.heard(0.0)
    said.clear()
    link.check(59.0, linked=True)
    assert said == []
    link.check(61.0, linked=True)
    assert len(said) == 1


def test_it_gives_up_and_says_where_and_how_to_go_on(tmp_path):
    link = silence(tmp_path, [])
    link.heard(1.0)
    link.check(121.0)
    with pytest.raises(RankError) as caught:
        link.check(121.1)
    assert caught.value.where == str(tmp_path)
    for command in (f"shoal train --resume {tmp_path}", f"shoal join {tmp_path} 'worker 1'"):
        assert command in caught.value.fix


def test_a_silence_begins_where_there_was_something_to_say(tmp_path):
    link = silence(tmp_path, None)
    link.excuse(200.0)
    link.check(320.0)
    with pytest.raises(RankError):
        link.check(320.1)
