"""The token store against a reader and a writer made from Megatron-Core's description of its format."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.data.store import Store, Writer, token_dtype
from shoal.errors import DataError

DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 1000) -> None:
    writer = Writer(prefix, vocab_size)
    for tokens in documents:
        writer.add(np.array(tokens, np.int64), np.array([len(tokens)]), True)
    writer.close()


def read_as_megatron(prefix: Path) -> list[list[int]]:
    """The documents of a store, byte by byte as the format says; shares nothing with shoal."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<Q", index, 9) == (1,)
    (code,) = struct.unpack_from("<B", index, 17)
    sequences, documents = struct.unpack_from("<QQ", index, 18)
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    indices = struct.unpack_from(f"<{documents}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    raw = prefix.with_suffix(".bin").read_bytes()
    rows = [np.frombuffer(raw, DTYPES[code], n, p).tolist() for n, p in zip(lengths, pointers, strict=True)]
    return [[t for row in rows[a:b] for t in row] for a, b in pairwise(indices)]


def read(prefix: Path) -> list[list[int]]:
    store = Store(prefix)
    return [store.tokens[s : s + n].tolist() for s, n in zip(store.start_D, store.length_D, strict=True)]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 65499), max_size=9), max_size=9),
    vocab_size=st.sampled_from([257, 65499, 65500, 200_000]),
)
def test_megatron_reads_what_is_written(tmp_path, documents, vocab_size):
    documents = [[t % vocab_size for t in d] for d in documents]
    write(tmp_path / "train", documents, vocab_size)
    assert read_as_megatron(tmp_path / "train") == documents
    assert read(tmp_path / "train") == documents
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.bin", "train.idx"]


def test_the_bytes_are_these(tmp_path):
    write(tmp_path / "x", [[7, 8, 9], [300]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4H", 7, 8, 9, 300)
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 3, 1, 0, 6, 0, 1, 2)
    assert (tmp_path / "x.idx").read_bytes() == expected


def test_dtype_follows_the_vocabulary():
    assert token_dtype(65499) is np.uint16
    assert token_dtype(65500) is np.int32


def test_documents_may_come_in_parts(tmp_path):
    writer = Writer(tmp_path / "x", 1000)
    for tokens, lengths, complete in (([1, 2], [2], False), ([3], [1], False), ([4, 5], [2], True), ([], [], True),
                                      ([6, 7, 8], [1, 2], True)):  # fmt: skip
        writer.add(np.array(tokens, np.int64), np.array(lengths, np.int64), complete)
    writer.close()
    assert read(tmp_path / "x") == [[1, 2, 3, 4, 5], [6], [7, 8]]
    assert (writer.documents, writer.tokens) == (3, 8)


def test_a_long_index_is_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.data.store._BLOCK", 3)
    documents = [list(range(n % 5)) for n in range(20)]
    write(tmp_path / "x", documents)
    assert read_as_megatron(tmp_path / "x") == read(tmp_path / "x") == documents


def damage(path: Path, offset: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("x.bin", lambda p: p.write_bytes(p.read_bytes()[:-2]), "its index tells of"),
        ("x.bin", lambda p: p.unlink(), "missing"),
        ("x.idx", lambda p: p.unlink(), "missing"),
        ("x.idx", lambda p: p.write_bytes(p.read_bytes()[:20]), "not the index"),
        ("x.idx", lambda p: p.write_bytes(p.read_bytes()[:-8]), "do not hold"),
        ("x.idx", lambda p: damage(p, 0, b"X"), "not the index"),
        ("x.idx", lambda p: damage(p, 9, b"\2"), "version 2"),
        ("x.idx", lambda p: damage(p, 17, b"\x63"), "code 99"),
        ("x.idx", lambda p: damage(p, 34, b"\2"), "do not fit"),
        ("x.idx", lambda p: damage(p, 34 + 2 * 4 + 8, b"\7"), "do not fit"),
        ("x.idx", lambda p: damage(p, 34 + 2 * 12 + 8, b"\7"), "do not fit"),
    ],
)
def test_damage_is_found_and_the_file_named(tmp_path, file, change, what):
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    change(tmp_path / file)
    with pytest.raises(DataError, match=what) as caught:
        Store(tmp_path / "x")
    assert caught.value.where == str(tmp_path / file)
    assert "prepare again" in caught.value.fix


def test_every_bit_of_the_index_matters(tmp_path):
    write(tmp_path / "x", [[1, 2, 3], [4, 5], [6]])
    path = tmp_path / "x.idx"
    raw = path.read_bytes()
    unnoticed = []
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            Store(tmp_path / "x")
            unnoticed.append(bit)
        except DataError:
            pass
    assert unnoticed == []


def test_an_open_document_is_a_bug(tmp_path):
    writer = Writer(tmp_path / "x", 1000)
    writer.add(np.array([1]), np.array([1]), False)
    with pytest.raises(AssertionError):
        writer.close()
    writer.abandon()
