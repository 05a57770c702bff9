"""Training and validation share nothing, and validation is about as large as asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.data import split as split_module
from shoal.data.sources import Source
from shoal.data.split import split
from tests.data.corpora import jsonl, words


def source(path: Path, content: str) -> Source:
    path.write_text(content, encoding="utf-8")
    return Source(path.name, path, path.stat().st_size, "", path.suffix == ".jsonl")


def many(tmp_path: Path, sizes: list[int]) -> list[Source]:
    return [source(tmp_path / f"{i}.txt", f"{i} ".ljust(size, "x")) for i, size in enumerate(sizes)]


def test_whole_files_near_the_target(tmp_path):
    files = many(tmp_path, [100 + 13 * (i % 40) for i in range(400)])
    training, validation = split(files, 0.05)
    assert {s.file for s in training} | {s.file for s in validation} == set(files)
    assert not {s.file for s in training} & {s.file for s in validation}
    assert all((s.start, s.stop) == (0, s.file.size) for s in training + validation)
    share = sum(s.stop for s in validation) / sum(f.size for f in files)
    assert 0.04 < share < 0.06
    assert split(files[::-1], 0.05)[1] == validation[::-1]
    assert {s.file for s in split(files, 0.05, seed=1)[1]} != {s.file for s in validation}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(5, 400), min_size=2, max_size=12), share=st.floats(0.001, 0.99))
def test_both_sides_hold_a_file_and_no_choice_of_one_file_would_be_nearer(tmp_path, sizes, share):
    files = many(tmp_path, sizes)
    training, validation = split(files, share)
    assert training
    assert validation
    target = share * sum(sizes)
    taken = sum(s.stop for s in validation)
    assert abs(taken - target) <= max(max(sizes), 0.1 * target)


def test_few_files_give_the_smallest_if_none_is_near_the_target(tmp_path):
    files = many(tmp_path, [5000, 300, 4000])
    assert [s.file.name for s in split(files, 0.001)[1]] == ["1.txt"]


def test_copies_stay_together(tmp_path):
    files = [source(tmp_path / f"{i}.txt", f"{i // 4:07}" * 20) for i in range(40)]
    training, validation = split(files, 0.3)
    text = {s.file.path.read_text() for s in training}
    assert validation
    assert not text & {s.file.path.read_text() for s in validation}


def test_copies_apart_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(split_module, "_copies", lambda files: [[file] for file in files])
    files = [source(tmp_path / f"{i}.txt", f"{i // 4:07}" * 20) for i in range(40)]
    training, validation = split(files, 0.3)
    assert {s.file.path.read_text() for s in training} & {s.file.path.read_text() for s in validation}


def test_nothing_is_held_out_if_nothing_is_asked_for(tmp_path):
    files = many(tmp_path, [50, 60])
    assert split(files, 0.0)[1] == []


@pytest.mark.parametrize("size", [300, 5000, 100_000, 3_000_000])
def test_one_text_is_split_in_blocks_of_lines(tmp_path, size):
    file = source(tmp_path / "one.txt", words(size, 0))
    training, validation = split([file], 0.05)
    whole = file.path.read_bytes()
    spans = sorted(training + validation, key=lambda s: s.start)
    assert b"".join(whole[s.start : s.stop] for s in spans) == whole
    assert all(whole[s.start - 1 : s.start] in (b"", b"\n") for s in spans)
    taken = sum(s.stop - s.start for s in validation)
    line = max(map(len, whole.split(b"\n"))) + 1
    assert abs(taken - 0.05 * len(whole)) <= line * (1 + len(validation))
    assert len(validation) == max(1, int(0.05 * len(whole)) // (1 << 14))


@pytest.mark.parametrize("documents", [2, 3, 30, 500])
def test_one_jsonl_is_split_between_its_lines(tmp_path, documents):
    path = jsonl(tmp_path / "one.jsonl", [words(50, i) for i in range(documents)])
    file = source(path, path.read_text())
    training, validation = split([file], 0.02)
    whole = path.read_bytes()
    assert training
    assert validation
    for span in training + validation:
        assert whole[: span.start].endswith(b"\n") or span.start == 0
        assert whole[span.start : span.stop].endswith(b"\n")


def test_what_cannot_be_split_at_lines(tmp_path):
    single = source(tmp_path / "one.jsonl", '{"text": "only one"}\n')
    assert split([single], 0.1)[1] == []
    long_at_the_end = jsonl(tmp_path / "long.jsonl", [words(5, 1), words(5, 2), words(900, 3)])
    training, validation = split([source(long_at_the_end, long_at_the_end.read_text())], 0.1)
    assert validation == [], "most of the text would never be trained on"
    assert sum(span.stop - span.start for span in training) == long_at_the_end.stat().st_size
    line = source(tmp_path / "line.txt", "日本語" * 1000)
    training, validation = split([line], 0.1)
    whole = line.path.read_bytes()
    parts = [whole[s.start : s.stop].decode() for s in training + validation]
    assert "".join(parts) == "日本語" * 1000
    assert len(parts) == 2
