"""The smaller verbs: what they hand over, print and answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shoal.cli.data import AppendVerb, DataVerb, TextOptions
from shoal.cli.doctor import DoctorOptions
from shoal.cli.flags import docstrings
from shoal.cli.generate import Generate
from shoal.cli.main import main
from shoal.cli.pull import PullOptions
from shoal.cli.report import ReportOptions
from shoal.cli.runs import RunsOptions
from shoal.job import Job, write


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Any], None]:
    """Puts a function in the place of one that needs torch."""

    def put(module: str, name: str, function: Any) -> None:
        fake = ModuleType(module)
        setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)

    return put


_VERBS = [AppendVerb, DataVerb, DoctorOptions, Generate, PullOptions, ReportOptions, RunsOptions, TextOptions]


@pytest.mark.parametrize("options", _VERBS)
def test_every_option_of_every_verb_is_explained(options: type):
    assert set(docstrings(options)) == {f.name for f in fields(options)} - {"data"}


def test_generate_hands_over_its_options(stand_in, capsys: pytest.CaptureFixture):
    called = {}

    def generate(model, prompt, *, on_text, say, **sampling):
        called.update(sampling, model=model, prompt=prompt)
        on_text("one ")
        on_text("two")
        say("stopped: the context is full")
        return "one two"

    stand_in("shoal.serving.generate", "generate", generate)
    args = [
        "generate",
        "runs/x",
        "--prompt",
        "-- say",
        "--max_tokens",
        "7",
        "--temperature",
        "0",
        "--top-k=5",
    ]
    assert main([*args, "--top-p", "0.5", "--seed", "3"]) == 0
    sampling = {"max_tokens": 7, "temperature": 0.0, "top_k": 5, "top_p": 0.5, "seed": 3}
    assert called == {"model": "runs/x", "prompt": "-- say", "tokenizer": None, **sampling}
    out, err = capsys.readouterr()
    assert out == "-- sayone two\n"
    assert "context is full" in err
    assert main([*args, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"model": "runs/x", "prompt": "-- say", "text": "one two"}
    assert "one two" in err


def test_what_a_model_writes_gives_the_terminal_no_commands(stand_in, monkeypatch, capsys: pytest.CaptureFixture):
    def generate(model, prompt, *, on_text, say, **sampling):
        on_text("\x1b[2J\n")
        return "\x1b[2J\n"

    stand_in("shoal.serving.generate", "generate", generate)
    assert main(["generate", "runs/x"]) == 0
    assert capsys.readouterr().out == "\x1b[2J\n\n", "a file"
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert main(["generate", "runs/x"]) == 0
    assert capsys.readouterr().out == "\\x1b[2J\n\n"
    assert main(["generate", "runs/x", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["text"] == "\x1b[2J\n"
    assert err == "\\x1b[2J\n\n"


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["generate"], "no model is named"),
        (["generate", "x", "--promt", "a"], "unknown option --promt\n  → did you mean --prompt?"),
        (["generate", "x", "--max-tokens", "ten"], "--max-tokens='ten' is not a whole number"),
        (["report"], "no run is named"),
        (["report", "no/such/run"], "no/such/run"),
        (["doctor", "now"], "unexpected argument 'now'"),
        (["data", "inspekt"], "unknown verb 'data inspekt'\n  → did you mean 'inspect'?"),
        (["data", "prepare", "--data.sequence-length", "0"], "data.sequence_length=0 is less than 1"),
        (["data", "prepare", "--data", "no/such/file.txt"], "no/such/file.txt"),
        (["data", "prepare", "--train.steps", "3"], "unknown option --train.steps"),
        (["data", "append", "store"], "a store and a file of text are to be named"),
        (["data", "append", "no/store", "no/such/file.txt"], "no/such/file.txt: no such file or folder"),
        (["data", "append", "store", "x", "--data.order", "random"], "unknown option --data.order"),
        (["data", "append", "store", "x", "--data.validation", "1"], "data.validation=1.0 is not in [0, 1)"),
    ],
)
def test_mistakes(args: list[str], what: str, capsys: pytest.CaptureFixture):
    assert main(args) == 2
    err = capsys.readouterr().err
    assert what in err
    assert "Traceback" not in err


def test_runs_lists_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "job.toml").write_text(write(Job()))
    assert main(["runs", str(tmp_path), "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in answer["runs"]] == ["first"]


def test_report_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "job.toml").write_text(write(Job()))
    assert main(["report", str(tmp_path), "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["run"] == str(tmp_path)
    assert Path(answer["report"]).is_file()


def test_doctor_shows_the_diagnosis(stand_in, capsys: pytest.CaptureFixture):
    stand_in("shoal.launch.doctor", "diagnose", lambda: {"findings": []})
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "{'findings': []}\n"
    assert main(["doctor", "--format", "json"]) == 0
    assert capsys.readouterr().out == '{"findings":[]}\n'


def test_data_is_prepared_as_the_recipe_says(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text, recipe = tmp_path / "my.txt", tmp_path / "recipe.toml"
    text.write_text("".join(f"line {i}\n" for i in range(200)))
    recipe.write_text('[data]\ntokenizer = "bytes"\nsequence_length = 32\nworkers = 1\n')
    assert main(["data", "prepare", str(recipe), "--data", str(text), "--format", "json"]) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert (prepared["vocab_size"], prepared["sequence_length"]) == (257, 32)
    assert prepared["train"]["bytes"] + prepared["validation"]["bytes"] == text.stat().st_size
    assert main(["data", "inspect", str(recipe), "--data", str(text), "--data.sequence_length", "16"]) == 0
    out = capsys.readouterr().out
    assert "rows of 16 tokens" in out
    assert "already prepared" in out
    assert "\nline 1" in out
    assert prepared["folder"] in out


def test_text_is_appended_to_a_store(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(100))
    for name in ("first.jsonl", "more.jsonl"):
        Path(name).write_text(lines)
    how = ["--data.text-field", "body", "--data.workers", "1"]
    made = ["data", "append", "news", "first.jsonl", *how, "--data.tokenizer", "bytes", "--data.validation", "0.1"]
    assert main(made) == 0
    assert "begun with 9" in capsys.readouterr().out
    assert main([*made, "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["store"], answer["segment"], answer["train"]["documents"]) == (str(tmp_path / "news"), 1, 100)
    assert main(["data", "append", "news", "more.jsonl", "first.jsonl", *how]) == 0
    assert "segment 2: 200 documents" in capsys.readouterr().out
    assert (
        main(["data", "append", "news", "more.jsonl", *how, "--data.vocab-size", "4096", "--data.validation", "0"]) == 2
    )
    assert "data.validation=0.0 is not that of the store, 0.1" in capsys.readouterr().err
    assert main(["data", "inspect", "--data", "news", "--data.sequence-length", "16"]) == 0
    out = capsys.readouterr().out
    assert "segment 1" in out
    assert "segment 2" in out
    assert "rows of 16 tokens" in out
    monkeypatch.setattr("shoal.cli.data._SHOWN", 1)
    assert main(["data", "inspect", "--data", "news", "--data.sequence-length", "16"]) == 0
    out = capsys.readouterr().out
    assert "segment 1 " not in out
    assert "2 segments, the last 1 of them shown" in out
    assert main(["data", "prepare", "--data", "news"]) == 2
    assert "growing store" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_said_in_a_sentence(tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shoal.observe.files.replace", full)
    (tmp_path / "job.toml").write_text(write(Job()))
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: cannot write the report: No space left on device")


@pytest.mark.parametrize("part", [["worker 12"], ["worker", "12"]])
def test_a_part_is_one_word_or_two(part, stand_in, capsys):
    joined = []
    stand_in("shoal.launch.join", "join", lambda folder, name, own, wait: joined.append((folder, name, own.threads)))
    assert main(["join", "runs/a", *part, "--threads", "2", "--format", "json"]) == 0
    assert joined == [(Path("runs/a"), "worker 12", 2)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["part"] == "worker 12"
