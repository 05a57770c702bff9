"""What a step will take, and how much memory, on this machine: said before a run, kept beside it."""

from __future__ import annotations

from shoal.errors import ShoalError
from shoal.job import Job
from shoal.launch import elastic
from shoal.observe.units import short
from shoal.planning import entry, kept, local


def of_run(job: Job, device: str, resident: float) -> tuple[dict[str, float], str]:
    """(figures by their names in result.json, a sentence). What is not predicted is in none. It never fails a run.

    job: with its layout, and no `auto` left. device: what ranks compute on, as `shoal.device.name` has it. resident:
    bytes of a rank's process before it has built anything, 0 where it computes elsewhere.
    """
    seconds, sentence = step(job, device)
    figures = {} if seconds is None else {"predicted_step_seconds": seconds}
    size = memory(job, resident)
    if size is not None:
        figures["predicted_memory_gib"] = size / 2**30
        sentence += f"; memory of the fullest rank: {size / 2**30:.2f} GiB predicted"
    return figures, sentence


def memory(job: Job, resident: float) -> float | None:
    """Bytes of the fullest rank; None where there is no prediction."""
    if not resident:
        return None
    try:
        return sum(kept.predict(job, resident).values())
    except ShoalError:
        return None


def step(job: Job, device: str) -> tuple[float | None, str]:
    """(seconds, a sentence). None where there is no prediction; the sentence then says why."""
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
