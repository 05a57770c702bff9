"""What if the cluster were another one: twice the devices, half the network, another device."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from shoal.errors import JobError
from shoal.job.check import nearest, positive, require
from shoal.planning import cluster, devices
from shoal.planning.cluster import Cluster, Link, Pool

_FIX = "e.g. devices=2x, devices=512, device=h200, network=0.5x, link=2x, memory=2x, price=2.50"


def changed(asked: Cluster, text: str) -> Cluster:
    """The cluster with what `text` says, e.g. `devices=2x,network=0.5x`: a factor of what it has, or a number in its
    place (devices: of each pool; price: of one device for an hour). `device` is done first, `price` last, so that their
    order in the text does not matter. JobError for what is unknown, absurd or leaves nodes half full."""
    wanted: dict[str, str] = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        key, equals, value = (word.strip() for word in part.partition("="))
        require(key in _CHANGES, f"what-if {key!r} is unknown", f"{nearest(key, _CHANGES)} {_FIX}")
        require(bool(equals and value), f"what-if {key} has no value", _FIX)
        require(key not in wanted, f"what-if {key} is given twice", "give it once")
        wanted[key] = value
    require(bool(wanted), "what-if says nothing", _FIX)
    for key, change in _CHANGES.items():
        if key in wanted:
            asked = change(asked, wanted[key])
    return replace(asked, name=f"{asked.name} with {', '.join(f'{key}={value}' for key, value in wanted.items())}")


def _number(key: str, text: str) -> tuple[float, bool]:
    """(the number, whether it is a factor)."""
    found = re.fullmatch(r"(-?\d+\.?\d*|-?\.\d+)\s*([x×]?)", text)
    if found is None:
        raise JobError(f"what-if {key}={text} is no number", fix=_FIX)
    positive(f"what-if {key}", float(found[1]))
    return float(found[1]), bool(found[2])


def _factor(key: str, text: str) -> float:
    number, factor = _number(key, text)
    require(factor, f"what-if {key}={text} is no factor", f"{key}={text}x: that many times what it is now")
    return number


def _each(asked: Cluster, change: Callable[[Pool], Pool]) -> Cluster:
    return replace(asked, pools=tuple(change(pool) for pool in asked.pools))


def _scaled(link: Link, factor: float) -> Link:
    return replace(link, bandwidth=link.bandwidth * factor)


def _device(asked: Cluster, name: str) -> Cluster:
    """Of all pools, in nodes, with links and failures as the catalogue says; its price nobody has told."""
    device = devices.device(name)
    return _each(asked, lambda pool: replace(cluster.usual(pool.name, device, pool.count), site=pool.site))


def _devices(asked: Cluster, text: str) -> Cluster:
    number, factor = _number("devices", text)

    def more(pool: Pool) -> Pool:
        count = pool.count * number if factor else number
        require(
            count == int(count), f"what-if devices={text} of {pool.count} is {count:g}", "a whole number of devices"
        )
        # A part of a node becomes nodes again as the device has them.
        usual = pool.device.per_node if pool.count == pool.per_node else pool.per_node
        each = cluster.nodes_of("what-if devices", int(count), None, usual, pool.device.tray)
        return replace(pool, count=int(count), per_node=each)

    return _each(asked, more)


def _network(asked: Cluster, text: str) -> Cluster:
    factor = _factor("network", text)
    found = _each(asked, lambda pool: replace(pool, between=_scaled(pool.between, factor)))
    return replace(found, across={sites: _scaled(link, factor) for sites, link in asked.across.items()})


def _link(asked: Cluster, text: str) -> Cluster:
    factor = _factor("link", text)
    return _each(asked, lambda pool: replace(pool, inside=_scaled(pool.inside, factor)))


def _memory(asked: Cluster, text: str) -> Cluster:
    factor = _factor("memory", text)
    return _each(asked, lambda pool: replace(pool, device=replace(pool.device, memory=pool.device.memory * factor)))


def _price(asked: Cluster, text: str) -> Cluster:
    number, factor = _number("price", text)
    told = all(pool.price is not None for pool in asked.pools)
    require(
        told or not factor, f"what-if price={text}: the cluster has no price", "price=2.50, of a device for an hour"
    )
    return _each(asked, lambda pool: replace(pool, price=number * (pool.price or 0.0) if factor else number))


# In the order in which they are made.
_CHANGES: Mapping[str, Callable[[Cluster, str], Cluster]] = {
    "device": _device, "devices": _devices, "network": _network, "link": _link, "memory": _memory, "price": _price,
}  # fmt: skip
