"""What a server job's `auto` becomes."""

from __future__ import annotations

import time

from shoal.job import Job, parse
from shoal.launch.train import ready


def settled(ranks, job) -> Job:
    _, arguments = ready(job, None, time.time())
    told = {name: arguments[name] for name in ("folder", "job", "prepared", "started")}
    (found,) = ranks.run("shoal.training.server.settle:main", 1, **told)
    return parse(found["job"])


def test_a_codec_between_processes_of_one_machine_is_none_and_says_so(ranks, tiny, tmp_path):
    run = tmp_path / "run"
    sync = {"name": "server", "codec": "auto"}
    job = settled(ranks, tiny(run, "replicas=1", sync=sync))
    assert (job.sync.name, job.sync.codec) == ("server", "none")
    assert "codec none: workers and servers are all on this machine" in (run / "log.txt").read_text()


def test_with_parts_on_other_machines_it_stays_open_until_they_are_there(ranks, tiny, tmp_path):
    """And the rest of the job, as far as it was `auto`, does not."""
    run = tmp_path / "run"
    given = tiny(run, "replicas=1", sync={"name": "server", "codec": "auto"}, server={"elsewhere": ("server 0",)})
    job = settled(ranks, given)
    assert (job.sync, job.server) == (given.sync, given.server)
    assert job.train.validate_every > 0
    assert not (run / "log.txt").exists(), "nothing was decided that is worth a word"


def test_one_worker_s_codec_is_not_said_to_do_nothing(ranks, tiny, tmp_path):
    """With replicas that all-reduce it would; here it encodes what goes to the server."""
    run = tmp_path / "run"
    given = tiny(run, "replicas=1", sync={"name": "server", "codec": "int8"})
    assert settled(ranks, given).sync.codec == "int8"
    assert not (run / "log.txt").exists()
