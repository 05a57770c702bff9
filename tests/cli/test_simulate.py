"""`shoal simulate`: what it prints, what it answers, what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest

from shoal.cli.flags import docstrings
from shoal.cli.main import main
from shoal.cli.simulate import SimulateJob, SimulateOptions
from shoal.job import Job

SMALL = ["simulate", "--updates", "10", "--micro-batch", "1", "--share", "1", "--lr", "0.01"]


def test_every_option_is_explained():
    assert set(docstrings(SimulateOptions)) == {field.name for field in fields(SimulateOptions)}
    assert set(docstrings(SimulateJob)) >= {field.name for field in fields(SimulateJob)} - {f.name for f in fields(Job)}


def test_the_table_and_the_answer(capsys: pytest.CaptureFixture):
    args = [*SMALL, "--sync", "server", "--mode", "ssp", "--staleness", "2", "--workers", "3", "--speeds", "1,1,4"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "ssp(2)" in out
    assert re.search(r"bsp: wait of each worker  0: [67]\d%  1: [67]\d%  2: \d%", out)
    assert "staleness is never above 10" in out
    assert main([*args, "--format", "json"]) == 0
    printed, err = capsys.readouterr()
    assert "ssp(2)" in err
    answer = json.loads(printed)
    assert answer["outcome"]["updates"] == 30
    assert answer["bsp"]["updates"] == 10
    assert answer["outcome"]["staleness_max"] <= 10
    assert sum(answer["outcome"]["staleness"].values()) == 30


def test_workers_may_do_as_much_as_they_are_fast(capsys: pytest.CaptureFixture):
    args = [*SMALL, "--mode", "bsp", "--workers", "2", "--speeds", "1,4", "--share", "4,1", "--format", "json"]
    assert main(args) == 0
    answer = json.loads(capsys.readouterr().out)["outcome"]
    assert answer["updates"] == 10
    assert max(answer["wait"]) < 0.1


def test_a_codec_is_in_the_table(capsys: pytest.CaptureFixture):
    assert main([*SMALL, "--mode", "asp", "--workers", "2", "--codec", "int4"]) == 0
    assert "asp int4 " in capsys.readouterr().out


def test_bsp_beside_meets_the_same_faults_and_bsp_itself_is_beside_itself_without(capsys: pytest.CaptureFixture):
    def both(*words: str) -> tuple[float, float, str]:
        assert main([*SMALL, "--workers", "2", *words, "--format", "json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out.splitlines()[-1])
        return found["outcome"]["seconds"], found["bsp"]["seconds"], out + err

    _, plain, _ = both("--mode", "asp")
    _, killed, text = both("--mode", "asp", "--kill", "worker:1@3")
    assert killed > plain
    assert "nobody killed" not in text
    itself, without, text = both("--mode", "bsp", "--kill", "worker:1@3")
    assert (itself, without) == (killed, plain)
    assert "times as fast as bsp, nobody killed over the same samples" in text


def test_kills_of_every_role_are_survived(capsys: pytest.CaptureFixture):
    kill = "worker:1@3,shard:0@5,coordinator@7"
    assert main([*SMALL, "--mode", "asp", "--workers", "2", "--copies", "2", "--kill", kill, "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)["outcome"]
    # Worker 1; and worker 0, whose samples a coordinator that had forgotten its lease gave to worker 1.
    assert answer["given_up"] == 2
    assert answer["updates"] == 20


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--sync", "gosip"], "--sync='gosip'"),
        (["--mode", "spp"], "mode='spp'"),
        (["--staleness", "-1"], "staleness=-1 is less than 0"),
        (["--max-staleness", "-2"], "max_staleness=-2 is less than -1"),
        (["--mode", "bsp", "--max-staleness", "3"], "max_staleness=3 with mode=bsp"),
        (["--mode", "asp", "--staleness", "3"], "staleness=3 has no effect with mode=asp"),
        (["--strength", "2"], "strength=2.0 has no effect with compensation=none"),
        (["--speeds", "1,2"], "--speeds has 2 numbers for 4 workers"),
        (["--speeds", "1,x,1,1"], "--speeds=1,x,1,1 is not numbers with commas"),
        (["--speeds", "0"], "--speeds"),
        (["--servers", "5"], "5 server shards for 4 parameters"),
        (["--kill", "worker@3"], "--kill: 'worker@3' is not who@when"),
        (["--kill", "worker:4@3"], "--kill: there is no worker 4"),
        (["--drop", "1"], "--drop=1.0 is not a share below 1"),
        (["--mode", "quorum", "--quorum", "5"], "error: quorum=5 of 4 workers"),
        (["--compensation", "dc", "--level", "shard"], "compensation=dc with level=shard"),
        (["--compensation", "delayed-nesterov", "--optimizer", "adamw"], "delayed-nesterov is an optimizer of its own"),
        (["--codec", "int9"], "codec='int9': 'int9' is unknown"),
        (["--codec", "auto"], "codec=auto measures a real link\n  → name a codec, e.g. --codec int8"),
        (["--codec", "powersgd:4"], "codec=powersgd:4 with a server: its matrices"),
        (["--codec", "int8", "--level", "hogwild"], "codec=int8 with level=hogwild"),
        (["--patience", "3"], "after 3 simulated seconds the job has not ended"),
        (["--stalenes", "3"], "unknown option --stalenes"),
    ],
)
def test_mistakes(args: list[str], what: str, capsys: pytest.CaptureFixture):
    assert main([*SMALL, *args]) == 2
    err = capsys.readouterr().err
    assert what in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (
            ["--kill", "worker:1@5"],
            "--kill is of --sync server: with all-reduce, local steps or gossip, a lost replica",
        ),
        (["--drop", "0.1"], "--drop is of --sync server"),
        (["--lr=0.1"], "--lr is of --sync server, and here the replicas of a job are simulated\n  → --optim.lr"),
        (["--workers", "4"], "→ --layout replicas=4"),
        ([], "the job names no layout of 2 replicas"),
        (["--layout", "replicas=2,fsdp=2"], "layout replicas=2,fsdp=2,zero=3: a simulated replica is one rank"),
        (["--layout", "replicas=2"], "train.minutes are of a real clock"),
        (["--layout", "replicas=2", "--steps", "2", "--codec", "auto"], "sync.codec=auto measures a real link"),
        (["--layout", "replicas=2", "--steps", "2", "--speeds", "1,2,3"], "3 numbers for 2 replicas"),
        (["--layout", "replicas=2", "--steps", "2", "--rate", "-1"], "--rate=-1.0 is less than 0"),
        (["--layout", "replicas=2", "--steps", "2", "--rate", "1e-320"], "is less than 1e-06"),
        (["--sync.every", "0"], "sync.every=0 is less than 1"),
        (["recipes/quickstart.toml", "--sync", "server"], "a parameter server is simulated on a problem of its own"),
        (["no.toml"], "no.toml"),
        (["--speds", "1"], "unknown option --speds"),
    ],
)
def test_mistakes_with_a_job(args: list[str], what: str, capsys: pytest.CaptureFixture):
    sync = [] if "server" in args else ["--sync", "local"]
    assert main(["simulate", *args, *sync]) == 2
    err = capsys.readouterr().err
    assert what in err
    assert "Traceback" not in err
