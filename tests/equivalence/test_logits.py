"""With the vocabulary shared by ranks, no rank makes the logits of all words, and none is sent."""

from __future__ import annotations

from tests.equivalence.logits import CHUNK, VOCABULARY

PART = CHUNK * VOCABULARY // 2


def test_logits_are_never_gathered(ranks):
    """Nothing is larger than a chunk's logits of a rank's own words; nothing sent is near it."""
    for made, sent in ranks.run("tests.equivalence.logits:largest", 2):
        assert made == PART
        assert 0 < sent < PART / 4


def test_sees_gathered_logits(ranks):
    for made, sent in ranks.run("tests.equivalence.logits:largest", 2, gather=True):
        assert made == sent == 2 * PART
