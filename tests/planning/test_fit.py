"""Fitting: constants that were planted are found again, and those of the package are what the fit gives."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.planning import constants, fit, published, refit, step


@pytest.fixture(scope="module")
def rows():
    return published.read(published.FIT)


def test_the_packages_constants_are_those_of_a_fit():
    found, known = refit.refitted(), constants.load()
    names = [[(c.kind, c.group, c.name, c.rows) for c in constants_.all] for constants_ in (found, known)]
    assert names[0] == names[1]
    assert found.logs == pytest.approx(known.logs, abs=1e-4)


def test_constants_are_few():
    known = constants.load().all
    assert sum(c.kind == constants.SHARED for c in known) <= 12
    for kind, most in ((constants.DEVICE, 5), (constants.STACK, 3)):
        groups = [c.group for c in known if c.kind == kind]
        assert max(map(groups.count, groups)) <= most


def test_planted_constants_are_found_again(rows):
    """Of rows made by the model, with noise of 3 % and a tenth of them off by a factor."""
    random = np.random.default_rng(0)
    known = constants.load()
    planted = known.at(known.logs + known.spreads * random.standard_normal(len(known.all)))
    seconds = step.cost(rows.work, planted).seconds * np.exp(0.03 * random.standard_normal(len(rows.work)))
    seconds[random.random(len(seconds)) < 0.1] *= 1.7
    found = fit.fit(rows.work, seconds, rows.table, known.at(known.priors))
    for one, other, c in zip(found.logs, planted.logs, known.all, strict=True):
        # Those that many rows feel, and nothing else stands in for.
        if c.name in ("odd", "flash1"):
            assert abs(one - other) < 0.05, c
    error = np.abs(step.cost(rows.work, found).seconds / step.cost(rows.work, planted).seconds - 1)
    assert np.median(error) < 0.02
    assert np.median(np.abs(step.cost(rows.work, known).seconds / step.cost(rows.work, planted).seconds - 1)) > 0.05


def test_three_rows_of_a_target_bring_predictions_nearer_to_it(rows):
    """A target that is a quarter slower than it should be."""
    which = np.flatnonzero(rows.table == "vtrain-single")
    seconds = 1.25 * step.cost(rows.work, constants.load()).seconds
    some = which[[40, 90, 140]]
    found, factor = fit.calibrate(rows.work.take(some), seconds[some], constants.load())
    of_all = step.cost(rows.work.take(which), found).seconds * factor / seconds[which]
    assert np.abs(of_all - 1).mean() < 0.06
    # And what is told already is not moved.
    same, one = fit.calibrate(rows.work.take(some), seconds[some] / 1.25, constants.load())
    assert one == pytest.approx(1, abs=1e-6)
    assert same.logs == pytest.approx(constants.load().logs, abs=1e-6)


def test_a_device_and_a_stack_without_rows_have_the_priors():
    known = constants.load()
    assert known.of(constants.DEVICE, "memory", np.array(["b200", "h100"]))[0] == 0.8
    assert known.of(constants.STACK, "host", np.array(["core", "other"]))[1] == 12e-6
