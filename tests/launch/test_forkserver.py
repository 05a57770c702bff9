"""The fork server forks only while it has one thread."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from shoal.errors import RankError
from shoal.launch.pool import Pool


def test_a_module_that_starts_a_thread_when_imported_is_refused():
    # What cannot be imported at all is left to the rank that will need it.
    modules = ["tests.launch.nowhere", "tests.launch.starts_thread"]
    with Pool(1, preload=modules) as pool, pytest.raises(RankError) as caught:
        pool.run("tests.launch.cases:count_up", 1, timeout=30)
    assert "after importing tests.launch.starts_thread the fork server has 2 threads" in str(caught.value)


def test_a_module_that_cannot_be_imported_fails_in_the_rank(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run("tests.launch.nowhere:main", 1)
    assert str(caught.value).endswith("ModuleNotFoundError: No module named 'tests.launch.nowhere'")


# What a launcher starts, with a child that ends after the server has closed its sockets and before the process ends.
LATE = """
import os, signal, sys
from shoal.launch import forkserver
forkserver.Server.preload = lambda *_: None  # torch has nothing to do with it, and takes long
forkserver.resolve = lambda name: dict
code = forkserver.main()
os.kill(os.getpid(), signal.SIGCHLD)
sys.exit(code)
"""


def test_a_child_that_ends_when_the_server_does_leaves_no_traceback():
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        done = subprocess.run(
            [sys.executable, "-c", LATE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, "")
