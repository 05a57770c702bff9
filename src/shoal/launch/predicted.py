"""What a step will take on this machine, as `shoal calibrate` has measured it: said before a run, kept beside it."""

from __future__ import annotations

from shoal.errors import ShoalError
from shoal.job import Job
from shoal.launch import elastic
from shoal.observe.units import short
from shoal.planning import entry, local


def step(job: Job, device: str) -> tuple[float | None, str]:
    """(seconds, a sentence). None where there is no prediction; the sentence then says why. It never fails a run.

    job: with its layout, and no `auto` left. device: what ranks compute on, as `shoal.device.name` has it.
    """
    path = entry.home()
    if not path.is_file():
        return None, "no prediction of a step: `shoal calibrate` measures this machine (a minute)"
    try:
        known = entry.read(path)
        if known.device != device:
            return None, f"no prediction of a step: {path} is of {known.device}; `shoal calibrate` measures this one"
        if not elastic.one_machine():
            return None, "no prediction of a step: it is known for the ranks of one machine"
        seconds = local.predict(job, known).seconds
    except ShoalError as error:
        return None, f"no prediction of a step: {error.what}"
    return seconds, f"a step: {short(seconds)} predicted, by what `shoal calibrate` measured on {known.date[:10]}"
