"""docs/codecs.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from shoal.job.codec import KEEPING, ROUNDING
from shoal.sync.codec import codec_of
from tests.sync.codec_cases import length, one_thread, through

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
PAGE = (Path(__file__).parents[2] / "docs" / "codecs.md").read_text()
TABLE = {text: figures for text, *figures in re.findall(r"^\| `(.+?)` \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.MULTILINE)}


def test_every_name_is_there():
    assert {name.partition("+")[0].partition(":")[0] for name in TABLE} == {*KEEPING, *ROUNDING}


@pytest.mark.parametrize("text", TABLE)
def test_figures_are_measured(text):
    codec = codec_of(text)
    values = torch.randn(1, length(codec, 1_000_000), generator=torch.Generator().manual_seed(0))
    share, lost = TABLE[text]
    numbers = values.shape[1]
    assert codec.row_bytes(numbers) / (4 * numbers) == pytest.approx(float(share), abs=1e-4)
    found = float((values - through(codec, values)).square().sum() / values.square().sum())
    assert found == pytest.approx(float(lost), rel=0.01, abs=1e-4)
