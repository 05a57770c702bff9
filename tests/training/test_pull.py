"""`shoal pull` of whole runs: the run's own weights, of one version, while it goes on; and who may not."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.cli.main import main
from shoal.errors import CheckpointError, JobError
from shoal.launch import roles, server
from shoal.launch.train import ready
from shoal.sync.server.node.book import FOLDER
from shoal.training.server.pull import pull
from tests.launch import sockets

# Seconds that a run of these tests has to get to where it is wanted.
_PATIENCE = 90.0


class Aside(threading.Thread):
    """Does `work` while a run goes on, then asks the run's coordinator to end. error: what the work raised."""

    def __init__(self, work):
        super().__init__(daemon=True)
        self.work = work
        self.over = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error
        # One that is starting may not hear of it yet.
        while not self.over.wait(0.5):
            for pid in coordinators():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


def coordinators() -> list[int]:
    """Processes below this one; none where some of them have just ended."""
    try:
        names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in sockets.family(os.getpid())}
    except OSError:
        return []
    return [pid for pid, name in names.items() if name.startswith("shoal-coord")]


@pytest.fixture(scope="module")
def live(ranks, tiny, tmp_path_factory):
    """A run that has ended, and what was pulled from it while it went on."""
    run = tmp_path_factory.mktemp("server") / "run"
    job = tiny(
        run, "replicas=2", train={"steps": 100_000, "validate_every": 100_000}, sync={"name": "server"},
        server={"mode": "asp", "shards": 2}, checkpoint={"every": 1, "keep": 10_000},
    )  # fmt: skip
    job, arguments = ready(job, None, time.time())
    pulled = []

    def work():
        deadline = time.monotonic() + _PATIENCE
        # Until one is of a version that the run has saved itself, which it does whenever no other save is on its way.
        while not pulled or not saved(run).keys() & {each.version for each in pulled}:
            assert time.monotonic() < deadline
            try:
                pulled.append(pull(run, None, print))
            except (JobError, CheckpointError):  # not live yet; no further than before
                time.sleep(0.1)
        with pytest.raises(CheckpointError, match="is there already"):
            pull(run, pulled[0].folder, print)
        token = run / FOLDER / "token"
        right = token.read_text()
        token.write_text("x" * len(right))
        try:
            with pytest.raises(JobError, match="token"):
                pull(run, None, print)
        finally:
            token.write_text(right)

    def slowly(processes, parts, **options):
        late = [replace(part, entry="tests.training.slowly:work") if "worker" in part.name else part for part in parts]
        return run_roles(processes, late, **options)

    run_roles, processes = roles.run, ranks.start()
    aside = Aside(work)
    aside.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles, "run", slowly)
        figures = server.run(job, arguments, processes, lambda text: None, lambda name: None)
    aside.over.set()
    aside.join()
    if aside.error:
        raise aside.error
    return run, figures, pulled


def saved(run: Path) -> dict[int, Path]:
    """The run's own checkpoints by version."""
    found = {}
    for folder in checkpoint.complete(run / "checkpoints"):
        found[manifest.read(folder).values["update"]["updates"]] = folder
    return found


def test_what_is_pulled_is_what_the_run_itself_saved_of_that_version_bitwise(live):
    run, _, pulled = live
    both = [(saved(run)[each.version], each) for each in pulled if each.version in saved(run)]
    assert both
    for own, each in both:
        mine = dict(checkpoint.tensors(each.checkpoint))
        theirs = dict(checkpoint.tensors(own))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        told, expected = manifest.read(each.checkpoint).values, manifest.read(own).values
        assert (each.step, each.position) == (expected["step"], expected["position"])
        assert told["sync"]["exceptions"] == expected["sync"]["exceptions"]


def test_a_run_that_is_read_goes_on_as_if_nobody_were_there(live):
    run, figures, pulled = live
    assert figures["stopped_by"] == "SIGTERM"
    assert max(saved(run)) >= max(each.version for each in pulled)
    log = (run / "log.txt").read_text()
    assert "given up" not in log
    assert "started again" not in log


def test_the_folder_is_generated_from_and_shown_but_not_resumed(live, capsys):
    _, _, pulled = live
    folder = str(pulled[-1].folder)
    assert main(["generate", folder, "--prompt", "the ", "--max-tokens", "4"]) == 0
    assert main(["ckpt", "show", folder]) == 0
    assert "model" in capsys.readouterr().out
    assert main(["train", "--resume", folder]) == 2
    assert "weights that `shoal pull` has taken out" in capsys.readouterr().err


def test_a_run_that_is_over_or_none_or_without_a_server_is_refused_in_a_sentence(live, train, tiny, tmp_path, capsys):
    run, _, _ = live
    assert main(["pull", str(run)]) == 2
    error = capsys.readouterr().err
    assert "nobody trains in this run now" in error
    assert f"shoal ckpt show {run}" in error
    assert main(["pull", str(tmp_path)]) == 2
    assert "there is no run in this folder" in capsys.readouterr().err
    assert main(["pull"]) == 2
    ready(tiny(tmp_path / "other", "replicas=1"), None, time.time())
    assert main(["pull", str(tmp_path / "other")]) == 2
    assert "sync.name=allreduce: only a parameter server" in capsys.readouterr().err
