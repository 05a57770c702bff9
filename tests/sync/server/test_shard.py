"""One copy of a server shard by hand: parts, order, once, levels of a pull."""

from __future__ import annotations

import pytest
import torch

from shoal.errors import JobError
from shoal.job.optim import OptimOptions
from shoal.sync.server import messages as m
from shoal.sync.server.effects import Keep, Send, Write
from shoal.sync.server.messages import Address, Key, Piece
from shoal.sync.server.node.shard_log import ShardLog
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.placement import Block
from shoal.sync.server.rules import Rules
from shoal.sync.server.shard import ServerShard

WORKER = Address("worker", 0, 1)
VALUES = {"a": torch.arange(12.0).reshape(6, 2), "s": torch.tensor(3.0)}
WHOLE = (Piece("a", (0, 0), (6, 2)), Piece("s", (), ()))


def shard(level: str = "snapshot", **options) -> ServerShard:
    held = blocks(VALUES, [Block("a", 0, 6), Block("s", 0, 1)])
    sgd = OptimOptions(name="sgd", momentum=0.0, weight_decay=0.0)
    return ServerShard(0, Parameters(held, Rules("asp"), sgd, 10), level=level, **options)


def said(effects) -> list:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def stage(server: ServerShard, key: Key, value: float = 1.0) -> list:
    tensors = (torch.full((6, 2), value), torch.tensor(value))
    return said(server.handle(WORKER, m.Stage(key, 0, 1, WHOLE), tensors, 0.0))


def apply(server: ServerShard, version: int, *keys: Key) -> list:
    return said(server.handle(m.COORDINATOR, m.Apply(version, keys, 1.0, 1.0, 0), (), 0.0))


def pull(server: ServerShard, version: int, pieces=None) -> tuple[list, tuple]:
    effects = server.handle(WORKER, m.Pull(Key(0, 0, 0), version, pieces), (), 0.0)
    return said(effects), effects[0].tensors if effects else ()


def keys(count: int) -> list[Key]:
    return [Key(0, 0, clock) for clock in range(count)]


def test_a_push_in_parts_is_staged_when_all_ranks_have_sent_theirs():
    server, key = shard(), Key(0, 0, 0)
    rows = [(Piece("a", (0, 0), (6, 1)),), (Piece("a", (0, 1), (6, 1)), Piece("s", (), ()))]
    first, second = torch.full((6, 1), 2.0), (torch.full((6, 1), 3.0), torch.tensor(5.0))
    assert said(server.handle(WORKER, m.Stage(key, 0, 2, rows[0]), (first,), 0.0)) == []
    assert said(server.handle(WORKER, m.Stage(key, 0, 2, rows[0]), (first,), 0.0)) == []
    (staged,) = said(server.handle(WORKER, m.Stage(key, 1, 2, rows[1]), second, 0.0))
    assert [(s.name, s.value) for s in staged.squares] == [("a", pytest.approx(6 * 4 + 6 * 9)), ("s", 25.0)]
    apply(server, 1, key)
    assert torch.equal(server.held.live()[0], VALUES["a"] - torch.tensor([2.0, 3.0]))


def test_commits_are_applied_in_order_and_once():
    server, (one, two, three) = shard(), keys(3)
    for key, value in ((one, 1.0), (two, 10.0), (three, 100.0)):
        stage(server, key, value)
    assert apply(server, 3, three) == [m.Applied(0, 0, 0)]
    assert apply(server, 1, one) == [m.Applied(0, 0, 1)]
    assert apply(server, 1, one) == [m.Applied(0, 0, 1)]
    assert apply(server, 2, two) == [m.Applied(0, 0, 3)]
    assert torch.equal(server.held.live()[1], torch.tensor(3.0 - 111.0))
    assert stage(server, two, 10.0) == []
    assert not server.staged


def test_a_snapshot_is_of_the_latest_version_or_the_one_before():
    server, (one, two) = shard(), keys(2)
    answers, start = pull(server, 0)
    assert answers == [m.Pulled(Key(0, 0, 0), 0, 0, WHOLE)]
    stage(server, one)
    stage(server, two)
    assert pull(server, 1)[0] == []
    assert apply(server, 1, one)[1] == m.Pulled(Key(0, 0, 0), 0, 1, WHOLE)
    assert torch.equal(pull(server, 0)[1][0], VALUES["a"])
    apply(server, 2, two)
    assert pull(server, 0)[0] == [m.Gone(Key(0, 0, 0), 0, 0, 2)]
    assert torch.equal(pull(server, 1)[1][0], VALUES["a"] - 1)
    assert torch.equal(start[0], VALUES["a"]), "what is being sent does not change"


