"""`shoal`: the list of verbs, and how a verb ends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest

from shoal.cli.answer import Answer
from shoal.cli.main import VERBS, main
from shoal.errors import RankError


def verb(monkeypatch: pytest.MonkeyPatch, run) -> None:
    """Puts `run` in the place of `shoal runs`."""
    module = ModuleType("shoal.cli.runs")
    module.run = run
    monkeypatch.setitem(sys.modules, "shoal.cli.runs", module)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_the_verbs_are_listed(args: list[str], capsys: pytest.CaptureFixture):
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out and what in out for name, what in VERBS.items())


def test_the_list_of_verbs_needs_no_large_import():
    code = "import sys; from shoal.cli.main import main; main([]); print(' '.join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    loaded = {name.split(".")[0] for name in output.splitlines()[-1].split()}
    assert loaded.isdisjoint({"torch", "tyro", "rich", "numpy", "msgspec", "plotly", "tokenizers", "difflib"})


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help_that_needs_no_torch(name: str):
    code = f"""
import sys
from shoal.cli.main import main
try:
    main(['{name}', '--help'])
except SystemExit:
    pass
sys.exit('torch' in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert f"usage: shoal {name}" in ended.stdout


def test_every_verb_takes_format(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    for args in [[name] for name in VERBS if name != "data"] + [["data", "prepare"], ["data", "inspect"]]:
        with pytest.raises(SystemExit):
            main([*args, "--help"])
        assert "--format" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"shoal {importlib.import_module('shoal').__version__}\n"


def test_an_unknown_verb(capsys: pytest.CaptureFixture):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown verb 'trian'\n  → did you mean 'train'?\n"


def test_the_answer_is_the_last_line_and_nan_is_null(monkeypatch, capsys: pytest.CaptureFixture):
    def run(args):
        print("for people")
        return Answer({"loss": float("nan"), "name": "é"}, exit_code=3)

    verb(monkeypatch, run)
    assert main(["runs", "--format=json"]) == 3
    out, err = capsys.readouterr()
    assert (out, err) == ('{"loss":null,"name":"é"}\n', "for people\n")
    assert main(["runs"]) == 3
    assert capsys.readouterr().out == "for people\n"


def test_a_failed_rank_is_exit_code_1(monkeypatch, capsys: pytest.CaptureFixture):
    def run(args):
        raise RankError("division by zero", where="rank 2", fix="see log.txt")

    verb(monkeypatch, run)
    assert main(["runs", "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert err == "error: rank 2: division by zero\n  → see log.txt\n"
    assert json.loads(out)["error"]["where"] == "rank 2"


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys: pytest.CaptureFixture):
    def run(args):
        raise KeyboardInterrupt

    verb(monkeypatch, run)
    assert main(["runs"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert main(["runs", "--format", "json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["what"] == "interrupted"


def test_a_reader_that_leaves_is_no_error():
    """`shoal train --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    code = "from shoal.cli.main import main; import sys; sys.exit(main(['train', '--help']))"
    ended = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert ended.stderr == ""


def test_the_installed_command_refuses_without_traceback():
    command = [sys.executable, "-m", "shoal", "train", "--optim.lrr", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "error: unknown option --optim.lrr\n  → did you mean --optim.lr?\n"
