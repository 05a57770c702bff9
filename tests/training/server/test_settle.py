"""What a server job's `auto` becomes."""

from __future__ import annotations

import time

from shoal.job import parse
from shoal.launch.train import ready


def test_a_codec_between_processes_of_one_machine_is_none_and_says_so(ranks, tiny, tmp_path):
    run = tmp_path / "run"
    sync = {"name": "server", "codec": "auto"}
    _, arguments = ready(tiny(run, "replicas=1", sync=sync), None, time.time())
    told = {name: arguments[name] for name in ("folder", "job", "prepared", "started")}
    (found,) = ranks.run("shoal.training.server.settle:main", 1, **told)
    job = parse(found["job"])
    assert (job.sync.name, job.sync.codec) == ("server", "none")
    assert "codec none: workers and servers are all on this machine" in (run / "log.txt").read_text()
