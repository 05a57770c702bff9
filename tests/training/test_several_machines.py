"""Training on several machines: network namespaces with a link between them, each with a torchrun of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import hosts as namespaces
from benchmarks.hosts import Hosts

from shoal import checkpoint, connections
from shoal.launch import torchrun
from shoal.observe import result
from tests.launch import sockets
from tests.training.test_resume import losses, until

pytestmark = pytest.mark.skipif(bool(namespaces.why_not()), reason=namespaces.why_not() or "-")

# So that the first steps are those of a run of any length.
ENDLESS = ["--steps", "100000", "--optim.schedule", "constant", "--optim.warmup", "0"]


def documented(address: str, count: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Words and environment of the command that the docstring recommends, for this machine and so many."""
    assert torchrun.__doc__ is not None
    (text,) = re.findall(r"^    (GLOO_SOCKET_IFNAME=.*?) -m ", torchrun.__doc__, re.M | re.S)
    said = {"ADDRESS": address, "/shared": str(folder), "--nnodes 4": f"--nnodes {count}"}
    for word, value in said.items():
        assert word in text
        text = text.replace(word, value)
    before, after = text.replace("\\\n", " ").split(" torchrun ")
    assert f"={namespaces.INTERFACE} " in f"{before} "
    return after.split(), dict(pair.split("=") for pair in before.split())


@contextlib.contextmanager
def training(hosts: Hosts, arguments: list[str], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The documented command on every host, each in a session of its own, with its output in a file."""
    processes = []
    for i, address in enumerate(hosts.addresses):
        options, environment = documented(address, len(hosts.names), folder)
        words = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "shoal.cli.main", *arguments, *ENDLESS]
        with (folder / f"{i}.txt").open("wb") as output:
            process = subprocess.Popen(
                hosts.command(i, [*words, "--run-dir", str(folder / "run")]), stdout=output, stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
            )  # fmt: skip
        processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def listening(hosts: Hosts, host: int) -> set[str]:
    tables = hosts.command(host, ["tail", "-qn", "+2", "/proc/net/tcp", "/proc/net/tcp6"])
    return {address for address, _ in sockets.listeners(subprocess.check_output(tables, text=True))}


@pytest.mark.nightly
def test_same_losses_as_local_ranks_and_ctrl_c_on_one_of_them_saves(arguments, train, tiny, tmp_path):
    """4 machines; meanwhile they listen on the interface that was named, and nowhere else."""
    run, local = tmp_path / "run", tmp_path / "local"
    with Hosts(4) as hosts, training(hosts, arguments, tmp_path) as processes:
        until(lambda: len(losses(run)) >= 3, processes[0])
        for i, address in enumerate(hosts.addresses):
            assert listening(hosts, i) == {address}
        os.killpg(processes[2].pid, signal.SIGINT)
        for process in processes:
            process.wait(timeout=60)
    newest = checkpoint.newest(run / "checkpoints", print)
    assert newest is not None
    assert newest.name == f"step-{len(losses(run)):08}", "nothing was lost"
    done = result.read(run)
    assert done is not None
    assert done.stopped_by
    assert (run / "report.html").exists()
    train(tiny(local, "replicas=4", train={"steps": 3}, optim={"schedule": "constant", "warmup": 0.0}))
    assert losses(run)[:3] == losses(local)


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_lost_machine_is_named_by_the_others(arguments, tmp_path, how):
    """Killed: its processes, whose kernel then says so. Silent: its cable, of which nobody says anything."""
    with Hosts(4) as hosts, training(hosts, arguments, tmp_path) as processes:
        until(lambda: len(losses(tmp_path / "run")) >= 3, processes[0])
        start = time.monotonic()
        if how == "killed":
            pids = subprocess.check_output(["ip", "netns", "pids", hosts.names[1]], text=True)
            for pid in map(int, pids.split()):
                os.kill(pid, signal.SIGKILL)
        else:
            hosts.silence(1)
        for process in processes:
            process.wait(timeout=connections.SILENCE + 60)
        print(f"ended after {time.monotonic() - start:.1f} s")
        lost = hosts.addresses[1]
    for other in (0, 2, 3):
        said = (tmp_path / f"{other}.txt").read_text()
        assert re.search(rf"at step \d+ for ranks \d, \d and \d, and lost {re.escape(lost)} \(rank \d\)\n", said), said[
            -3000:
        ]
