"""What a user reads when a run has ended: sample, loss beside compressors, speed, where everything is, what next."""

from __future__ import annotations

from pathlib import Path

from shoal.observe import commands
from shoal.observe.result import Result
from shoal.observe.screen import visible
from shoal.observe.units import counted, duration, number, percent, short


def lines(result: Result) -> list[str]:
    """The last lines of a run, ready to print."""
    out = _sample(result)
    if result.val_loss is not None:
        out.append(f"validation   {result.val_loss:.4f} nats per token{_bits(result)}")
    out.append(
        f"speed        {number(result.tokens_per_second)} tokens/s on {counted(result.devices, 'device')}"
        + (f", MFU {percent(result.mfu)}" if result.mfu is not None else "")
    )
    if result.predicted_step_seconds and result.step_seconds:
        measured, predicted = result.step_seconds, result.predicted_step_seconds
        expected = f"{short(predicted)} were predicted{off(predicted, measured)}"
        out.append(f"a step       {short(measured)} in the median; {expected}")
    if result.memory_gib:
        out.append(f"memory       {result.memory_gib:.2f} GiB at most, of the fullest rank{of_memory(result)}")
    # Steps and tokens are those of the whole run, the time is that of this start.
    done = f"{counted(result.steps, 'step')}, {counted(result.tokens, 'token')}"
    out.append(f"length       {done}; this command took {duration(result.seconds)}")
    if result.stopped_by:
        out.append(f"stopped      by {result.stopped_by}; {_kept(result)}")
    out.append(f"run folder   {result.run}")
    out.append(f"report       {Path(result.run) / 'report.html'}")
    # A comment of the shell's, so that the line can be copied as it is.
    more = "" if result.stopped_by else f" --steps {2 * result.steps}  # stretches the learning-rate schedule"
    out.append(f"resume       {commands.resume(result.run)}{more}")
    out.append(f"generate     {commands.generate(result.run, result.prompt or commands.PROMPT)}")
    return out


def of_memory(result: Result) -> str:
    """`; 0.87 GiB were predicted, 4 % less`, if they were."""
    predicted, measured = result.predicted_memory_gib, result.memory_gib
    return f"; {predicted:.2f} GiB were predicted{off(predicted, measured)}" if predicted and measured else ""


def off(predicted: float, measured: float) -> str:
    """`, 4 % less`; empty where they are the same to a percent."""
    share = round(100 * (predicted / measured - 1))
    return f", {abs(share)} % {'more' if share > 0 else 'less'}" if share else ""


def _kept(result: Result) -> str:
    if result.saved_step == result.steps:
        return "nothing is lost: resume as below"
    if result.saved_step is None:
        return "nothing could be saved: a resume begins again"
    return f"this state could not be saved: a resume goes on from step {result.saved_step:,}"


def _sample(result: Result) -> list[str]:
    if not result.sample:
        return []
    return ["", f"the model goes on from {result.prompt!r}:" if result.prompt else "the model writes:"] + [
        f"  │ {line}" for line in visible((result.prompt + result.sample).rstrip()).splitlines()
    ] + [""]  # fmt: skip


def _bits(result: Result) -> str:
    if result.bits_per_byte is None:
        return ""
    rivals = [
        f"{name} {bits:.3f}"
        for name, bits in (("gzip -9", result.gzip_bits_per_byte), ("xz -9", result.xz_bits_per_byte))
        if bits is not None
    ]
    beside = f" ({', '.join(rivals)} on the same text)" if rivals else ""
    return f" = {result.bits_per_byte:.3f} bits per byte{beside}"
