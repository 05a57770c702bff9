"""The cost model: its parts add up, its bounds hold, and of some cases it says what is computed by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from shoal.job import Layout
from shoal.planning import asked, block, cluster, collectives, constants, devices, products, published, step
from shoal.planning.constants import Rates
from shoal.planning.search import Space


@pytest.fixture(scope="module")
def rows():
    return published.read(published.FIT)


def test_parts_add_up_and_none_is_negative(rows):
    found = step.cost(rows.work, constants.load())
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    for name, part in found.parts.items():
        assert (part >= 0).all(), name
    # And each is of rows that have it.
    assert (found.parts["tensor"][rows.work.tensor == 1] == 0).all()
    assert (found.parts["bubble"][rows.work.pipeline == 1] == 0).all()
    assert (found.parts["fsdp"][rows.work.zero != 3] == 0).all()
    assert (found.parts["context"][rows.work.context == 1] == 0).all()
    for name in ("tensor", "bubble", "fsdp", "context", "messages", "data"):
        assert (found.parts[name] > 0).any(), name


def test_no_step_is_faster_than_its_products_at_the_peak(rows):
    work = rows.work
    least = work.model_flops / (work.devices * work.peak * (1 + work.low))
    assert (step.cost(work, constants.load()).seconds > least).all()


@pytest.mark.parametrize(
    ("column", "factor"),
    [("bandwidth", 2.0), ("link", 2.0), ("nic", 2.0), ("peak", 1.5)],
)
def test_a_better_device_is_never_slower(rows, column, factor):
    work = rows.work
    better = replace(work, columns={**work.columns, column: factor * work.columns[column]})
    before, after = (step.cost(one, constants.load()).seconds for one in (work, better))
    assert (after <= before * (1 + 1e-12)).all()
    assert (after < before * 0.999).any()


def test_twice_the_micro_batches_of_one_device_take_twice_the_time_without_the_update(rows):
    alone = rows.work.take((rows.work.pipeline == 1) & (rows.work.data == 1))
    assert len(alone)
    twice = replace(alone, columns={**alone.columns, "global_batch": 2 * alone.global_batch})
    for name in ("compute", "tensor"):
        first, second = (step.cost(one, constants.load()).parts[name] for one in (alone, twice))
        assert second == pytest.approx(2 * first)


def fields(work, **changed):
    columns = {name: np.full(len(work), float(value)) for name, value in changed.items()}
    return replace(work, columns={**work.columns, **columns})


def test_computing_operators_again_lies_between_nothing_and_all(rows):
    """And what it adds to attention's and every second product's time is the other products' share, and no more."""
    work = fields(rows.work, recompute=0, selective=0)
    none, some, every = (
        step.cost(fields(work, **change), constants.load()).seconds
        for change in ({}, {"operators": 1}, {"recompute": 1})
    )
    assert (none < some).all()
    assert (some < every).all()


def test_which_products_are_computed_again():
    """Of Llama 3 8B's seven: keys, attention's output, the up-projection; 19,456 of 53,248 columns."""
    shape = asked.shapes.named("llama3-8b")
    row = {**shape.columns, "sequence": 8192.0}
    work = SimpleNamespace(**row)
    again = (1024 + 4096 + 14336) / (2 * (4096 + 1024) + 3 * 14336)
    assert block.repeated_products(work) == pytest.approx(again)


def test_attention_by_kernels_of_the_generation_before(rows):
    """FlashAttention-2 on an H100 is slower than kernels of its own; on an A100 it is of its own."""
    for device, slower in (("h100", True), ("a100-80", False)):
        work = fields(rows.work.take(rows.work.device == device), **devices.device(device).columns)
        old, own = (step.cost(fields(work, flash=kind), constants.load()).seconds for kind in (2, 3))
        assert (old > own).all() if slower else (old == own).all()


def test_a_whole_tile_on_every_unit_is_a_full_wave():
    units = np.array([108.0])
    assert products.filled(np.array([108 * 256.0]), np.array([128.0]), units) == 1.0
    # One tile more is another wave: 109 of 216.
    assert products.filled(np.array([109 * 256.0]), np.array([128.0]), units)[0] < 0.8


@pytest.mark.parametrize(("size", "power"), [(4096, 64), (96, 32), (50257, 1), (12, 4), (2.5, 1), (1, 1)])
def test_powers_of_two(size, power):
    assert products.power_of_two(np.array([float(size)])) == power


def test_a_product_is_no_faster_than_its_flops_or_its_traffic(rows):
    work = rows.work
    rates = Rates.of(constants.load(), work)
    for m, n, k in ((4096.0, 4096.0, 4096.0), (16.0, 4096.0, 4096.0), (8192.0, 50257.0, 1024.0)):
        sizes = [np.full(len(work), size) for size in (m, n, k)]
        found = products.seconds(work, rates, products.aligned(*sizes[1:], 0.3, 0.1), *sizes, work.low)
        assert (found >= 2 * m * n * k / (work.peak * (1 + work.low))).all()
        assert (found >= 2 * (m * k + k * n + m * n) / work.bandwidth).all()


def test_how_long_rows_are_is_about_features_and_not_about_tokens():
    ranks = asked.of_model("llama3-8b", cluster.named("h100x8"), asked.Wanted(global_batch=8))
    spaces = [Space(replace(ranks, sequence=length)) for length in (8192, 8190, 8191)]
    found = [space.find(Layout.parse("fsdp=8,zero=2,micro_batch=1")).seconds for space in spaces]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=0.01)
    odd = products.aligned(np.array([4096.0, 4096.0]), np.array([1024.0, 1021.0]), 0.25, 0.125)
    assert odd == pytest.approx([1.0, 0.25])


def test_a_ring_of_eight():
    """Of 8 ranks each sends seven eighths, at 100 GB/s."""
    found = collectives.scatter(np.array([8e9]), np.array([8.0]), np.array([100e9]), np.array([0.0]))
    assert found == pytest.approx([7e9 / 100e9 + constants.CALL])
    assert collectives.scatter(np.array([8e9]), np.array([1.0]), np.array([100e9]), np.array([0.0])) == 0


def test_what_shows_of_communication_under_computing():
    shown = collectives.shown(np.array([1.0, 3.0]), np.array([2.0, 2.0]), 0.25)
    assert shown == pytest.approx([0.25, 1.5])
