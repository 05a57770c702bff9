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


def documents(tmp_path: Path, sizes: list[int]) -> Source:
    """JSONL with lines of so many bytes, each at least 14."""
    return source(tmp_path / "sizes.jsonl", "".join(f'{{"text": "{"x" * (size - 13)}"}}\n' for size in sizes))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(14, 400) | st.integers(14, 200_000), min_size=2, max_size=12),
    share=st.floats(0.001, 0.45),
)
def test_jsonl_is_split_as_files_are_at_least_one_document_to_either_side_and_no_long_one(tmp_path, sizes, share):
    file = documents(tmp_path, sizes)
    assert file.size == sum(sizes)
    training, validation = split([file], share)
    spans = sorted(training + validation, key=lambda s: s.start)
    assert [0, *(s.stop for s in spans)] == [*(s.start for s in spans), file.size]
    starts = {sum(sizes[:i]) for i in range(len(sizes) + 1)}
    assert {s.start for s in spans} <= starts
    assert training
    taken = sum(s.stop - s.start for s in validation)
    assert 0 < taken <= max(2 * share, 0.5) * file.size


@pytest.mark.parametrize("size", [200, 3000, 20_000, 100_000, 400_000])
def test_documents_longer_than_the_blocks_do_not_enlarge_the_share(tmp_path, size):
    """At 400,000 bytes there is one of 50 documents: 2 % of the text is what is asked for."""
    lengths = [int(size * (0.5 + i * 37 % 101 / 101)) for i in range(20_000_000 // size)]
    file = documents(tmp_path, lengths)
    taken = sum(s.stop - s.start for s in split([file], 0.02)[1])
    assert abs(taken - 0.02 * file.size) <= max(lengths) / 2 + 0.05 * 0.02 * file.size


@pytest.mark.parametrize(
    ("sizes", "kept"), [([50, 51], 0), ([51, 50], 1), ([30, 20, 900], 1), ([20] * 30 + [900], 0), ([20, 900], 0)]
)
def test_one_long_document_is_trained_on_and_another_kept(tmp_path, sizes, kept):
    start = sum(sizes[:kept])
    assert [(s.start, s.stop) for s in split([documents(tmp_path, sizes)], 0.02)[1]] == [(start, start + sizes[kept])]


def test_a_blank_line_is_no_document_to_keep(tmp_path):
    file = source(tmp_path / "blank.jsonl", '\n \n{"text": "only one"}\n\n')
    assert split([file], 0.1)[1] == []
    lines = [*['{"text": "twenty letters or so"}'] * 9, "", ""]
    file = source(tmp_path / "last.jsonl", "\n".join(lines))
    (kept,) = split([file], 0.05)[1]
    assert file.path.read_bytes()[kept.start : kept.stop].startswith(b'{"text"')


def test_what_cannot_be_split_at_lines(tmp_path):
    single = source(tmp_path / "one.jsonl", '{"text": "only one"}\n')
    assert split([single], 0.1)[1] == []
    line = source(tmp_path / "line.txt", "日本語" * 1000)
    training, validation = split([line], 0.1)
    whole = line.path.read_bytes()
    parts = [whole[s.start : s.stop].decode() for s in training + validation]
    assert "".join(parts) == "日本語" * 1000
    assert len(parts) == 2
