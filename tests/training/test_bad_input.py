"""What a user may get wrong, from the command line to the end: one sentence, what to do, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.job import Job, Layout, write


class NoRanks:
    """Every mistake is found before a rank is asked for anything."""

    def __init__(self, preload: list[str]):
        pass

    def close(self) -> None:
        pass


def corpus_of(folder: Path, content: bytes, name: str = "text.txt") -> str:
    file = folder / name
    file.write_bytes(content)
    return str(file)


def missing(folder: Path) -> list[str]:
    corpus_of(folder, b"text")
    return ["--data", str(folder / "test.txt")]


def a_run(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run/job.toml").write_text(write(Job()))
    return ["--run-dir", str(folder / "run")]


def not_a_model(folder: Path) -> list[str]:
    (folder / "model").mkdir()
    return ["--model.weights", str(folder / "model")]


MISTAKES = {
    "missing file": (missing, "test.txt: ", "text.txt"),
    "empty file": (lambda f: ["--data", corpus_of(f, b"")], "is empty", "text"),
    "binary file": (lambda f: ["--data", corpus_of(f, bytes(range(256)) * 9)], "binary", "text"),
    "one sentence": (
        lambda f: ["--data", corpus_of(f, b"A text of few words.\n")],
        "shorter than one sequence",
        "data.sequence_length=",
    ),
    "sequence length 0": (
        lambda _: ["--data.sequence-length", "0"],
        "data.sequence_length=0 is less than 1",
        "1 or more",
    ),
    "batch": (
        lambda _: ["--layout", "replicas=5"],
        "train.global_batch=12 is not divisible by the 5 workers",
        "train.global_batch=10 or 15",
    ),
    "micro-batch": (
        lambda _: ["--layout", "replicas=2,micro_batch=4"],
        "micro_batch=4 does not divide the 6 sequences of a rank",
        "take 1, 2, 3 or 6",
    ),
    "heads that do not divide": (
        lambda _: ["--layout", "tensor=3"],
        "tensor=3 does not divide",
        "tensor=1, 2 or 4",
    ),
    "an unknown axis": (lambda _: ["--layout", "shards=2"], "unknown layout key 'shards'", ""),
    "a precision": (lambda _: ["--train.precision", "fp8"], "train.precision='fp8' is unknown", "fp"),
    "a folder that holds a run": (a_run, "there is a run in this folder already", "shoal train --resume "),
    "a run folder that cannot be made": (
        lambda f: ["--run-dir", corpus_of(f, b"") + "/run"],
        "cannot write the run folder: Not a directory",
        "--run-dir",
    ),
    "no model folder": (lambda f: ["--model.weights", str(f / "none")], "config.json", "Hugging Face"),
    "a model folder without a model": (not_a_model, "config.json", "Hugging Face"),
    "no tokenizer": (lambda f: ["--data.tokenizer", str(f / "none")], "none", "tokenizer"),
    "a tokenizer that is text": (
        lambda f: ["--data.tokenizer", corpus_of(f, b"Not JSON", "tokenizer.json")],
        "tokenizer.json",
        "",
    ),
    "a small vocabulary": (lambda _: ["--model.vocab-size", "100"], "the tokenizer has 257 tokens", "model.vocab_size"),
}


@pytest.mark.parametrize(("words", "what", "fix"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake(arguments, tmp_path, monkeypatch, capfd, words, what, fix):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shoal.launch.train.Ranks", NoRanks)
    words = words(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--layout", "replicas=2", "--steps", "2", "--format", "json", *words]) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    error = json.loads(out)["error"]
    sentence = err[err.index("error: ") :]
    assert sentence.count("\n") <= 2, "the sentence, and what to do"
    assert what in sentence
    assert fix in error["fix"]
    assert error["fix"]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_resuming_what_is_no_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("shoal.launch.train.Ranks", NoRanks)
    (tmp_path / "job.toml").write_text("")
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "job.toml of this run is damaged: it names no layout" in capfd.readouterr().err
    (tmp_path / "job.toml").write_text(write(Job(layout=Layout())))
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "cannot be resumed: data.json is missing or damaged" in capfd.readouterr().err


def test_invalid_utf8_is_replaced_and_counted_and_trained_on(train, tiny, tmp_path, capsys):
    text = b"The caf\xe9 of the na\xefve fish is open \xff\xfe today.\n" * 300
    source = corpus_of(tmp_path, text)
    job = tiny(tmp_path / "run", train={"steps": 2}, data={"source": (source,)})
    assert train(job)[0]["step"] == 2
    assert "1200 byte sequences are not UTF-8; each is now the character U+FFFD" in capsys.readouterr().out
