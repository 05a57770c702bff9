"""Training on a growing store: what goes with it, and what an end is needed for."""

from __future__ import annotations

import pytest

from shoal.errors import JobError
from shoal.job.toml import parse

GROWING = "[data]\ngrow = true\norder = 'sequential'\n"
SERVER = GROWING + "[sync]\nname = 'server'\n"
STEADY = "[optim]\nschedule = 'constant'\nwarmup = 100\n"


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        (GROWING + STEADY, "data.grow with sync.name=allreduce: only workers of a parameter server", "--sync server"),
        (GROWING + "[sync]\nname = 'gossip'\n[train]\nsteps = 5\n", "data.grow with sync.name=gossip", "--sync server"),
        (SERVER, "no end by which optim.schedule=wsd could go", "--optim.schedule constant --optim.warmup 100"),
        (SERVER + "[optim]\nschedule = 'cosine'\n", "optim.schedule=cosine could go", "or train.steps"),
        (SERVER + "[optim]\nschedule = 'constant'\n", "optim.warmup=0.02 is a share of steps", "--optim.warmup 100"),
        (SERVER + STEADY + "[train]\nminutes = 5\n", "data.grow with train.minutes=5: without train.steps", "SIGTERM"),
    ],
)
def test_what_makes_no_sense_without_an_end_is_refused(text: str, what: str, fix: str):
    with pytest.raises(JobError) as caught:
        parse(text).validate()
    assert what in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "endless"),
    [
        (SERVER + STEADY, True),
        (SERVER + "[optim]\nschedule = 'constant'\nwarmup = 0\n", True),
        (SERVER + STEADY + "[server]\nmode = 'asp'\nlocal_steps = 4\n", True),
        # With a last step there is something for shares to be of.
        (SERVER + "[train]\nsteps = 1000\n", False),
        ("[train]\nminutes = 5\n", False),
    ],
)
def test_what_makes_sense_is_not(text: str, endless: bool):
    assert parse(text).validate().endless == endless
