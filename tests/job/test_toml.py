"""What is written is read back; what is wrong is refused with its file, line and the nearest known key."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import JobError, LayoutError
from shoal.job import Job, Layout, read, write
from shoal.job.check import kinds
from shoal.job.optim import OptimOptions
from shoal.job.toml import blame, parse
from shoal.job.train import TrainOptions
from tests.job.strategies import jobs


@given(jobs)
def test_reading_what_was_written_gives_the_same_job(job: Job):
    assert parse(write(job)) == job


@given(jobs)
def test_every_option_is_written(job: Job):
    table = tomllib.loads(write(job))
    found = {f"{name}.{key}" for name, part in table.items() if isinstance(part, dict) for key in part} | {"layout"}
    assert found == set(kinds(Job))


@given(jobs, jobs)
def test_a_file_changes_only_what_it_names(base: Job, other: Job):
    assert parse(f"[optim]\nlr = {other.optim.lr!r}\n", base=base) == replace(
        base, optim=replace(base.optim, lr=other.optim.lr)
    )


def test_a_whole_number_is_a_number_and_one_value_a_list():
    job = parse('[optim]\nlr = 1\n[data]\nsource = "my.txt"\n')
    assert job.optim.lr == 1.0
    assert isinstance(job.optim.lr, float)
    assert job.data.source == ("my.txt",)


def test_the_layout_is_one_text():
    assert parse('layout = "replicas=2,fsdp=3,zero=1"').layout == Layout(replicas=2, fsdp=3, zero=1)
    assert parse('layout = "auto"', base=Job(layout=Layout(2))).layout is None


@pytest.mark.parametrize(
    ("text", "line", "what", "fix"),
    [
        ("[optim]\nlr = 1e-3\nlrr = 2", 3, "unknown key 'optim.lrr'", "'optim.lr'"),
        ("[train]\n\n# a comment\nlr = 1e-3", 4, "unknown key 'train.lr'", "'optim.lr'"),
        ("\noptim.lr = 1\noptim.wieght_decay = 3", 3, "'optim.wieght_decay'", "'optim.weight_decay'"),
        ("\n\noptim = {lr = 1, epz = 3}", 3, "'optim.epz'", "'optim.eps'"),
        ("[run]\nname = '''\n[optim]\nlrr = 1\n'''\n[optim]\nlrr = 1", 7, "'optim.lrr'", "'optim.lr'"),
        ('[optim]\n"lrr" = 1', 2, "'optim.lrr'", "'optim.lr'"),
        ("[run]\nname = 'lrr'\n[optm]\nlr = 1", 3, "unknown key 'optm'", "'optim'"),
        ("# first\nlr = 1", 2, "unknown key 'lr'", "'optim.lr'"),
        ("[data]\nsequence_length = 1.5", 2, "data.sequence_length=1.5 is not a whole number", "8"),
        ("[train]\nsteps = true", 2, "train.steps=True is not a whole number", "8"),
        ("[optim]\nlr = 'fast'", 2, "optim.lr='fast' is not a number", "0.1"),
        ("[model]\ntie_word_embeddings = 1", 2, "is not true or false", "true"),
        ("[optim]\nbetas = [\n  0.9,\n]", 2, "optim.betas=[0.9] is not 2 values", "2 values"),
        ("[[optim]]\nlr = 1", 1, "'optim' is a table", "[optim]"),
        ("[optim]\nlr = 1\n\n[train]\nsteps = ", 5, "not valid TOML", "key = value"),
        ("[optim]\nlr = 1\nlr 2\n", 3, "not valid TOML", "key = value"),
        ("[run]\n\n[layout]\nreplicas = 2", 3, "is not text", "replicas=2"),
    ],
)
def test_a_mistake_is_shown_with_file_line_and_what_to_do(text: str, line: int, what: str, fix: str):
    with pytest.raises(JobError) as caught:
        parse(text, "my.toml")
    assert caught.value.where == f"my.toml:{line}"
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_wrong_layout_is_shown_with_its_line():
    with pytest.raises(LayoutError, match="unknown layout key 'replica'") as caught:
        parse('\nlayout = "replica=2"', "my.toml")
    assert caught.value.where == "my.toml:2"
    assert "'replicas'" in caught.value.fix


@given(
    st.lists(st.sampled_from(["", "# [optim]", "[run]", "name = 'x'"]), max_size=5, unique=True),
    st.integers(0, 3),
)
def test_the_line_is_right_wherever_the_key_stands(before: list[str], blank: int):
    if "name = 'x'" in before and "[run]" not in before[: before.index("name = 'x'")]:
        before = [line for line in before if line != "name = 'x'"]
    lines = [*before, "[optim]", *[""] * blank, "lrr = 1"]
    with pytest.raises(JobError) as caught:
        parse("\n".join(lines), "f")
    assert caught.value.where == f"f:{len(lines)}"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(JobError, match="No such file"):
        read(tmp_path / "none.toml")
    with pytest.raises(JobError, match="Is a directory"):
        read(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="not UTF-8") as caught:
        read(binary)
    assert caught.value.where == str(binary)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf[optim]\r\nlr = 1e-3\r\n")
    assert read(path).optim == OptimOptions(lr=1e-3)


def refused(job: Job) -> JobError:
    with pytest.raises(JobError) as caught:
        job.validate()
    return caught.value


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[optim]\n# the peak\nlr = -1\n", "optim.lr=-1.0 is not positive"),
        ("[optim]\n\nbetas = [0.9, 1.5]\n", "optim.betas: 1.5 is not in [0, 1)"),
        (
            'layout = "replicas=2"\n[train]\nglobal_batch = 5\n',
            "train.global_batch=5 is not divisible by the 2 workers",
        ),
    ],
)
def test_a_value_out_of_range_is_shown_with_its_line(tmp_path, text: str, what: str):
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    base = read(file)
    error = refused(base)
    assert what in error.what
    assert not error.where
    blamed = blame(error, file, base)
    assert blamed.where == f"{file}:3"
    assert (blamed.what, blamed.fix) == (error.what, error.fix)
    # The command line's mistakes are not the file's.
    other = replace(base, layout=None, train=TrainOptions(), optim=OptimOptions(lr=-2.0))
    assert not blame(refused(other), file, base).where


def test_what_the_file_does_not_say_is_not_blamed_on_it(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('layout = "replicas=3"\n')
    error = refused(read(file))
    assert error.what.startswith("train.global_batch=32 is not divisible")
    assert not blame(error, file, read(file)).where


def test_the_second_mistake_of_a_file_is_shown_with_its_line_when_the_command_line_mends_the_first(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("[optim]\nlr = -1\n[train]\nsteps = -1\n")
    base = read(file)
    assert blame(refused(base), file, base).where == f"{file}:2"
    assert blame(refused(replace(base, optim=OptimOptions())), file, base).where == f"{file}:4"
