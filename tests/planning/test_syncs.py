"""What replicas exchange: against runs of workers and of fragments event by event, and against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
from shoal.planning import asked, cluster, codecs, constants, search, syncs
from shoal.planning.asked import Wanted
from shoal.planning.cluster import Cluster
from shoal.planning.constants import HOP, Rates
from shoal.planning.plan import Question
from shoal.planning.step import Step
from shoal.shard import Shard
from shoal.sync.fragment import Fragment
from shoal.sync.rounds import Rounds
from tests.planning.test_codecs import Moved

KNOWN = constants.load()


def asking(sync: SyncOptions, server: ServerOptions | None = None, devices: int = 8, where: str = "") -> Question:
    """Whole replicas, one on each device."""
    wanted = Wanted(sequence=1024, global_batch=64, sync=sync, server=server, replicas=devices)
    return asked.of_model("gpt2", cluster.named(where or f"h100x{devices}"), wanted)


def exchange(question: Question, seconds: float) -> tuple[float, float, Rates]:
    """(the part of what replicas exchange in a step that takes so long without, numbers of a rank, rates)."""
    space = search.Space(question)
    alone = [n for n in range(len(space.bases)) if space.bases.data[n] == question.replicas]
    work, known = space.work(np.array(alone[:1]), np.array([1]), np.array([3]))
    before = Step(np.array([seconds]), {"compute": np.array([seconds])})
    found = syncs.exchanged(before, work, KNOWN, known.rates, question)
    part = float(found.parts["sync"][0])
    assert float(found.seconds[0]) == pytest.approx(seconds + part)
    return part, float(syncs._way(work, known.rates, question).own[0]), known.rates


def test_on_the_way_there_and_back_each_number_is_written_once():
    """8 ranks, one to a node: each sends seven eighths there (under backward, in the step itself) and back."""
    question = asking(SyncOptions("allreduce", "int8", feedback=False), where="l4x8")
    assert question.cluster.pools[0].per_node == 1
    part, own, rates = exchange(question, 1.0)
    of = codecs.of("int8")
    back = 7 / 8 * own * of.size / float(rates.nic[0])
    coded = own * ((of.encode + of.decode) * (1 + 1 / 8) + 12 + 20) / float(rates.memory[0])
    assert part == pytest.approx(back + coded, rel=1e-3, abs=3 * HOP * 3 + constants.CALL)
    assert own == pytest.approx(question.shape.parameters, rel=0.02)
    # During backward too: the columns of a step.
    assert syncs.columns(question, np.array([8.0]))["sent"] == of.size
    assert syncs.columns(question, np.array([8.0]))["returned"] == 0


@pytest.mark.parametrize(("every", "fragments", "delay"), [(20, 1, 0), (20, 4, 0), (24, 3, 4), (24, 2, 1), (30, 3, 9)])
def test_local_steps_take_what_a_run_of_them_takes(every: int, fragments: int, delay: int):
    """Steps of equal length, and a line that carries each part's way there, and from its turn on the way back."""
    sync = SyncOptions("local", every=every, fragments=fragments, delay=delay)
    question = asking(sync, where="l4x8")
    _, own, rates = exchange(question, 1.0)
    way = 3.1  # seconds of a hop of all numbers
    hops = np.array([way])
    rest = own * (20 + 12 + 190) / float(rates.memory[0])
    one = syncs._Way(np.array([8.0]), np.array([own]), np.ones(1), hops, np.zeros(1), rates.memory[:1], rates.nic[:1])
    found = float(syncs._apart(one, np.array([0.4]), 0.0, question)[0]) - own * 190 / float(rates.memory[0]) / every
    assert found == pytest.approx(_waited(Rounds(every, fragments, delay), 0.4, way / fragments), rel=0.02, abs=1e-9)
    part = exchange(replace(question, sync=replace(sync, delay=0)), 0.4)[0]
    assert part * every > rest