def test_levels_shard_and_hogwild_give_what_is_there():
    for level in ("shard", "hogwild"):
        server, (one, two) = shard(level), keys(2)
        stage(server, one)
        stage(server, two)
        apply(server, 1, one)
        answers, tensors = pull(server, 0)
        assert answers[0].version == 1
        apply(server, 2, two)
        torn = level == "hogwild"
        assert torch.equal(tensors[0], VALUES["a"] - (2 if torn else 1))


def test_a_pull_of_some_pieces():
    server = shard()
    _, (column,) = pull(server, 0, (Piece("a", (2, 1), (3, 1)),))
    assert column.tolist() == [[5.0], [7.0], [9.0]]
    with pytest.raises(JobError, match="a \\[4, 0\\] \\+ \\[3, 2\\] is not on this shard"):
        pull(server, 0, (Piece("a", (4, 0), (3, 2)),))


NO_PIECES = [
    Piece("b", (0, 0), (6, 2)), Piece("a", (0,), (6,)), Piece("a", (0, 0), (6,)), Piece("a", (0, 0), (-1, 2)),
    Piece("s", (0,), (1,)),
]  # fmt: skip


@pytest.mark.parametrize("piece", NO_PIECES)
def test_pieces_that_are_none_are_refused_and_change_nothing(piece):
    """Nor is anything passed on to other copies, or staged: neither the piece before it."""
    server, before = shard(others=(1,)), VALUES["a"].clone()
    with pytest.raises(JobError, match="is not on this shard"):
        pull(server, 0, (piece,))
    with pytest.raises(JobError, match="is not on this shard"):
        server.handle(WORKER, m.Stage(Key(0, 0, 0), 0, 1, (WHOLE[0], piece)), (torch.ones(6, 2), torch.ones(1)), 0.0)
    assert not server.staged
    assert server.tick(1e9) == []
    assert torch.equal(server.held.live()[0], before)


def test_bytes_are_in_the_log_before_they_are_called_staged_and_come_back_from_it():
    server, key = shard(logged=True), Key(0, 0, 0)
    tensors = (torch.ones(6, 2), torch.tensor(1.0))
    effects = server.handle(WORKER, m.Stage(key, 0, 1, WHOLE), tensors, 0.0)
    assert [type(effect) for effect in effects] == [Write, Send]
    assert effects[0].durable
    back = shard(logged=True)
    back.recover([(effects[0].what, effects[0].tensors)])
    assert said(back.hello()) == [m.Hello(0, 0, 0)]
    apply(back, 1, key)
    assert torch.equal(back.held.live()[0], VALUES["a"] - 1)


def test_the_first_copy_passes_on_what_is_pushed_and_a_clone_ends_up_the_same():
    server, key = shard(others=(1,)), Key(0, 0, 0)
    tensors = (torch.ones(6, 2), torch.tensor(1.0))
    effects = server.handle(WORKER, m.Stage(key, 0, 1, WHOLE), tensors, 0.0)
    assert (effects[0].to, effects[0].message.forwarded) == (Address("shard", 0, 1), True)
    clone = server.clone(1)
    assert said(clone.handle(server.address, effects[0].message, effects[0].tensors, 0.0))[0].copy == 1
    for copy in (server, clone):
        apply(copy, 1, key)
    assert all(torch.equal(a, b) for a, b in zip(server.held.live(), clone.held.live(), strict=True))
    assert server.held.live()[0].data_ptr() != clone.held.live()[0].data_ptr()


def dc(**options) -> ServerShard:
    """Of a job that compensates delays, λ = ½."""
    held = blocks(VALUES, [Block("a", 0, 6), Block("s", 0, 1)])
    sgd = OptimOptions(name="sgd", momentum=0.9, weight_decay=0.0)
    rules = Rules("asp", compensation="dc", strength=0.5)
    return ServerShard(0, Parameters(held, rules, sgd, 10), logged=True, backups=True, **options)


def commit(server: ServerShard, version: int, key: Key, late: int, holders: tuple[int, ...] = ()) -> None:
    server.handle(m.COORDINATOR, m.Apply(version, (key,), 0.5, 0.1, late, holders), (), 0.0)
    assert server.version == version


