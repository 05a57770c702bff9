"""What goes wrong, said so that a user can act: what, where, what to do.

The user's mistakes raise a subclass of `ShoalError`; the command line prints it without a traceback and
exits with code 2. Programmer errors are asserts.
"""

from __future__ import annotations


class ShoalError(Exception):
    """A mistake that the user can mend.

    what: one sentence, what is wrong. where: file and line, rank, step or option. fix: what to do.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  → {self.fix}" if self.fix else text


class JobError(ShoalError):
    """An option that is unknown, of the wrong type, or out of range."""


class LayoutError(JobError):
    """A layout that cannot be built for this job."""


class DataError(ShoalError):
    """Text, tokenizer or token store that cannot be used."""


class ModelError(ShoalError):
    """A model folder or configuration that cannot be used."""


class CheckpointError(ShoalError):
    """A checkpoint that is missing, damaged or does not fit the model."""


class RankError(ShoalError):
    """A rank that failed, hung or was killed; `where` names the rank. Not the user's mistake: exit code 1."""

    exit_code = 1


class DivergedError(ShoalError):
    """Loss or gradient is NaN or inf; `where` names the step."""

    exit_code = 1