def _waited(rounds: Rounds, seconds: float, hop: float, turns: int = 40) -> float:
    """Seconds a step beyond computing, in the mean of whole rounds after the first."""
    now, arrives, marks = 0.0, {}, []
    for step in range(1, rounds.every * turns + 1):
        now += seconds
        for part in rounds.starts(step):
            arrives[part] = now + hop
        for part in rounds.turns(step):
            if part in arrives:
                now = max(now, arrives[part])
                arrives[part] = now + hop
        for part in rounds.ends(step):
            if part in arrives:
                now = max(now, arrives.pop(part))
        if step % rounds.every == 0:
            marks.append(now)
    return (marks[-1] - marks[1]) / (rounds.every * (turns - 2)) - seconds


def test_an_outer_step_moves_what_its_operators_move():
    numbers = 2**16
    shard = Shard("layers.0.w", (numbers,), (0,), torch.randn(numbers))
    part = Fragment([shard], [], torch.device("cpu"))
    part.agree()
    with Moved() as moved:
        mean = part.moved()
        part.squares(mean)
        mean.div_(8)
        part.squares(mean)
        bool(mean.isfinite().all())
        part.step(mean, 0.7, 0.9)
        part.mix(0.0)
    assert moved.bytes / numbers == pytest.approx(syncs._OUTER, rel=0.03)


MODES = ("bsp", "asp")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seconds", [0.0005, 0.05, 4.0])
@pytest.mark.parametrize(("workers", "shards", "steps"), [(8, 1, 1), (8, 4, 1), (4, 1, 3), (1, 1, 1)])
def test_workers_take_what_a_run_of_them_takes(mode: str, seconds: float, workers: int, shards: int, steps: int):
    """Servers that do one thing at a time, in the order in which it comes: from one link, in memory, to one link."""
    server = ServerOptions(shards=shards, mode=mode, local_steps=steps)
    question = asking(SyncOptions("server"), server, devices=workers, where=f"l4x{workers}")
    found, own, rates = exchange(question, seconds)
    link = question.shape.parameters * 4 / shards / float(rates.nic[0])
    memory = question.shape.parameters / shards / syncs.SERVER_MEMORY
    own_way = own * 4 / float(rates.nic[0])
    if mode == "bsp":
        # All push at the same time, one update of all, all pull.
        push = max(own_way, workers * link)
        expected = (2 * push + memory * (12 * workers + 28 + 8) + 4 * HOP) / steps
        staleness = 0.0
    else:
        cycle, staleness = _asynchronous(workers, steps * seconds + 4 * HOP, own_way, link, memory * (12 + 28 + 8))
        expected = cycle / steps - seconds
    assert found + seconds == pytest.approx(expected + seconds, rel=0.01)
    assert syncs.staleness(question, workers) == pytest.approx(staleness, abs=0.35)


def _asynchronous(workers: int, computing: float, own: float, link: float, update: float) -> tuple[float, float]:
    """(seconds of a worker's cycle, updates between a pull and the push after it), in the mean."""
    free, ready = [0.0, 0.0, 0.0], [computing * (1 + n / workers) for n in range(workers)]
    version, pulled, late, ends = 0, [0] * workers, [], []
    queue = [(ready[n], 0, n) for n in range(workers)]
    takes = ((link, own), (update, 0.0), (link, own))
    while len(ends) < 300 * workers:
        queue.sort()
        at, stage, worker = queue.pop(0)
        start = max(at, free[stage])
        busy, least = takes[stage]
        free[stage] = start + busy
        end = start + max(busy, least)
        if stage == 1:
            late.append(version - pulled[worker])
            version += 1
            pulled[worker] = version
        if stage == 2:
            ends.append(end)
            queue.append((end + computing, 0, worker))
        else:
            queue.append((end, stage + 1, worker))
    half = 150 * workers
    return (ends[-1] - ends[half]) / (len(ends) - 1 - half) * workers, float(np.mean(late[half:]))


