"""A layout in a job's TOML: what is there stays, a new job is one that can be trained, and mistakes change nothing."""

from __future__ import annotations

import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.errors import JobError, LayoutError
from shoal.job import Job, Layout, read
from shoal.planning import asked, cluster, written
from shoal.planning.asked import Wanted
from shoal.planning.plan import Question
from tests.planning.plans import plan

LAYOUT = "replicas=2,fsdp=4,zero=1,micro_batch=4"
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"


def of_recipe() -> Question:
    return asked.of_job(read(RECIPE), cluster.named("h100x8"), Wanted())


def of_llama() -> Question:
    return asked.of_model("llama3-8b", cluster.named("h100x8"), Wanted())


def test_a_new_job_is_the_one_that_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its text with another layout, and all of it where something else was asked for; no model that lies about."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 512}')
    job = read(RECIPE)
    said = written.of_layout("one.toml", of_recipe(), plan(LAYOUT, 1.0), job=job, recipe=str(RECIPE))
    assert said == f"one.toml: a new job with that layout; all else as in {RECIPE}"
    assert Path("one.toml").read_text() == RECIPE.read_text().replace('"replicas=2" ', f'"{LAYOUT}" ', 1)
    question = asked.of_job(job, cluster.named("h100x8"), Wanted(sequence=128))
    written.of_layout("two.toml", question, plan(LAYOUT, 1.0), job=job, recipe=str(RECIPE))
    longer = replace(job.data, sequence_length=128)
    assert read("two.toml") == replace(job, layout=Layout.parse(LAYOUT), data=longer)


def test_a_job_keeps_all_but_its_layout(tmp_path: Path):
    file = tmp_path / "job.toml"
    file.write_text(RECIPE.read_text())
    file.chmod(0o640)
    said = written.of_layout(file, of_recipe(), plan(LAYOUT, 1.0), "")
    before, after = RECIPE.read_text().splitlines(), file.read_text().splitlines()
    changed = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    (was, line), *others = changed
    assert not others
    assert line == was.replace("replicas=2", LAYOUT, 1)
    assert "#" in line, "the comment behind it"
    assert read(file) == replace(read(RECIPE), layout=Layout.parse(LAYOUT))
    assert (file.stat().st_mode & 0o777, os.listdir(tmp_path)) == (0o640, ["job.toml"])
    assert str(file) in said


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('layout = "auto"\n[train]\nsteps = 3\n', 'layout = "fsdp=2"\n[train]\nsteps = 3\n'),
        ("'layout'='auto'  # x\r\n\r\n[run]\r\n", "'layout'=\"fsdp=2\"  # x\r\n\r\n[run]\r\n"),
        ("# mine\n\n[train]\nsteps = 3\n", '# mine\nlayout = "fsdp=2"\n\n[train]\nsteps = 3\n'),
        ("[train]\r\nsteps = 3", 'layout = "fsdp=2"\r\n[train]\r\nsteps = 3'),
        ("# only a comment", '# only a comment\nlayout = "fsdp=2"\n'),
        ("", 'layout = "fsdp=2"\n'),
        ("\ufeff# mark\n", '\ufeff# mark\nlayout = "fsdp=2"\n'),
        # What looks like the key stands in text.
        (
            '[run]\nname = """\nlayout = "auto"\n"""\n',
            'layout = "fsdp=2"\n[run]\nname = """\nlayout = "auto"\n"""\n',
        ),
    ],
)
def test_where_the_layout_stands(before: str, after: str):
    assert written.with_layout(before, Layout.parse("fsdp=2,zero=3"), "x.toml") == after.replace("=2", "=2,zero=3")


@pytest.mark.parametrize("text", ["layout = '''\nauto'''\n", '"lay\\u006fut" = "auto"\n'])
def test_an_odd_way_of_writing_is_left_alone(text: str):
    with pytest.raises(JobError, match="cannot be changed here"):
        written.with_layout(text, Layout.parse("fsdp=2"), "x.toml")


