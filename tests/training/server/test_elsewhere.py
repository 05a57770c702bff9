"""What the first machine says of parts that others start."""

from __future__ import annotations

import math
from pathlib import Path

from shoal.training.server.elsewhere import Elsewhere

RUN = Path("/shared/run")
SERVER, WORKER = "server 1", "worker 1"
JOIN = "shoal join /shared/run 'server 1'"


def test_who_has_come_is_said_once_and_for_whom_it_waits_after_a_while():
    parts = Elsewhere(RUN, (WORKER, SERVER), 0.0, came=False, again=math.inf)
    assert parts.news({WORKER}, {SERVER, WORKER}, False, 1.0) == ["worker 1 has come"]
    assert parts.news({WORKER}, {SERVER, WORKER}, False, 4.9) == []
    assert parts.news({WORKER}, {SERVER, WORKER}, False, 5.0) == [f"waits for server 1: {JOIN}"]
    assert parts.news({WORKER}, {SERVER, WORKER}, False, 60.0) == []
    assert parts.news({WORKER, SERVER}, {SERVER}, False, 61.0) == ["server 1 has come"]
    assert parts.news({WORKER, SERVER}, {SERVER}, False, 99.0) == []


def test_who_is_lost_is_waited_for_and_comes_back():
    parts = Elsewhere(RUN, (SERVER,), 0.0, came=False, again=math.inf)
    parts.news({SERVER}, {SERVER}, False, 10.0)
    assert parts.news(set(), {SERVER}, False, 14.0) == []
    assert parts.news({SERVER}, {SERVER}, False, 14.5) == [], "a link that broke for a moment"
    assert parts.news(set(), {SERVER}, False, 19.4) == []
    assert parts.news(set(), {SERVER}, False, 19.5) == [f"waits for server 1: {JOIN}"]
    assert parts.waits(SERVER)
    assert parts.news({SERVER}, {SERVER}, False, 30.0) == ["server 1 is back"]
    assert not parts.waits(SERVER)
    assert parts.news(set(), {SERVER}, False, 35.0) == [f"waits for server 1: {JOIN}"], "again"


def test_a_worker_that_nobody_needs_is_not_waited_for():
    parts = Elsewhere(RUN, (WORKER,), 0.0, came=False, again=math.inf)
    assert parts.news(set(), {SERVER}, False, 60.0) == []
    assert parts.news(set(), {WORKER}, False, 61.0) != [], "the last other one has gone"


def test_who_stops_the_run_is_told_what_that_waits_for_also_where_it_was_said_before():
    parts = Elsewhere(RUN, (SERVER,), 0.0, came=True, again=math.inf)
    (before,) = parts.news(set(), {SERVER}, False, 6.0)
    (told,) = parts.news(set(), {SERVER}, True, 7.0)
    assert told.startswith(before)
    assert "second Ctrl-C" in told
    assert parts.news(set(), {SERVER}, True, 8.0) == []


def test_of_a_coordinator_that_was_started_again_nobody_comes_for_the_first_time():
    parts = Elsewhere(RUN, (SERVER,), 0.0, came=True, again=math.inf)
    assert parts.news({SERVER}, {SERVER}, False, 1.0) == []


def test_for_whom_a_trial_of_links_waits_is_said_again_and_again():
    parts = Elsewhere(RUN, (SERVER,), 0.0, came=False, again=60.0)
    told = [now for now in range(130) if parts.news(set(), {SERVER}, False, float(now))]
    assert told == [5, 65, 125]
    assert parts.news({SERVER}, {SERVER}, False, 130.0) == ["server 1 has come"]
