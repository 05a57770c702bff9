"""A planned layout as what `simulation` runs: seconds of each stage, of a message, and of what ends a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.errors import JobError
from shoal.job.check import require
from shoal.job.layout import Layout
from shoal.planning import candidates, constants, piped, spanning, step, syncs
from shoal.planning.asynchrony import Shared
from shoal.planning.plan import Plan, Question
from shoal.planning.search import SPARE, Space, Split
from shoal.planning.simulation import Scene
from shoal.planning.stages import SCHEDULE
from shoal.planning.timeline import Seconds


@dataclass(frozen=True)
class Staged:
    """A candidate, what is predicted of it, and the scene of its steps. fits: in memory, with a tenth to spare. shared:
    where its replicas are workers that do not wait for each other: of a push and a pull; they are not in the scene."""

    plan: Plan
    scene: Scene
    fits: bool
    shared: Shared | None = None


def staged(question: Question, layout: Layout, chunks: int = 0, along: Sequence[str] = ()) -> Staged:
    """Of a layout. Where it says no micro-batch, of the fastest one that fits. chunks: stages of a rank; 0 = as the
    layout says. along: of a pipeline through several pools their names in its order; else the best order. JobError
    where it is none that the question leaves open."""
    where, pipeline = question.cluster, layout.pipeline > 1
    _refuse(question)
    what = f"layout={layout} has {layout.world} ranks, and {where.name} has {where.count} devices"
    require(layout.world == where.count, what, f"degrees that multiply to {where.count}, or another --cluster")
    if len(where.pools) > 1:
        return _through(question, layout, along)
    chunks = (chunks or layout.stages_per_rank) if pipeline else 1
    space, whole = Space(question), replace(layout, stages="")
    sizes = [layout.micro_batch] if layout.micro_batch else candidates.divisors(question.global_batch)
    tried = [replace(whole, micro_batch=size) for size in sizes if size <= candidates.MICRO]
    found = [one for each in tried if (one := space.find(each, chunks)) is not None]
    if not found:
        raise _unknown(question, layout)
    (best,) = space.simulated([min(found, key=lambda one: (not _fits(space, one), one.seconds))])
    plan, shared = space.plan(best), _shared(space, best)
    return Staged(plan, _scene(space, best, plan, shared), _fits(space, best), shared)


def _through(question: Question, layout: Layout, along: Sequence[str]) -> Staged:
    """Of a pipeline through several pools."""
    what = f"layout={layout} has replicas in several pools, whose shares are not simulated"
    fix = "a pipeline through all pools (docs/planning.md), or one pool: h100x64"
    require(layout.pipeline > 1 and not layout.replica_share and layout.schedule == SCHEDULE, what, fix)
    require(syncs.plain(question), "another sync than all-reduce is not simulated on several pools", "--sync allreduce")
    one = spanning.find(question, layout, along)
    if one is None:
        raise _unknown(question, layout)
    plan, (forward, backward) = one.plan(), one.taken
    return Staged(plan, Scene(
        SCHEDULE, layout.pipeline, 1, one.batches, Seconds(forward, backward, 0 * forward),
        message=tuple(one.messages.tolist()), pipelines=layout.replicas * layout.fsdp,
        devices=layout.context * layout.tensor, exchange=plan.parts["data"], optimizer=plan.parts["optimizer"],
    ), one.fits)  # fmt: skip


def _unknown(question: Question, layout: Layout) -> JobError:
    return JobError(
        f"layout={layout} cannot be had by {question.shape.name} with {question.global_batch} sequences of "
        f"{question.sequence:,} tokens a step, or is none that is predicted",
        fix="one that `shoal plan` shows, or leave out --layout for the fastest; docs/layouts.md says what divides "
        "what, docs/planning.md what is predicted",
    )


def _refuse(question: Question) -> None:
    """JobError for syncs that are not simulated."""
    sync, server = question.sync.name, question.server
    fix = "allreduce, or server with bsp, asp or ssp; `shoal simulate --sync local --help`: replicas of a small job"
    require(sync not in ("local", "gossip"), f"sync={sync} is not simulated on a cluster", fix)
    if sync == "server":
        require(server.mode != "quorum", "mode=quorum is not simulated on a cluster", fix)
        what = f"server.max_staleness={server.max_staleness}: rejected gradients are not simulated on a cluster"
        require(server.max_staleness < 0, what, "max_staleness = -1")


def _fits(space: Space, one: Split) -> bool:
    return one.total * SPARE <= space.pool.device.memory


def _shared(space: Space, one: Split) -> Shared | None:
    sync, server = space.question.sync, space.question.server
    if sync.name != "server" or server.mode not in syncs.ASYNCHRONOUS:
        return None
    work, known = space.alone(one)
    turn = syncs.turn(work, known.rates, space.question)
    there, back, own_there, own_back = (
        float(part[0]) for part in (turn.there, turn.back, turn.own_there, turn.own_back)
    )
    return Shared(there, float(turn.added[0] + turn.updated[0]), back, own_there, own_back, float(turn.coded[0]))


def _scene(space: Space, one: Split, plan: Plan, shared: Shared | None) -> Scene:
    work, known = space.alone(one)
    layout = plan.layout
    passes = step.passes(work, constants.load(), known)
    synced = 0.0 if shared else plan.parts.get("sync", 0.0)
    return Scene(
        layout.schedule, layout.pipeline, plan.chunks, round(float(work.micro_batches[0])),
        Seconds(*(part[0] for part in piped.stages(space.question.shape, passes, layout.pipeline, plan.chunks))),
        message=float(step.message(work, known.rates)[0]) if layout.pipeline > 1 else 0.0,
        pipelines=layout.replicas * layout.fsdp, devices=layout.context * layout.tensor,
        exchange=plan.parts["data"] + synced, optimizer=plan.parts["optimizer"],
    )  # fmt: skip
