"""A question's answer as `shoal plan` gives it: plans that the job can have, or what would make one fit."""

from __future__ import annotations

import shutil
from dataclasses import replace

from shoal.errors import JobError
from shoal.job import Job
from shoal.planning import show, unfit, whatif
from shoal.planning.plan import Answer, Plan, Question
from shoal.planning.search import search

# Plans that are looked through for those that a job can have, for each that is wanted.
_SPARE = 5


def plans(question: Question, best: int, job: Job | None = None) -> Answer:
    """At most `best` of them, and one at least. JobError where no layout fits, with what would make one fit; or where
    the job's own options refuse all that do."""
    found = search(question, best=best * _SPARE if job else best)
    if not found.plans:
        raise unfit.refusal(question, found)
    if job is None:
        return found
    asked = replace(
        job,
        data=replace(job.data, sequence_length=question.sequence),
        train=replace(job.train, global_batch=question.global_batch),
    )
    refused = [_refused(asked, plan) for plan in found.plans]
    kept = tuple(plan for plan, error in zip(found.plans, refused, strict=True) if error is None)
    if not kept:
        assert refused[0] is not None
        raise JobError(f"the job refuses the layouts that fit: {refused[0].what}", fix=refused[0].fix)
    return replace(found, plans=kept[:best])


def _refused(job: Job, plan: Plan) -> JobError | None:
    """Why the job cannot have the layout."""
    try:
        replace(job, layout=plan.layout).validate()
    except JobError as error:
        return error
    return None


def instead(question: Question, change: str, best: int, job: Job | None = None) -> tuple[Question, Answer]:
    """The same batch on a changed cluster, and its plans."""
    try:
        other = replace(question, cluster=whatif.changed(question.cluster, change))
        return other, plans(other, best, job)
    except JobError as error:
        raise type(error)(error.what, where=error.where or f"--what-if {change}", fix=error.fix) from None


def text(question: Question, answer: Answer, explain: int) -> str:
    """The whole answer; of the first `explain` plans where time and memory go."""
    width = shutil.get_terminal_size((200, 24)).columns
    parts = [show.title(question), show.table(question, answer, width), show.remarks(question, answer)]
    parts += [show.explained(plan, number) for number, plan in enumerate(answer.plans[:explain], 1)]
    return "\n\n".join(parts)