@pytest.mark.parametrize(("workers", "share"), [(1, 2 * 66 / 64 / 8), (2, 2 * 2 * 66 / 64 / 8), (4, 1.0), (8, 1.0)])
def test_a_codec_saves_less_with_many_asynchronous_workers(workers: int, share: float):
    """A pull has a step of the shadow for each update since: of 4 workers more bytes than all numbers. On a network
    that is all that they wait for: one for both ways, one after the other, several for the busier way."""
    where = _slower(f"l4x{workers}", 1e-4)
    taken = []
    for codec in ("int8", "none"):
        question = asking(SyncOptions("server", codec), ServerOptions(mode="asp"), workers)
        taken.append(exchange(replace(question, cluster=where), 1e-6)[0])
    assert taken[0] / taken[1] == pytest.approx(share, rel=0.02)


def _slower(name: str, factor: float) -> Cluster:
    """With another network between nodes."""
    found = cluster.named(name)
    pool = found.pools[0]
    between = replace(pool.between, bandwidth=factor * pool.between.bandwidth)
    return replace(found, pools=(replace(pool, between=between),))


def test_what_is_kept_beside_weights():
    """docs/local-steps.md, `Memory`: as much again twice, and of what is on its way three times its part."""
    eight = np.array([8.0])

    def kept(sync: SyncOptions, server: ServerOptions | None = None) -> float:
        return float(syncs.columns(asking(sync, server), eight)["synced"][0])

    assert kept(SyncOptions("local")) == 8 + 3 * 4
    assert kept(SyncOptions("local", fragments=4)) == 8 + 3 * 4 / 4
    coded = kept(SyncOptions("local", "bf16"))
    assert coded == 8 + 4 + 2 * 2 + 2 * 4 * (1 + 1 / 8)
    assert kept(SyncOptions("local", "bf16", feedback=False)) == 8 + 4 + 2 * 2
    # Workers have no moments, but where they take steps of their own.
    assert syncs.columns(asking(SyncOptions("server")), eight)["moments"] == 4
    assert syncs.columns(asking(SyncOptions("server"), ServerOptions(local_steps=5)), eight)["moments"] == 12


def test_one_replica_exchanges_nothing():
    for sync in (SyncOptions("allreduce", "int8"), SyncOptions("gossip"), SyncOptions("local", "int8")):
        part, own, rates = exchange(asking(sync, devices=1, where="h100x1"), 1.0)
        outer = 0.0 if sync.name == "allreduce" else own * (syncs._OUTER if sync.name == "local" else syncs._MET)
        assert part == pytest.approx(outer / float(rates.memory[0]) / (1 if sync.name == "allreduce" else 50))


def test_two_that_meet_send_weights_and_how_far_they_moved():
    part, own, rates = exchange(asking(SyncOptions("gossip", every=4), devices=2), 1.0)
    memory = own * syncs._MET / float(rates.memory[0])
    assert part == pytest.approx((own * 8 / float(rates.link[0]) + HOP + memory) / 4)


def test_slower_networks_want_fewer_exchanges():
    """On a network a thousandth as fast, local steps are several times as fast as all-reduce, and a codec helps it."""
    slow, taken = _slower("h100x16", 1e-3), {}
    for name, sync in {
        "plain": SyncOptions(), "int8": SyncOptions("allreduce", "int8"), "local": SyncOptions("local", every=500),
    }.items():  # fmt: skip
        wanted = Wanted(sequence=4096, global_batch=64, sync=sync, replicas=2)
        question = asked.of_model("llama3-8b", slow, wanted)
        plan = search.search(question, best=1).plans[0]
        assert plan.layout.replicas == 2
        assert sum(plan.parts.values()) == pytest.approx(plan.seconds)
        taken[name] = plan.seconds
    assert taken["int8"] < 0.5 * taken["plain"]
    assert taken["local"] < 0.6 * taken["int8"]
