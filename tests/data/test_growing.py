"""Rows of a growing store: never another row under the same number, no token lost or doubled, whatever comes when."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data import loader as loader_module
from shoal.data.batch import Batch
from shoal.data.loader import Loader
from shoal.data.prepared import Prepared
from shoal.data.segments import folder_of
from shoal.data.store import Store
from shoal.errors import DataError
from shoal.job.data import DataOptions
from tests.data.corpora import appended
from tests.data.test_loader import equal, join

OPTIONS = DataOptions(order="sequential", grow=True, sequence_length=16)


def reader(store: Path, options: DataOptions = OPTIONS, split: str = "train") -> Loader:
    return Loader(Prepared.load(store), options, split, global_batch=4)


def every(loader: Loader) -> Batch:
    return loader.stretch(0, loader.samples)


@pytest.fixture
def store(tmp_path) -> Path:
    """Of three lots of text, none of which fills its rows: 4 of a, 4 of b, 5 of c."""
    for number, letter in enumerate("abc"):
        appended(tmp_path / "store", [letter * length for length in (3, 37, 20 + number)])
    return tmp_path / "store"


def predicted(batch: Batch) -> Counter[tuple[int, int]]:
    """Pairs of a token and the one that it predicts, all that weigh."""
    weighs = batch.weight_BL > 0
    return Counter(zip(batch.tokens_BL[weighs].tolist(), batch.labels_BL[weighs].tolist(), strict=True))


def expected(prefixes: list[Path]) -> Counter[tuple[int, int]]:
    """The same pairs, from the documents."""
    found: Counter[tuple[int, int]] = Counter()
    for prefix in prefixes:
        held = Store(prefix)
        for start, length in zip(held.start_D, held.length_D, strict=True):
            document = held.tokens[start : start + length].tolist()
            found.update(pairwise(document))
    return found


DOCUMENT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60)
APPENDS = st.lists(st.lists(DOCUMENT, min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=15)
@given(appends=APPENDS, length=st.integers(1, 40), pack=st.sampled_from(["best_fit", "pad"]))
def test_appending_changes_no_row_and_every_token_is_predicted_once(appends, length, pack):
    options = replace(OPTIONS, sequence_length=length, pack=pack)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        appended(store, appends[0])
        growing = reader(store, options)
        before = every(growing)
        for more in appends[1:]:
            appended(store, more)
            assert growing.grow() == growing.samples > len(before.sample_B)
            assert equal(growing.stretch(0, len(before.sample_B)), before)
            before = every(growing)
        corpus, anew = Prepared.load(store), reader(store, options)
        assert (anew.samples, anew.tokens) == (growing.samples, growing.tokens)
        assert equal(every(anew), before)
        assert before.weight_BL.sum() == anew.tokens == corpus.train.predictions
        assert predicted(before) == expected(corpus.prefixes("train"))
        assert before.sample_B.tolist() == list(range(anew.samples))


def test_a_row_is_of_one_segment_however_little_there_is(store):
    letters = [set(bytes(row[row < 256].tolist()).decode()) for row in every(reader(store)).tokens_BL]
    assert letters == [{"a"}] * 4 + [{"b"}] * 4 + [{"c"}] * 5
    appended(store, ["d"])
    assert every(reader(store)).weight_BL[-1].sum() == 2


@pytest.mark.parametrize("rows", [[3, 4], [12, 0, 7, 7, 5, 4, 8, 9], list(range(12, -1, -1)), [6]])
def test_any_rows_in_any_order_in_one_batch(store, rows):
    loader = reader(store)
    assert equal(loader.rows(np.array(rows)), join([loader.rows(np.array([row])) for row in rows]))
    assert loader.rows(np.array(rows)).sample_B.tolist() == rows


def test_a_loader_sees_what_comes_after_it_was_opened(store):
    loader = reader(store)
    assert (loader.grow(), loader.growing) == (13, True)
    with pytest.raises(DataError, match="row 13 is not there: the store has 13 rows so far") as caught:
        loader.stretch(12, 2)
    assert "shoal data append" in caught.value.fix
    with pytest.raises(DataError, match="has 13 rows so far"):
        loader.rows(np.array([13]))
    tokens = loader.tokens
    added = appended(store, ["d" * 30])
    assert loader.samples == 13
    assert loader.grow() == loader.samples == 15
    assert loader.tokens == tokens + added.train.predictions
    assert set(loader.stretch(13, 2).tokens_BL.flatten().tolist()) == {ord("d"), 256}


def test_a_store_with_a_gap_grows_when_the_gap_is_closed(store, tmp_path):
    away = tmp_path / "away"
    folder_of(store, 1).rename(away)
    loader = reader(store)
    assert loader.samples == 4
    away.rename(folder_of(store, 1))
    assert loader.grow() == 13
    assert equal(every(loader), every(reader(store)))


def test_a_segment_that_is_damaged_or_gone_is_named(store):
    loader = reader(store)
    appended(store, ["d"])
    damaged = folder_of(store, 3) / "train.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(DataError, match="damaged segment") as caught:
        loader.grow()
    assert "segment-000003" in caught.value.where
    assert loader.samples == 13
    folder_of(store, 2).rename(store / "away")
    with pytest.raises(DataError, match="segment 2 of the store is gone"):
        loader.rows(np.array([12]))


def test_segments_are_opened_again_when_they_have_been_closed(store, monkeypatch):
    monkeypatch.setattr(loader_module, "_OPEN", 1)
    few, all_open = reader(store), every(reader(store))
    for _ in range(2):
        assert equal(few.rows(np.array([0, 7, 12])), Batch(**{
            name: values[[0, 7, 12]] for name, values in vars(all_open).items()
        }))  # fmt: skip


def test_without_grow_it_is_a_corpus_as_it_was_when_it_was_loaded(store):
    corpus = Prepared.load(store)
    appended(store, ["d"])
    now = Loader(corpus, replace(OPTIONS, grow=False), "train", global_batch=4)
    assert (now.samples, now.grow(), now.tokens) == (13, 13, corpus.train.predictions)
    assert equal(now.stretch(0, 13), reader(store).stretch(0, 13))
    assert equal(now.stretch(13, 13), now.stretch(0, 13)), "epochs"
    shuffled = Loader(corpus, replace(OPTIONS, grow=False, order="random"), "train", seed=1)
    assert sorted(shuffled.stretch(13, 13).sample_B.tolist()) == list(range(13))


def test_validation_does_not_grow(tmp_path):
    store = tmp_path / "store"
    appended(store, ["some words " * 9, "others " * 12, "more of them " * 8], validation=0.3)
    validation = reader(store, split="validation")
    samples = validation.samples
    appended(store, ["later"])
    assert (validation.grow(), validation.growing) == (samples, False)
    assert reader(store, split="validation").samples == samples
    assert equal(validation.stretch(samples, samples), validation.stretch(0, samples)), "it has epochs"


def test_an_ordinary_corpus_does_not_grow(tmp_path, store):
    (store / "store.json").unlink()
    ordinary = Loader(Prepared.load(store), replace(OPTIONS, grow=False), "train")
    assert (ordinary.samples, ordinary.grow(), ordinary.growing) == (4, 4, False)
    assert equal(ordinary.stretch(4, 4), ordinary.stretch(0, 4))
