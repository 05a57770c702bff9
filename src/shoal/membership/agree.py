"""Survivors of a failure agree on who takes part from now on, through the store that outlives them."""

from __future__ import annotations

import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store

from shoal.errors import RankError
from shoal.mesh import Seat, View


def next_view(seat: Seat, view: View, grace: float = 10.0) -> View:
    """The view after `view`: all of its members that call this within `grace` seconds of the first one.

    grace: longer than a rank computes between two collectives, when it is deaf. Abandon the mesh first: a survivor
    that waits for data of this rank, not of the lost one, learns of the loss from the broken connection.
    The lowest member that called decides, once; a member that comes too late raises RankError and must leave.
    The store is assumed to live; who hosts it decides what failures that covers (launch: a process of its own).
    """
    number = view.number + 1
    store: Store = PrefixStore(f"agree-{number}", seat.store)
    store.set(f"here-{seat.member}", "")
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and not store.check(["members"]):
        if all(store.check([f"here-{member}"]) for member in view.members):
            break
        time.sleep(0.01)
    here = [member for member in view.members if store.check([f"here-{member}"])]
    if here[0] == seat.member:
        # compare_set: were two members to think themselves the lowest, the first one's word holds for both.
        store.compare_set("members", "", ",".join(map(str, here)))
    store.wait(["members"], timedelta(seconds=grace + 30))
    members = tuple(int(m) for m in store.get("members").decode().split(","))
    if seat.member not in members:
        raise RankError(
            f"the others went on without this rank as view {number}", where=f"rank {seat.member}",
            fix="it answered too late: look for what kept it busy",
        )  # fmt: skip
    return View(number, members)
