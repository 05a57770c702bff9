"""Bytes of files to clean text: nothing is lost between pieces, bad bytes are counted, bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.data import text
from shoal.data.sources import Source
from shoal.data.text import Span, pieces, read
from shoal.errors import DataError
from tests.data.corpora import jsonl


def source(path: Path) -> Source:
    return Source(path.name, path, path.stat().st_size, "", path.suffix == ".jsonl")


def documents(path: Path, field: str = "text") -> tuple[list[str], int]:
    """All documents of a file, and the replaced sequences."""
    file, found, replaced, open_ = source(path), [], 0, ""
    for piece in pieces([Span(file, 0, file.size)]):
        texts = read(piece, field)
        replaced += texts.replaced
        if file.jsonl:
            found += texts.documents
            continue
        assert piece.opens == (open_ == "")
        open_ += texts.documents[0]
        if piece.closes:
            found.append(open_)
            open_ = ""
    assert open_ == ""
    return found, replaced


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text(max_size=30), min_size=1, max_size=30), size=st.integers(4, 60))
def test_pieces_of_any_size_give_the_whole_text(tmp_path, lines, size):
    whole = ("\n".join(lines) or "x").encode("utf-8", "replace").decode()
    path = tmp_path / "text.txt"
    path.write_bytes(whole.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", size)
        assert documents(path) == ([whole or "x"], 0)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=20), size=st.integers(4, 200))
def test_pieces_of_jsonl_of_any_size_give_every_document(tmp_path, texts, size):
    path = jsonl(tmp_path / "some.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", size)
        assert documents(path) == ([t for t in texts if t], 0)


def test_invalid_bytes_are_replaced_and_counted(tmp_path):
    path = tmp_path / "bad.txt"
    # One lone byte, one cut character before a valid U+FFFD, one at the end: three sequences.
    path.write_bytes(b"a\xffb" + b"\xe2\x82" + "\ufffd".encode() + b"ok\n\xf0\x9f\x98")
    assert documents(path) == (["a\ufffdb\ufffd\ufffdok\n\ufffd"], 3)


def test_lone_surrogates_of_jsonl_are_replaced_and_counted(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert documents(path) == (["a\ufffdb", "😀"], 1)


def test_a_long_document_is_cut_into_several(tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text("0123456789\n" * 50)
    monkeypatch.setattr(text, "PIECE", 64)
    monkeypatch.setattr(text, "_LONGEST", 200)
    found, _ = documents(path)
    assert len(found) > 1
    assert "".join(found) == path.read_text()
    assert all(d.endswith("\n") for d in found)


def test_blank_lines_and_a_byte_order_mark_are_no_documents(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": ""}\n{"text": "b"}')
    assert documents(path) == (["a", "b"], 0)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{broken", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"body": "x"}', "no field 'text'"),
        ('{"text": 5}', "not text but 5"),
    ],
)
@pytest.mark.parametrize("size", [50, 1 << 19])
def test_a_bad_line_is_named(tmp_path, monkeypatch, line, what, size):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "fine"}\n\n' * 10 + line + "\n" + '{"text": "fine"}\n' * 10)
    monkeypatch.setattr(text, "PIECE", size)
    with pytest.raises(DataError, match=what) as caught:
        documents(path)
    assert caught.value.where == "some.jsonl:21"
    assert caught.value.fix


def test_the_keys_of_a_line_without_the_field_are_shown(tmp_path):
    path = jsonl(tmp_path / "some.jsonl", ["a"], field="content")
    with pytest.raises(DataError) as caught:
        documents(path)
    assert "'content', 'id'" in str(caught.value)
    assert documents(path, "content") == (["a"], 0)
    assert json.loads(path.read_text())["content"] == "a"