def test_delays_are_compensated_from_what_each_worker_pulled():
    """Worker 0 pulled version 0, worker 1 version 1; worker 2 is never late."""
    server = dc()
    pulled = [server.held.live()[1].clone()]
    stage(server, Key(2, 0, 0), 1.0)
    commit(server, 1, Key(2, 0, 0), 0, holders=(0,))
    pulled.append(server.held.live()[1].clone())
    stage(server, Key(2, 0, 1), 2.0)
    commit(server, 2, Key(2, 0, 1), 0, holders=(1,))
    momentum = torch.tensor(0.9 * 0.5 + 1.0)
    for version, worker in ((3, 0), (4, 1)):
        value = server.held.live()[1].clone()
        stage(server, Key(worker, 0, 0), 3.0)
        commit(server, version, Key(worker, 0, 0), 2)
        momentum = 0.9 * momentum + 1.5 + 0.5 * 1.5**2 * (value - pulled[worker])
        torch.testing.assert_close(server.held.live()[1], value - 0.1 * momentum)


def test_a_crash_after_a_checkpoint_does_not_stop_the_compensation(tmp_path):
    """The commit by which a worker's weights were kept is in the checkpoint, its gradient comes later."""
    live, back, log = dc(), dc(), ShardLog(tmp_path, torch.float32)
    stage(live, Key(1, 0, 0), 1.0)
    commit(live, 1, Key(1, 0, 0), 0, holders=(0,))
    (keep,) = live.handle(m.COORDINATOR, m.Save(1, b""), (), 0.0)
    assert keep == Keep(1, b"")
    _, values, tensors = live.held.whole()
    log.turn(1)
    for message, carried in live.carried():
        log.append(message, carried, durable=True)
    for worker in (0, 1):
        push = m.Stage(Key(worker, 0, 1), 0, 1, WHOLE)
        write, _ = live.handle(WORKER, push, (torch.full((6, 2), 3.0), torch.tensor(3.0)), 0.0)
        log.append(write.what, write.tensors, write.durable)
    back.held.fill(values, tensors)
    back.version = 1
    back.recover(log.read(1))
    log.close()
    for server in (live, back):
        commit(server, 2, Key(1, 0, 1), 0)
        commit(server, 3, Key(0, 0, 1), 2)
    assert all(torch.equal(a, b) for a, b in zip(live.held.live(), back.held.live(), strict=True))
    stage(back, Key(0, 0, 2))
    with pytest.raises(AssertionError, match="nothing to measure a stale gradient from"):
        commit(back, 4, Key(0, 0, 2), 1)


def test_what_is_saved_is_of_the_version_that_was_asked_for():
    """Commits that were waiting for bytes come all at once."""
    server, (one, two) = shard(), keys(2)
    server.handle(m.COORDINATOR, m.Save(1, b"values"), (), 0.0)
    stage(server, two)
    apply(server, 2, two)
    stage(server, one)
    effects = server.handle(m.COORDINATOR, m.Apply(1, (one,), 1.0, 1.0, 0), (), 0.0)
    assert effects[0] == Keep(1, b"values")
    assert said(effects) == [m.Applied(0, 0, 1)]
    assert torch.equal(server.held.live()[0], VALUES["a"] - 1)
    assert apply(server, 2, two) == [m.Applied(0, 0, 2)]


def test_what_is_staged_is_said_again_until_it_is_dropped_and_halves_do_not_pile_up():
    server, (one, two) = shard(retry=1.0), keys(2)
    stage(server, one)
    assert server.tick(0.5) == []
    assert [type(message) for message in said(server.tick(1.0))] == [m.Staged]
    server.handle(m.COORDINATOR, m.Drop((one,)), (), 1.0)
    assert server.tick(9.0) == []
    half = (Piece("s", (), ()),)
    for key in (one, two):
        server.handle(WORKER, m.Stage(key, 0, 2, half), (torch.tensor(1.0),), 0.0)
    assert list(server.staged) == [two]


def test_the_state_of_a_shard_is_its_weights_and_its_optimizer():
    adamw = OptimOptions(name="adamw")
    one, two = (Parameters(blocks(VALUES, [Block("a", 0, 6)]), Rules(), adamw, 10) for _ in range(2))
    order = m.Apply(1, (Key(0, 0, 0),), 1.0, 0.1, 0)
    one.apply([torch.ones(6, 2)], order, None)
    for mine, theirs in zip(two.state().shards, one.state().shards, strict=True):
        mine.local.copy_(theirs.local)
    two.restored(one.state())
    for held in (one, two):
        held.apply([torch.full((6, 2), 0.3)], order, None)
    assert torch.equal(one.live()[0], two.live()[0])
    assert two.lr == 0.1


