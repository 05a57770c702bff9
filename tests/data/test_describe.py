"""The numbers of `shoal data inspect`, and the compressors beside which a model stands."""

from __future__ import annotations

import gzip
import json
import lzma
from dataclasses import replace

import pytest

from shoal.data.describe import compressed_bits_per_byte, describe
from shoal.job.data import DataOptions
from tests.data.corpora import appended, folder, quiet


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "corpus").mkdir()
    folder(root / "corpus" / "text")
    (root / "corpus" / "x.bin").write_bytes(b"\0\1")
    (root / "corpus" / "bad.txt").write_bytes(b"caf\xe9 " * 3 + b"plain words to follow " * 9)
    options = DataOptions(
        source=(str(root / "corpus"),), vocab_size=300, sequence_length=64, validation=0.2, cache=str(root / "cache")
    )
    return quiet(options), options


def test_the_numbers_are_those_of_the_corpus(made):
    corpus, options = made
    found = describe(corpus, options)
    json.dumps(found)
    assert found["train"]["documents"] + found["validation"]["documents"] == 13
    assert (found["replaced"], found["binary"], found["empty"]) == (3, 1, 0)
    assert found["validation_files"] == list(corpus.validation_files)
    tokens = corpus.train.tokens + corpus.validation.tokens
    assert found["bytes_per_token"] == (corpus.train.bytes + corpus.validation.bytes) / tokens
    lengths = corpus.store("train").length_D
    assert found["length_percentiles"]["0"] == lengths.min()
    assert found["length_percentiles"]["100"] == lengths.max()
    assert found["packing_efficiency"] == corpus.train.predictions / (found["rows"] * 64)
    assert 0.5 < found["padding_efficiency"] < found["packing_efficiency"] <= 1


def test_the_sample_is_text_of_the_corpus(made):
    corpus, options = made
    for row in describe(corpus, options)["sample"]:
        assert isinstance(row, str)
        assert row
    short = replace(options, sequence_length=4000)
    sample = describe(corpus, short)["sample"]
    assert any("<|endoftext|>" in piece for piece in sample)


def test_a_growing_store_is_described_with_its_segments(made, tmp_path):
    _, options = made
    options = replace(options, sequence_length=8, order="sequential", grow=True, source=(str(tmp_path / "store"),))
    lots = [["a" * 5, "a" * 30], ["b" * 7], ["c" * 9, "c" * 3]]
    counts = [appended(tmp_path / "store", lot).train for lot in lots]
    found = describe(quiet(options), options)
    assert [segment["tokens"] for segment in found["segments"]] == [9, 11 + 5]
    assert found["train"]["tokens"] == sum(one.tokens for one in counts)
    assert (found["length_percentiles"]["0"], found["length_percentiles"]["100"]) == (5, 32)
    assert found["rows"] == (4 + 1) + 1 + 2, "37 predictions, then 8, then 14"
    assert found["packing_efficiency"] == (37 + 8 + 14) / (8 * 8)
    assert found["sample"]
    assert describe(*made)["segments"] is None


def test_compressors_see_the_validation_text(made):
    corpus, _ = made
    text = b"".join(corpus.validation_text())
    found = compressed_bits_per_byte(corpus)
    assert len(text) == corpus.validation.bytes
    assert found["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert found["xz -9"] == 8 * len(lzma.compress(text, preset=9)) / len(text)


def test_without_validation_text_there_is_nothing_to_compress(made):
    _, options = made
    assert compressed_bits_per_byte(quiet(replace(options, validation=0.0))) == {}
