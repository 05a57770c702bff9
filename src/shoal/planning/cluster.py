"""Clusters: pools of equal devices, the links inside and between their nodes, and those between sites.

What a description leaves out is the catalogue's (devices.toml, links.toml). Prices have no usual one: None.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from shoal.errors import JobError
from shoal.job.check import at_least, require
from shoal.planning import devices
from shoal.planning.devices import Device

MOST = 10_000_000
"""Devices of a pool, or of what else is counted."""


@dataclass(frozen=True)
class Link:
    """kind: of links.toml. bandwidth: bytes/s in one direction; inside and between nodes one device's share, between
    sites all of the line's. latency: seconds of a hop in one direction."""

    kind: str
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Pool:
    """count: devices, in full nodes of per_node. inside, between: a device's links to its node and beyond it. site:
    empty where the cluster has one alone. price: of a device for an hour, in whatever currency, None if not told.
    mtbf: seconds between failures of one device that stop a run, None if not known."""

    name: str
    device: Device
    count: int
    per_node: int
    inside: Link
    between: Link
    site: str = ""
    price: float | None = None
    mtbf: float | None = None

    @property
    def nodes(self) -> int:
        return self.count // self.per_node

    @property
    def columns(self) -> dict[str, float]:
        """What `work.DEVICE` names, and per_node, with the links that this pool has."""
        links = {"link": self.inside.bandwidth, "nic": self.between.bandwidth}
        return self.device.columns | links | {"per_node": float(self.per_node)}


@dataclass(frozen=True)
class Cluster:
    """across: links between sites, by the names of both in alphabetical order; all pairs of the pools' sites."""

    name: str
    pools: tuple[Pool, ...]
    across: Mapping[tuple[str, str], Link]

    @property
    def count(self) -> int:
        """Devices."""
        return sum(pool.count for pool in self.pools)

    @property
    def price(self) -> float | None:
        """Of all devices for an hour; None unless all pools' is told."""
        prices = [None if pool.price is None else pool.price * pool.count for pool in self.pools]
        return None if None in prices else sum(price for price in prices if price is not None)

    @property
    def mtbf(self) -> float | None:
        """Seconds between failures of any device (rates add up); None unless all pools' is known."""
        rates = [None if pool.mtbf is None else pool.count / pool.mtbf for pool in self.pools]
        return None if None in rates else 1 / sum(rate for rate in rates if rate is not None)

    def link(self, one: Pool, other: Pool) -> Link:
        """Between devices of two pools, or of two nodes of one pool. At one site: what the slower of both can do."""
        if one.site != other.site:
            first, second = sorted((one.site, other.site))
            return self.across[first, second]
        slow = min(one.between, other.between, key=lambda link: link.bandwidth)
        return Link(slow.kind, slow.bandwidth, max(one.between.latency, other.between.latency))


@functools.cache
def latencies() -> Mapping[str, float]:
    """Seconds of a hop by kind of link."""
    tables = tomllib.loads(files("shoal.planning").joinpath("links.toml").read_text(encoding="utf-8"))
    return {kind: float(table["latency"]) * 1e-6 for kind, table in tables.items()}


def nodes_of(name: str, count: int, per_node: int | None, usual: int, tray: int = 0) -> int:
    """Devices of a node: `usual_node` where it is None. JobError unless all nodes are full."""
    at_least(f"{name}.count", count, 1)
    require(count <= MOST, f"{name}.count={count} is more than {MOST}", f"give {MOST} or less")
    if per_node is not None:
        at_least(f"{name}.per_node", per_node, 1)
        fix = f"per_node = {count}, or a larger count"
        require(per_node <= count, f"{name}.per_node={per_node} is more than its {count} devices", fix)
    each = usual_node(count, usual, tray) if per_node is None else per_node
    full = count // each * each
    if count != full:
        fix = f"{full} or {full + each} devices, or another per_node"
        raise JobError(f"{name}.count={count} does not fill nodes of {each}", fix=fix)
    return each


def usual_node(count: int, usual: int, tray: int) -> int:
    """Devices of a node: all where they are fewer than usual. tray: of nodes that are racks, of which a job takes as
    many trays of each as it needs, 64 devices of 72, say; 0: always whole."""
    if tray and count > usual and count % usual:
        return max((each for each in range(tray, usual, tray) if count % each == 0), default=usual)
    return min(usual, count)


def usual(name: str, device: Device, count: int) -> Pool:
    """A pool with all that the catalogue says."""
    inside = Link(device.inside, device.link, latencies()[device.inside])
    between = Link(device.between, device.nic, latencies()[device.between])
    each = nodes_of(name, count, None, device.per_node, device.tray)
    return Pool(name, device, count, each, inside, between, mtbf=device.mtbf)


def named(text: str) -> Cluster:
    """`h100x16384`, or several at one site: `h100x64+a100-80x32`. JobError where it is none."""
    pools: dict[str, Pool] = {}
    for part in text.lower().split("+"):
        # rtx4090 is no device of that many.
        require(part.strip() not in devices.tables(), f"{text!r} does not say how many", f"{part.strip()}x8")
        found = re.fullmatch(r"\s*(\S+)x(\d{1,12})\s*", part)
        if found is None:
            fix = "DEVICExCOUNT, like h100x64, or h100x64+a100-80x32; or a cluster file (.toml)"
            raise JobError(f"{text!r} is no cluster", fix=fix)
        device = devices.device(found[1])
        require(device.name not in pools, f"{device.name} is twice in {text!r}", "add its counts")
        pools[device.name] = usual(device.name, device, int(found[2]))
    return Cluster(text.lower(), tuple(pools.values()), {})