def test_what_some_ranks_have_sent_goes_on_where_the_log_begins_anew_and_in_a_new_copy():
    """A segment that held their part may be gone before the push is applied."""
    key = Key(0, 0, 0)
    rows = [(Piece("a", (0, 0), (6, 1)),), (Piece("a", (0, 1), (6, 1)),), (Piece("s", (), ()),)]
    parts = [(torch.full((6, 1), 2.0),), (torch.full((6, 1), 3.0),), (torch.tensor(5.0),)]
    old, back, new = shard(), shard(), shard(copy=1)
    for part in (0, 2):
        old.handle(WORKER, m.Stage(key, part, 3, rows[part]), parts[part], 0.0)
    carried = [(told, [tensor.clone() for tensor in tensors]) for told, tensors in old.unapplied()]
    back.recover(carried)
    whole, *staged = old.give(1)
    new.take(whole.message, whole.tensors)
    assert new.filled, "half a push can be of no commit"
    for effect in staged:
        new.handle(old.address, effect.message, effect.tensors, 0.0)
    for server in (back, new):
        (told,) = said(server.handle(WORKER, m.Stage(key, 1, 3, rows[1], True), parts[1], 0.0))
        assert [(s.name, s.value) for s in told.squares] == [("a", pytest.approx(6 * 4 + 6 * 9)), ("s", 25.0)]
        apply(server, 1, key)
        assert torch.equal(server.held.live()[0], VALUES["a"] - torch.tensor([2.0, 3.0]))


def test_a_new_copy_is_filled_when_it_has_what_may_be_committed_already():
    old, new = shard(), shard(copy=1)
    stage(old, Key(0, 0, 0))
    whole, staged = old.give(1)
    assert not new.filled
    new.take(whole.message, whole.tensors)
    assert not new.filled
    new.handle(old.address, staged.message, staged.tensors, 0.0)
    assert new.filled


def test_what_is_on_its_way_to_a_new_copy_stays_as_it_was_pushed():
    """It is committed meanwhile, with two other copies: an update is made where the gradient lies."""
    server = shard()
    stage(server, Key(0, 0, 0), 2.0)
    _, sent = server.give(1)
    ((_, logged),) = server.carried()
    server.handle(m.COORDINATOR, m.Apply(1, (Key(0, 0, 0),), 0.5, 1.0, 0), (), 0.0)
    assert torch.equal(server.held.live()[0], VALUES["a"] - 1.0)
    for tensors in (sent.tensors, logged):
        assert torch.equal(tensors[0], torch.full((6, 2), 2.0))


def test_a_copy_that_is_being_filled_is_passed_what_comes_until_it_is_gone():
    server = shard(others=())
    server.give(2)
    server.handle(m.COORDINATOR, m.Copies(1, (0,)), (), 0.0)
    assert server.others == (2,), "who repeats what there is does not know of it yet"
    server.handle(m.COORDINATOR, m.Copies(2, (0, 2)), (), 0.0)
    server.handle(m.COORDINATOR, m.Copies(3, (0,)), (), 0.0)
    assert server.others == (), "it was one, and is not any more"
    server.give(4)
    server.lost(Address("shard", 0, 4))
    assert server.others == ()


def test_a_copy_that_never_got_what_it_is_to_add_up_is_stuck():
    """The worker that pushed it may be gone; another copy has it."""
    server, (one, two) = shard(), keys(2)
    stage(server, one)
    assert said(server.handle(m.COORDINATOR, m.Combine(1, (one, two)), (), 0.0)) == []
    assert server.stuck
    stage(server, two)
    assert not server.stuck
    server.handle(m.COORDINATOR, m.Combine(1, (two, Key(7, 0, 0))), (), 0.0)
    assert server.stuck
    apply(server, 1, one)
    assert not server.stuck, "it was another round that came to be"


def test_a_refusal_of_what_was_said_long_ago_is_none():
    server, key = shard(), Key(0, 0, 0)
    stage(server, key)
    apply(server, 1, key)
    server.handle(m.COORDINATOR, m.Refused(0, "too old", ""), (), 0.0)
    assert server.refused is None
    server.handle(m.COORDINATOR, m.Refused(1, "too old", ""), (), 0.0)
    assert server.refused is not None


def test_a_copy_that_never_got_what_it_is_to_apply_is_stuck():
    server = shard()
    assert not server.stuck
    apply(server, 1, Key(0, 0, 0))
    assert server.stuck
    stage(server, Key(0, 0, 0))
    apply(server, 1, Key(0, 0, 0))
    assert not server.stuck
    assert server.version == 1