def test_a_new_job_is_whole(tmp_path: Path):
    file = tmp_path / "new.toml"
    question = of_llama()
    written.of_layout(file, question, plan(LAYOUT, 1.0), "llama3-8b")
    job = read(file).validate()
    assert job.layout == Layout.parse(LAYOUT)
    assert (job.data.sequence_length, job.train.global_batch, job.train.precision) == (8192, 512, "bf16")
    assert asked.shape_of(job).columns == question.shape.columns
    assert set(tomllib.loads(file.read_text())) == {"layout", "model", "data", "train", "run"}
    assert (job.model.rope_theta, job.model.rms_norm_eps) == (Job().model.rope_theta, Job().model.rms_norm_eps)


def test_a_new_job_of_a_config_has_its_options(tmp_path: Path):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96,'
        '"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "rope_theta": 5e5,'
        '"max_position_embeddings": 128, "rms_norm_eps": 1e-6}'
    )
    question = asked.of_model(str(folder), cluster.named("h100x8"), Wanted(64, 8))
    written.of_layout(tmp_path / "job.toml", question, plan(LAYOUT.replace("4", "2"), 1.0), str(folder))
    assert read(tmp_path / "job.toml").model.rope_theta == 5e5


def refused(question: Question, file: Path, layout: str = LAYOUT, model: str = "llama3-8b") -> JobError:
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(JobError) as error:
        written.of_layout(file, question, plan(layout, 1.0), model)
    assert (file.read_bytes() if file.is_file() else None) == before
    assert error.value.fix
    return error.value


def test_another_job_is_not_overwritten(tmp_path: Path):
    file = tmp_path / "job.toml"
    file.write_text(RECIPE.read_text())
    question = of_recipe()
    assert "global_batch is 64 there, and the plan is for 8" in refused(replace(question, global_batch=8), file).what
    assert "sequence_length is 64 there" in refused(replace(question, sequence=32), file).what
    other = replace(question, shape=replace(question.shape, hidden=512))
    assert "another model than was planned: hidden 256, not 512" in refused(other, file).what
    assert isinstance(refused(question, file, "replicas=7"), LayoutError | JobError)
    file.write_text("[train\n")
    assert f"{file}:1" in refused(question, file).where
    assert os.listdir(tmp_path) == ["job.toml"]


def test_what_cannot_be_trained_is_not_written(tmp_path: Path):
    file = tmp_path / "job.toml"
    assert "cannot be trained in fp8" in refused(replace(of_llama(), precision="fp8"), file).what
    gpt = asked.of_model("gpt3-175b", cluster.named("h100x8"), Wanted())
    assert "cannot train it" in refused(gpt, file, model="gpt3-175b").what
    assert "TOML file" in refused(of_llama(), tmp_path / "job.json").what
    assert "cannot write" in refused(of_llama(), tmp_path / "no" / "such" / "job.toml").what
    assert os.listdir(tmp_path) == []


def test_a_link_stays_one(tmp_path: Path):
    real, link = tmp_path / "real.toml", tmp_path / "job.toml"
    real.write_text(RECIPE.read_text())
    link.symlink_to(real)
    written.of_layout(link, of_recipe(), plan(LAYOUT, 1.0), "")
    assert link.is_symlink()
    assert read(real).layout == Layout.parse(LAYOUT)


def test_line_ends_of_a_file_stay(tmp_path: Path):
    file = tmp_path / "job.toml"
    file.write_bytes(RECIPE.read_bytes().replace(b"\n", b"\r\n"))
    written.of_layout(file, of_recipe(), plan(LAYOUT, 1.0), "")
    assert file.read_bytes() == RECIPE.read_bytes().replace(b"replicas=2", LAYOUT.encode(), 1).replace(b"\n", b"\r\n")


def test_a_full_disk_leaves_the_job_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "job.toml"
    file.write_text(RECIPE.read_text())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(written, "sync", full)
    assert refused(of_recipe(), file).what == "cannot write the job: No space left on device"
    assert os.listdir(tmp_path) == ["job.toml"]
