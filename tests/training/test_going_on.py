"""Going on with a run: what may change on the way, what may not, and that a refusal changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from signal import Signals

import pytest

from shoal import checkpoint
from shoal.cli.main import main
from shoal.errors import CheckpointError, JobError, RankError
from shoal.job import read
from shoal.launch import finish
from shoal.launch.train import ready
from shoal.observe import metrics, runs, summary
from shoal.observe.hold import hold
from shoal.observe.result import Result
from tests.training.test_resume import shoal, until


def content(run: Path) -> dict[str, bytes]:
    """Everything in a run folder but the log, which may say that somebody tried."""
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}


@pytest.fixture(scope="module")
def once(train, tiny, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("once") / "run"
    train(tiny(run, checkpoint={"every": 4}), finish=True)
    return run


@pytest.fixture
def finished(once, tmp_path) -> Path:
    """A run of 8 steps, with a checkpoint at 4 and at 8; each test has a copy."""
    return shutil.copytree(once, tmp_path / "run")


class NoRanks:
    """Instead of the ranks: nothing may be started."""

    def __init__(self, *_: object):
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "words",
    [
        ["--data.sequence-length", "32"],
        ["--data.order", "sequential"],
        ["--data.validation", "0.2"],
        ["--model.num-hidden-layers", "2"],
        ["--train.seed", "7"],
        ["--optim.name", "sgd"],
    ],
    ids=lambda words: words[0],
)
def test_what_makes_it_another_run_is_refused(finished, monkeypatch, capfd, words):
    before = content(finished)
    monkeypatch.setattr("shoal.launch.train.Ranks", NoRanks)
    assert main(["train", "--resume", str(finished), *words, "--steps", "16"]) == 2
    error = capfd.readouterr().err
    assert f"{words[0][2:].replace('-', '_')} cannot change while a run goes on: " in error
    assert f"--model.weights {finished / 'model'}" in error
    assert content(finished) == before


def test_every_checkpoint_damaged(finished, train, tiny, capfd):
    """To begin again at step 0 would write over what somebody may still want to mend."""
    for saved in checkpoint.complete(finished / "checkpoints"):
        victim = next(saved.glob("*.safetensors"))
        victim.write_bytes(victim.read_bytes()[:-1])
    before = content(finished)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged; nothing was changed"):
        train(tiny(finished), resume=True)
    assert content(finished) == before


def test_no_checkpoint_yet(finished, train, tiny):
    first = metrics.read(finished)
    shutil.rmtree(finished / "checkpoints")
    train(tiny(finished), resume=True)
    assert "this run has no checkpoint yet: it begins again at step 0" in (finished / "log.txt").read_text()
    again = metrics.read(finished)
    assert [row["loss"] for row in again] == [row["loss"] for row in first]


def resumed(ranks, folder: Path, steps: int) -> None:
    """`shoal train --resume folder --steps N`, in the ranks of this session."""
    before = read(folder / "job.toml")
    _, arguments = ready(replace(before, train=replace(before.train, steps=steps)), folder, time.time())
    ranks.run("shoal.training.worker:main", 2, **arguments)


def test_fewer_steps_than_done(finished, ranks):
    before = content(finished)
    with pytest.raises(JobError, match="the run has done 8 steps already, more than the 6 asked for"):
        resumed(ranks, finished, 6)
    assert content(finished) == before


def test_more_steps_stretch_the_schedule_and_it_says_so(finished, ranks):
    resumed(ranks, finished, 16)
    assert "the schedule is now that of 16 steps: learning rate " in (finished / "log.txt").read_text()
    assert metrics.read(finished)[-1]["step"] == read(finished / "job.toml").train.steps == 16


def test_the_same_steps_say_nothing_of_a_schedule(finished, train, tiny):
    shutil.rmtree(finished / "checkpoints/step-00000008")
    train(tiny(finished), resume=True)
    log = (finished / "log.txt").read_text()
    assert "goes on from" in log
    assert "the schedule is now" not in log


def test_a_full_disk_at_resume_keeps_the_job(finished, train, tiny):
    shutil.rmtree(finished / "checkpoints/step-00000008")
    job = finished / "job.toml"
    job.write_text(job.read_text().replace("on_nonfinite", "# as it was\non_nonfinite"))  # else it is not written
    before = content(finished)
    train(tiny(finished), resume=True, entry="tests.training.cases:without_space")
    after = content(finished)
    for name in ("job.toml", "data.json", "environment.json", "tokenizer.json"):
        assert after[str(finished / name)] == before[str(finished / name)]
    assert not list(finished.glob(".*.new"))
    log = (finished / "log.txt").read_text()
    assert "cannot write job.toml (No space left on device); training goes on" in log
    assert metrics.read(finished)[-1]["step"] == 8


def test_a_run_folder_that_was_deleted_meanwhile_is_written_again(ranks, train, tiny, tmp_path):
    """What is known at the end is: the job, the figures and the state of the last step; `finish` writes them."""
    run = tmp_path / "run"
    train(tiny(run), entry="tests.training.cases:deleting_its_folder", finish=True)
    assert f"warning: {run} was deleted while the run went on" in (run / "log.txt").read_text()
    assert read(run / "job.toml").train.steps == 8


def test_a_run_whose_folder_and_prepared_text_are_both_gone_still_has_its_figures(train, tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    figures = train(tiny(run))[0]
    shutil.rmtree(run)
    told = finish.main(None, folder=str(run), prepared=str(tmp_path / "gone"), figures=figures)
    assert (told["steps"], told["val_loss"], told["saved_step"]) == (8, figures["validation"]["nats"], None)
    log = (run / "log.txt").read_text()
    assert "the prepared text is gone" in log
    assert "there is no run here: job.toml is missing" in log
    assert json.loads((run / "result.json").read_text())["steps"] == 8


def test_paths_of_a_run_mean_the_same_wherever_it_is_resumed(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("words and more words\n" * 200)
    job, given = ready(tiny("run", data={"source": ("a.txt",), "cache": "here"}), None, time.time())
    monkeypatch.chdir("/")
    assert (job.data.cache, job.data.source) == (str(tmp_path / "here"), (str(tmp_path / "a.txt"),))
    assert Path(given["prepared"]).is_dir()
    _, taken = ready(read(tmp_path / "run/job.toml"), tmp_path / "run", time.time())
    assert taken["prepared"] == given["prepared"]


def test_a_run_is_running_before_its_ranks_are(arguments, tmp_path):
    """Importing torch and building the mesh take seconds, in which nobody holds the folder."""
    run = tmp_path / "run"
    process = shoal(*arguments, "--layout", "replicas=2", "--steps", "3", "--run-dir", str(run))
    states = set()
    while process.poll() is None:
        if (run / "job.toml").is_file():
            states.add(runs.describe(run).state)
        time.sleep(0.02)
    process.communicate()
    # The last is for the moment between the end of its work and that of its process.
    assert "running" in states <= {"running", "finished"}
    assert runs.describe(run).state == "finished"


def test_who_resumes_a_run_before_it_is_finished_off_keeps_the_folder(train, tiny, tmp_path, monkeypatch):
    """Between the last step and the report nobody holds the folder; the run has its result in any case."""
    run = tmp_path / "run"
    job = tiny(run)
    figures = train(job)[0]
    where = {"folder": str(run), "prepared": json.loads((run / "data.json").read_text())["folder"]}
    monkeypatch.setattr("shoal.launch.finish.hold", lambda folder: hold(folder, patience=0.1))
    with hold(run):
        told = finish.main(None, **where, figures=figures)
    assert told["steps"] == 8
    assert told["val_loss"] == figures["validation"]["nats"]
    assert "is trained in again already" in (run / "log.txt").read_text()
    assert not {"model", "result.json", "report.html"} & {path.name for path in run.iterdir()}


def test_a_text_that_is_gone_when_the_run_ends_costs_bits_per_byte_only(train, tiny, tmp_path, monkeypatch):
    """Somebody has emptied the cache while it was trained on."""
    run = tmp_path / "run"
    figures = train(tiny(run))[0]
    told = finish.main(None, folder=str(run), prepared=str(tmp_path / "gone"), figures=figures)
    assert told["val_loss"] == figures["validation"]["nats"]
    assert told["bits_per_byte"] is None
    assert told["sample"]
    assert f"the prepared text is gone: {tmp_path / 'gone' / 'meta.json'}" in (run / "log.txt").read_text()
    assert {"model", "result.json", "report.html"} <= {path.name for path in run.iterdir()}
    assert (run / "model" / "tokenizer.json").is_file()


def test_a_run_that_goes_on_has_no_length_by_minutes(finished, monkeypatch, capfd):
    before = content(finished)
    monkeypatch.setattr("shoal.launch.train.Ranks", NoRanks)
    assert main(["train", "--resume", str(finished), "--steps", "0", "--minutes", "1"]) == 2
    assert "no length by minutes: it is one of 8 steps\n  → say how many it shall have in all: --steps 16" in (
        capfd.readouterr().err
    )
    assert content(finished) == before


def test_what_goes_on_and_fails_is_not_called_finished(finished, tiny, ranks):
    """Its newest checkpoint is damaged, so it goes on from the one before, and a rank raises in the sixth step."""
    victim = next((finished / "checkpoints/step-00000008").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    _, arguments = ready(read(finished / "job.toml"), finished, time.time())
    with pytest.raises(RankError):
        ranks.run("tests.training.failing:main", 2, **arguments)
    assert runs.describe(finished).state == "failed"


def test_a_runs_job_as_recipe_makes_a_new_run(finished, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = content(finished)
    assert main(["train", str(finished / "job.toml"), "--steps", "2"]) == 0
    assert content(finished) == before
    (fresh,) = (tmp_path / "runs").iterdir()
    assert len(metrics.read(fresh)) == 2


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.nightly)])
def test_a_signal_before_anything_was_saved(arguments, tmp_path, monkeypatch, capfd, name):
    monkeypatch.setattr("shoal.launch.train._WORKER", "tests.training.waiting")
    run = tmp_path / "run"

    def interrupt() -> None:
        while not (run / "waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), Signals[name])

    threading.Thread(target=interrupt, daemon=True).start()
    assert main([*arguments, "--layout", "replicas=2", "--steps", "4", "--run-dir", str(run)]) == 128 + Signals[name]
    assert capfd.readouterr().err.splitlines()[-1] == f"stopped by {name}; nothing was saved yet"


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_a_signal_while_it_is_measured_what_pays(arguments, tmp_path):
    """The real worker, which compiles at that moment, has nothing to save: it ends without a step."""
    run = tmp_path / "run"
    words = ["--minutes", "5", "--train.precision", "auto", "--train.compile", "auto", "--layout", "replicas=2"]
    process = shoal(*[w for w in arguments if w not in ("--train.compile", "off")], *words, "--run-dir", str(run))
    log = run / "log.txt"
    until(lambda: log.exists() and "precision fp32" in log.read_text(), process)
    process.send_signal(Signals.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert text.splitlines()[-1] == "stopped by SIGINT; nothing was saved yet"
    assert not metrics.read(run)


@pytest.mark.parametrize("left", ["job.toml", "metrics.jsonl", "checkpoints"])
def test_a_new_run_takes_nothing_from_a_folder_that_has_a_runs_files(finished, train, tiny, left):
    for path in finished.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = content(finished)
    with pytest.raises(JobError, match="there is a run in this folder already"):
        train(tiny(finished))
    assert content(finished) == before


def test_two_runs_that_begin_in_the_same_second_have_a_folder_each(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Stopped:
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("shoal.launch.train.datetime", Stopped)
    folders = [Path(ready(tiny(""), None, time.time())[1]["folder"]) for _ in range(3)]
    assert [folder.name for folder in folders] == [f"run-20260102-030405{more}" for more in ("", "-2", "-3")]
    assert all((folder / "job.toml").is_file() for folder in folders)


def test_a_tilde_in_a_recipe_is_the_home_folder(tiny, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(corpus.parent))
    job, _ = ready(tiny(tmp_path / "run", data={"source": (f"~/{corpus.name}",)}), None, time.time())
    assert job.data.source == (str(corpus),)


def test_a_state_that_could_not_be_saved_is_not_called_safe():
    result = Result("runs/a", 9, 90, 1.0, 1.0, None, None, 1.0, None, 1.0, stopped_by="SIGTERM", saved_step=6)
    assert "could not be saved: a resume goes on from step 6" in "\n".join(summary.lines(result))
    assert "nothing could be saved" in "\n".join(summary.lines(replace(result, saved_step=None)))
    assert "nothing is lost" in "\n".join(summary.lines(replace(result, saved_step=9)))
