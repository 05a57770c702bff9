"""Batches against a plain reading of the store; the stream does not depend on ranks, nor on where it is resumed."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from shoal.data import loader as loader_module
from shoal.data.batch import Batch
from shoal.data.loader import Loader
from shoal.errors import DataError
from shoal.job.data import DataOptions
from tests.data.corpora import folder, quiet

BATCH = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    options = DataOptions(
        source=(str(folder(root / "corpus", files=30, size=300)),), vocab_size=400, sequence_length=48,
        validation=0.1, cache=str(root / "cache"),
    )  # fmt: skip
    return quiet(options), options


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))


def join(parts: list[Batch]) -> Batch:
    return Batch(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Batch)})


def plain_row(corpus, plan, row: int, length: int) -> dict[str, list[int]]:
    """One row, token by token."""
    tokens = corpus.store("train").tokens
    out: dict[str, list[int]] = {k: [] for k in ("tokens", "labels", "document", "position", "weight")}
    pieces = range(plan.first_R[row], plan.first_R[row + 1])
    for number, piece in enumerate(pieces):
        for i in range(plan.length_P[piece]):
            place = int(plan.start_P[piece]) + i
            values = (int(tokens[place]), int(tokens[place + 1]), number, i, 1)
            for column, value in zip(out.values(), values, strict=True):
                column.append(value)
    for i in range(length - len(out["tokens"])):
        for column, value in zip(out.values(), (corpus.end_token, 0, len(pieces), i, 0), strict=True):
            column.append(value)
    return out


def wrong(corpus, plan, batch: Batch) -> list[str]:
    """The fields of a batch of all rows in order that differ from a plain reading."""
    names = ["tokens", "labels", "document", "position", "weight"]
    expected = [plain_row(corpus, plan, row, 48) for row in range(plan.rows)]
    return [n for n in names if getattr(batch, f"{n}_BL").tolist() != [row[n] for row in expected]]


@pytest.mark.parametrize("how", ["best_fit", "pad"])
def test_rows_are_the_pieces_of_the_plan(made, how):
    corpus, options = made
    reader = Loader(corpus, replace(options, pack=how), "train", BATCH)
    batch = reader.rows(np.arange(reader.samples))
    assert wrong(corpus, corpus.plan("train", 48, how), batch) == []
    kinds = [batch.tokens_BL.dtype, batch.labels_BL.dtype, batch.sample_B.dtype, batch.weight_BL.dtype]
    assert kinds == [torch.int64, torch.int64, torch.int64, torch.float32]
    assert batch.document_BL.dtype == batch.position_BL.dtype == torch.int32
    assert batch.sample_B.tolist() == list(range(reader.samples))
    assert batch.weight_BL.sum() == reader.tokens == corpus.train.predictions


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        (lambda r: setattr(r, "_start_P", r._start_P + (np.arange(len(r._start_P)) == 9)), {"tokens", "labels"}),
        (lambda r: setattr(r, "_stored", np.roll(r._stored, 1)), {"tokens", "labels"}),
        (lambda r: setattr(r, "_length_P", np.maximum(r._length_P - 1, 1)), {"document", "position", "weight"}),
    ],
)
def test_a_wrong_place_or_length_is_noticed(made, bug, seen):
    corpus, options = made
    reader = Loader(corpus, options, "train", BATCH)
    bug(reader._base)
    assert seen <= set(wrong(corpus, corpus.plan("train", 48, "best_fit"), reader.rows(np.arange(reader.samples))))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("order", ["random", "sequential"])
def test_the_stream_is_the_same_for_any_number_of_ranks(made, parts, order):
    corpus, options = made
    options = replace(options, order=order)
    whole = Loader(corpus, options, "train", BATCH, seed=5)
    for step in range(2 * whole.samples // BATCH + 2):
        ranks = [Loader(corpus, options, "train", BATCH, seed=5).batch(step * BATCH, p, parts) for p in range(parts)]
        assert equal(join(ranks), whole.batch(step * BATCH, 0, 1))


def test_resuming_at_any_step_gives_the_same(made):
    corpus, options = made
    reader = Loader(corpus, options, "train", BATCH, seed=5)
    stream = [reader.batch(step * BATCH, 0, 2) for step in range(12)]
    for start in range(12):
        again = Loader(corpus, options, "train", BATCH, seed=5)
        assert all(equal(again.batch(step * BATCH, 0, 2), stream[step]) for step in range(start, 12))


@pytest.mark.parametrize("used", [[(3, 5)], [(40, 41), (24, 30), (30, 33)], [(25, 26), (27, 200)]], ids=str)
def test_what_is_used_up_already_is_left_out(made, used):
    """From the lowest sample that is not used up, in parts on several ranks, broken off after any batch."""
    corpus, options = made
    reader = Loader(corpus, options, "train", BATCH, seed=5)
    low = min(first for first, _ in used)
    taken = {position for stretch in used for position in range(*stretch)}
    left = np.array([position for position in range(low, 600) if position not in taken])[: 6 * BATCH]
    expected = reader.order(left).tolist()
    reader.skip(used)
    position, seen = reader.after(low, 0), []
    assert position == left[0]
    for step in range(6):
        again = Loader(corpus, options, "train", BATCH, seed=5)
        again.skip([each for each in used if each[0] > position])
        batch = join([again.batch(position, part, 3) for part in range(3)])
        assert equal(batch, reader.batch(position, 0, 1))
        seen += batch.sample_B.tolist()
        position = reader.after(position, BATCH)
        assert position not in taken, f"after step {step}"
    assert seen == expected


def test_every_sample_once_an_epoch_and_every_token_predicted_once(made):
    corpus, options = made
    reader = Loader(corpus, options, "train", BATCH, seed=5)
    stream = join([reader.batch(step * BATCH, 0, 1) for step in range(3 * reader.samples // BATCH + 1)])
    ledger = stream.sample_B[: 3 * reader.samples].view(3, reader.samples)
    assert torch.equal(ledger.sort(dim=1).values, torch.arange(reader.samples).expand(3, -1))
    assert not torch.equal(ledger[0], ledger[1])
    store = corpus.store("train")
    firsts = store.start_D
    expected = Counter(np.delete(store.tokens, firsts).tolist())
    for epoch in range(3):
        rows = slice(epoch * reader.samples, (epoch + 1) * reader.samples)
        labels = stream.labels_BL[rows][stream.weight_BL[rows] > 0]
        assert Counter(labels.tolist()) == expected


def test_batches_reach_into_the_next_epoch(made):
    corpus, options = made
    reader = Loader(corpus, options, "train", BATCH, seed=1)
    assert reader.samples % BATCH, "a corpus with a batch across the epochs"
    position = reader.samples - 5
    rows = reader.batch(position, 0, 1).sample_B
    assert torch.equal(rows[:5], torch.from_numpy(reader.order(np.arange(position, reader.samples))))
    assert torch.equal(rows[5:], reader.batch(reader.samples, 0, 1).sample_B[: BATCH - 5])


def test_order_follows_the_seed(made):
    corpus, options = made
    rows = [Loader(corpus, options, "train", BATCH, seed=s).batch(0, 0, 1).sample_B.tolist() for s in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    sequential = Loader(corpus, replace(options, order="sequential"), "train", BATCH)
    assert sequential.batch(0, 0, 1).sample_B.tolist() == list(range(BATCH))


def test_an_order_that_depends_on_the_ranks_would_be_noticed(made, monkeypatch):
    corpus, options = made
    order = loader_module.permute
    # The bug: each rank shuffles the positions it is given.
    monkeypatch.setattr(loader_module, "permute", lambda index, size, *rest: order(index - index.min(), size, *rest))
    reader = Loader(corpus, options, "train", BATCH, seed=5)
    ranks = [reader.batch(BATCH, part, 2) for part in range(2)]
    assert not equal(join(ranks), reader.batch(BATCH, 0, 1))


def test_validation_is_its_own_split(made):
    corpus, options = made
    reader = Loader(corpus, replace(options, order="sequential"), "validation", BATCH)
    assert reader.tokens == corpus.validation.predictions
    batch = reader.rows(np.arange(reader.samples))
    assert batch.weight_BL.sum() == reader.tokens


def test_a_split_without_text_is_refused(made):
    corpus, options = made
    empty = quiet(replace(options, validation=0.0))
    with pytest.raises(DataError, match="no validation text"):
        Loader(empty, options, "validation", BATCH)
    with pytest.raises(DataError, match="shorter than one sequence"):
        Loader(corpus, replace(options, sequence_length=10**6), "train", BATCH)


def test_batches_may_be_written_into(made):
    corpus, options = made
    batch = Loader(corpus, options, "train", BATCH).batch(0, 0, 1)
    batch.weight_BL.zero_()
    batch.tokens_BL.add_(1)
