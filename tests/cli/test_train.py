"""`shoal train`: which job comes out of defaults, recipe, resumed run and command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shoal.cli.flags import docstrings, parse
from shoal.cli.main import main
from shoal.cli.train import SHORT, Train
from shoal.job import Job, Layout, read, write
from shoal.job.check import kinds
from shoal.job.optim import OptimOptions
from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions


class Recorder(SimpleNamespace):
    """Stands for `shoal.launch.train`: keeps what it is called with, prints, and returns a result."""

    stopped_by = ""

    def train(self, job: Job, resume: str | None = None):
        self.job, self.resume = job, resume
        print("a line of progress")
        subprocess.run([sys.executable, "-c", "print('a line of a rank')"], check=True)
        return SimpleNamespace(line=lambda: '{"run":"runs/x","val_loss":null}', stopped_by=self.stopped_by)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    module = ModuleType("shoal.launch.train")
    module.train = recorder.train
    monkeypatch.setitem(sys.modules, "shoal.launch.train", module)
    return recorder


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_without_anything_the_default_job_is_trained(trained: Recorder):
    assert main(["train"]) == 0
    assert trained.job == Job()
    assert trained.resume is None


def test_default_is_below_file_is_below_command_line(trained: Recorder, tmp_path: Path):
    file = recipe(tmp_path, "[optim]\nlr = 1e-3\nclip = 2.0\n")
    assert main(["train", file, "--optim.lr", "3e-4"]) == 0
    assert trained.job == Job(optim=OptimOptions(lr=3e-4, clip=2.0))


def test_the_recipe_may_stand_anywhere(trained: Recorder, tmp_path: Path):
    file = recipe(tmp_path, "[optim]\nlr = 1e-3\n")
    for args in (
        [file, "--train.steps", "5"],
        ["--train.steps", "5", file],
        ["--format", "json", file, "--steps=5"],
    ):
        assert main(["train", *args]) == 0
        assert (trained.job.optim.lr, trained.job.train.steps) == (1e-3, 5)


def test_short_names_and_underscores(trained: Recorder):
    assert main(["train", "--data", "a.txt", "b/", "--steps", "7", "--run_dir", "out", "--train.global-batch=8"]) == 0
    assert trained.job.data.source == ("a.txt", "b/")
    assert trained.job.train.steps == 7
    assert trained.job.run.dir == "out"
    assert trained.job.train.global_batch == 8
    assert main(["train", "--model.tie_word_embeddings", "False", "--minutes", "2", "--data", "-"]) == 0
    assert trained.job.model.tie_word_embeddings is False
    assert trained.job.data.source == ("-",)


def test_the_layout(trained: Recorder, tmp_path: Path):
    assert main(["train", "--layout", "replicas=2,fsdp=2,micro_batch=4"]) == 0
    assert trained.job.layout == Layout(replicas=2, fsdp=2, micro_batch=4)
    assert main(["train", recipe(tmp_path, 'layout = "replicas=4"'), "--layout", "auto"]) == 0
    assert trained.job.layout is None


def test_a_parameter_server_by_its_short_names(trained: Recorder):
    server = ["--sync", "server", "--servers", "2", "--workers", "3", "--mode", "ssp", "--staleness", "4"]
    quickstart = str(Path(__file__).parents[2] / "recipes" / "quickstart.toml")
    assert main(["train", quickstart, *server, "--codec", "int8"]) == 0
    job = read(quickstart)
    sync, options = replace(job.sync, name="server", codec="int8"), ServerOptions(shards=2, mode="ssp", staleness=4)
    assert trained.job == replace(job, layout=Layout(replicas=3), sync=sync, server=options).validate()
    others = ["--mode", "quorum", "--quorum", "2", "--grace", "0.5", "--copies", "2"]
    assert main(["train", "--sync", "server", *others]) == 0
    assert trained.job.server == ServerOptions(mode="quorum", quorum=2, grace=0.5, copies=2)
    assert main(["train", "--sync", "server", "--mode", "asp", "--max-staleness=6", "--compensation", "rate"]) == 0
    assert trained.job.server == ServerOptions(mode="asp", max_staleness=6, compensation="rate")


def test_a_run_that_goes_on_with_another_sync_or_mode_forgets_what_it_said_for_the_one_before(
    trained: Recorder, tmp_path: Path
):
    server = ["--sync", "server", "--servers", "2", "--mode", "ssp", "--staleness", "6"]
    assert main(["train", *server]) == 0
    (tmp_path / "job.toml").write_text(write(trained.job))
    run = ["train", "--resume", str(tmp_path)]
    assert main(run) == 0
    assert trained.job.server == ServerOptions(shards=2, mode="ssp", staleness=6)
    assert main([*run, "--mode", "quorum", "--grace", "1"]) == 0
    assert trained.job.server == ServerOptions(shards=2, mode="quorum", grace=1.0)
    assert main([*run, "--sync", "local", "--sync.every", "20"]) == 0
    assert (trained.job.server, trained.job.sync) == (ServerOptions(), SyncOptions(name="local", every=20))
    assert main([*run, "--mode", "bsp", "--staleness", "3"]) == 2, "said now, it is a mistake"


def test_a_run_that_once_said_what_had_no_effect_goes_on(trained: Recorder, tmp_path: Path):
    """Of a version that took it; and who leaves local steps leaves what belongs to them."""
    run = ["train", "--resume", str(tmp_path)]
    apart = ["--mode", "asp", "--server.local-steps", "4", "--sync.outer-lr", "0.5"]
    assert main(["train", "--sync", "server", *apart]) == 0
    given = replace(trained.job, server=replace(trained.job.server, staleness=2))
    (tmp_path / "job.toml").write_text(write(given))
    assert main(run) == 0
    assert trained.job.server == ServerOptions(mode="asp", local_steps=4)
    assert trained.job.sync.outer_lr == 0.5
    assert main([*run, "--server.local-steps", "1"]) == 0
    assert (trained.job.server, trained.job.sync) == (ServerOptions(mode="asp"), SyncOptions(name="server"))


def test_workers_are_the_replicas_of_the_layout(trained: Recorder, tmp_path: Path):
    file = recipe(tmp_path, 'layout = "replicas=2,fsdp=2"')
    for args, layout in (
        (["--workers", "4"], Layout(replicas=4)),
        (["--layout", "auto", "--workers=4"], Layout(replicas=4)),
        (["--layout", "fsdp=2", "--workers", "4"], Layout(replicas=4, fsdp=2)),
        (["--layout", "replicas=4,fsdp=2", "--workers", "4"], Layout(replicas=4, fsdp=2)),
        ([file, "--workers", "4"], Layout(replicas=4, fsdp=2)),
        ([file, "--layout=tensor=2", "--workers", "4"], Layout(replicas=4, tensor=2)),
    ):
        assert main(["train", *args]) == 0
        assert trained.job.layout == layout


def test_resuming_starts_from_the_job_of_the_run(trained: Recorder, tmp_path: Path):
    (tmp_path / "job.toml").write_text(write(Job(optim=OptimOptions(lr=1.5e-5), layout=Layout(2))))
    assert main(["train", "--resume", str(tmp_path), "--layout", "replicas=4", "--steps", "9"]) == 0
    assert trained.resume == str(tmp_path)
    default = Job(optim=OptimOptions(lr=1.5e-5), layout=Layout(4))
    assert trained.job == replace(default, train=replace(default.train, steps=9))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_option_can_be_given_on_the_command_line(data: st.DataObject):
    """One option at a time: it is changed, and no other."""
    from tests.job.strategies import values

    name = data.draw(st.sampled_from([n for n in kinds(Job) if n != "layout"]))
    value = data.draw(values(kinds(Job)[name]))
    words = [str(v) for v in (value if isinstance(value, tuple) else [value])]
    assume(isinstance(value, (int, float)) or not any(word.startswith("-") for word in words))
    table, key = name.split(".")
    found = parse(Train, [f"--{name}", *words], "shoal train")
    expected = replace(Train(), **{table: replace(getattr(Train(), table), **{key: value})})
    assert found == expected


def test_steps_of_a_file_do_not_silently_win_over_minutes(trained: Recorder, tmp_path: Path, capsys):
    file = recipe(tmp_path, "[train]\nsteps = 100\n")
    assert main(["train", file, "--minutes", "2"]) == 2
    assert "--minutes has no effect: the job has train.steps=100" in capsys.readouterr().err
    assert main(["train", file, "--minutes", "2", "--steps", "0"]) == 0
    assert (trained.job.train.minutes, trained.job.train.steps) == (2.0, 0)


def test_only_the_first_of_torchruns_ranks_answers(trained: Recorder, monkeypatch, capfd: pytest.CaptureFixture):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert main(["train", "--format", "json"]) == 0
    assert capfd.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--format", "json"]) == 0
    assert json.loads(capfd.readouterr().out)["run"] == "runs/x"


def test_json_is_the_last_line_and_all_of_stdout(trained: Recorder, capfd: pytest.CaptureFixture):
    assert main(["train", "--format", "json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"run": "runs/x", "val_loss": None}
    assert "a line of progress" in err
    assert "a line of a rank" in err


def test_text_goes_to_stdout(trained: Recorder, capfd: pytest.CaptureFixture):
    assert main(["train"]) == 0
    out, err = capfd.readouterr()
    assert "a line of progress" in out
    assert "a line of a rank" in out
    assert "{" not in out + err


def test_a_stopped_run_has_the_exit_code_of_its_signal(trained: Recorder):
    for stopped_by, code in {"SIGINT": 130, "SIGTERM": 143, "another rank": 143}.items():
        trained.stopped_by = stopped_by
        assert main(["train"]) == code


@pytest.mark.parametrize(
    ("args", "what", "fix"),
    [
        (["--optim.lrr", "3"], "unknown option --optim.lrr", "--optim.lr"),
        (["--lr", "3"], "unknown option --lr", "--optim.lr"),
        (["--optim_lr=3"], "unknown option --optim-lr", "--optim.lr"),
        (["--train.lr", "3"], "unknown option --train.lr", "--optim.lr"),
        (["--vocab-size", "3"], "unknown option --vocab-size", "--model.vocab-size or --data.vocab-size"),
        (["--qqqq", "3"], "unknown option --qqqq", "shoal train --help"),
        (["--optim.lr"], "--optim.lr needs 1 value", ""),
        (["--optim.lr", "--steps", "3"], "--optim.lr needs 1 value", ""),
        (["--optim.betas", "0.9"], "--optim.betas needs 2 values", ""),
        (["--optim.lr", "fast"], "--optim.lr='fast' is not a number", "0.1"),
        (["--steps", "1.5"], "--train.steps='1.5' is not a whole number", "8"),
        (["--train.global_batch", "x"], "--train.global-batch='x' is not a whole number", ""),
        (["--model.mlp-bias", "maybe"], "--model.mlp-bias='maybe' is not true or false", "true"),
        (["--layout", "replica=2"], "unknown layout key 'replica'", "'replicas'"),
        (["--format", "xml"], "--format='xml' is unknown", "text, json"),
        (["none.toml"], "none.toml: cannot read the recipe: No such file", "TOML"),
        (["a.toml", "b.toml"], "unexpected argument 'b.toml'", ""),
        (["--resume", "none"], "none: no run to resume: there is no such folder", "shoal runs"),
        (["a.toml", "--resume", "none"], "a recipe and --resume are both given", ""),
        (["--data", "\udcff.txt"], "is not UTF-8", ""),
        (
            ["--layout", "replicas=2", "--workers", "3"],
            "--workers 3 and --layout replicas=2 are both",
            "--layout replicas=3",
        ),
        (
            ["--layout=replicas=2,fsdp=2", "--workers", "1"],
            "--workers 1 and --layout replicas=2,fsdp=2",
            "--layout fsdp=2",
        ),
        (["--workers", "-1"], "--workers=-1 is less than 1", "1 or more"),
        (["--resume", "none", "--run-dir", "other"], "--run-dir and --resume are both given", "leave out --run-dir"),
        (["--data", "a.txt", "b.toml"], "b.toml stands after --data", "shoal train b.toml --data a.txt"),
        (["--data", "b.toml", "my notes", "c.toml"], "b.toml stands", "shoal train b.toml --data 'my notes'\n"),
        (["--data.source", "b.toml"], "b.toml stands after --data", "shoal train b.toml --data TEXT"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(args, what, fix, trained: Recorder, capsys: pytest.CaptureFixture):
    assert main(["train", *args]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert what in err
    assert fix in err
    assert "Traceback" not in err
    assert out == ""
    assert not hasattr(trained, "job")


def test_a_mistake_in_the_recipe_is_shown_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = recipe(tmp_path, "[optim]\nlr = 1e-3\nlrr = 2\n")
    assert main(["train", file, "--format", "json"]) == 2
    out, err = capsys.readouterr()
    assert err == f"error: {file}:3: unknown key 'optim.lrr'\n  → did you mean 'optim.lr'?\n"
    error = {"what": "unknown key 'optim.lrr'", "where": f"{file}:3", "fix": "did you mean 'optim.lr'?"}
    assert json.loads(out) == {"error": error}


def test_a_value_out_of_range_is_blamed_on_the_recipe_or_the_command_line(tmp_path: Path, capsys):
    file = recipe(tmp_path, "[optim]\nlr = -1\n")
    assert main(["train", file]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}:2: optim.lr=-1.0 is not positive")
    assert main(["train", file, "--optim.lr", "-2"]) == 2
    assert capsys.readouterr().err.startswith("error: optim.lr=-2.0 is not positive")
    file = recipe(tmp_path, "[data]\nsequence_length = 0\n")
    assert main(["data", "inspect", file]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}:2: data.sequence_length=0 is less than")


def test_help_shows_every_option_with_what_it_means(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    # Lines may break within a word, at a comma or a slash.
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    for name in kinds(Job):
        assert f"--{name.replace('_', '-')}" in shown
    tables = [type(getattr(Job(), f.name)) for f in fields(Job) if f.name != "layout"]
    for table in tables:
        assert set(docstrings(table)) == {f.name for f in fields(table)}
    for table in (Train, *tables):
        for text in docstrings(table).values():
            assert text.replace(" ", "") in shown
    assert set(docstrings(Layout)) == {f.name for f in fields(Layout)}
    assert all(flag in shown for flag in SHORT)
