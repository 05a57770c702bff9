"""Which rows of the embedding a worker pulls by themselves, and when it pulls all of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shoal.sync.server.messages import Range
from shoal.training.server.glances import Glances, Words


class Tokens:
    """Sample i has the tokens i and 2 i; 4 samples a step."""

    global_batch = 4
    growing = False

    def stretch(self, position: int, count: int) -> SimpleNamespace:
        sample_B = torch.arange(position, position + count)
        return SimpleNamespace(tokens_BL=torch.stack([sample_B, 2 * sample_B], 1))


def server(tiny, folder, **tables):
    return tiny(folder, sync={"name": "server"} | tables.pop("sync", {}), **{"model": UNTIED} | tables)


UNTIED = {"tie_word_embeddings": False}


def test_rows_of_the_tokens_that_occur():
    found = Words(Tokens(), None)(Range(2, 5))
    assert found is not None
    assert found.tolist() == [2, 3, 4, 6, 8]


def test_everything_is_pulled_before_a_look_at_held_out_text(tiny, tmp_path):
    glances = Glances(server(tiny, tmp_path / "run", train={"validate_every": 3}))
    words = Words(Tokens(), glances)
    found = []
    for step in range(8):
        row_N = words(Range(4 * step, 4 * step + 4))
        # What another thread has asked for by then, step 3 does not have.
        whole = step != 3 and (row_N is None or step == 0)
        assert np.array_equal(words(Range(4 * step, 4 * step + 4)), row_N), "asking changes nothing"
        found.append((row_N is None, glances.due(step, whole)))
    assert [step for step, (everything, _) in enumerate(found) if everything] == [3, 4, 6]
    assert [step for step, (_, looks) in enumerate(found) if looks] == [4, 6]


def test_everything_is_pulled_for_samples_that_are_not_known_here_yet():
    """Of a growing store, which is looked at by the thread that computes."""
    tokens = Tokens()
    tokens.growing, tokens.samples = True, 4
    words = Words(tokens, None)
    assert words(Range(2, 4)).tolist() == [2, 3, 4, 6]
    assert words(Range(4, 6)) is None
    tokens.samples = 8
    assert words(Range(4, 6)).tolist() == [4, 5, 8, 10]


@pytest.mark.parametrize(
    ("tables", "enough"),
    [
        ({}, True),
        ({"server": {"mode": "asp", "compensation": "look-ahead"}}, True),
        ({"model": {}}, False),
        ({"server": {"local_steps": 2}}, False),
        ({"sync": {"codec": "int8"}}, False),
    ],
    ids=str,
)
def test_who_pulls_rows(tiny, tmp_path, tables, enough):
    assert Words.enough(server(tiny, tmp_path / "run", **tables)) == enough
