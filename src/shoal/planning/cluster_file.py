"""Cluster <- TOML (docs/clusters.md). What is unknown, absurd or does not fit is refused: file, line, field."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from shoal.errors import JobError
from shoal.job.check import at_least, fit, nearest, positive, require
from shoal.job.source import Source
from shoal.planning import cluster, devices
from shoal.planning.cluster import Cluster, Link, Pool
from shoal.planning.devices import Device

_RATES = {"GB/s": 1e9, "MB/s": 1e6, "Gbit/s": 1e9 / 8, "Mbit/s": 1e6 / 8}
_TIMES = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_SPANS = {"h": 3600.0, "days": 86400.0}
_POOL = ("device", "count", "per_node", "inside", "between", "site", "price", "mtbf")
# Of [device.NAME], in the units of devices.toml.
_NUMBERS, _WHOLE, _TEXTS = ("memory", "bandwidth", "link", "nic"), ("per_node", "units"), ("title", "vendor", "source")
_DEVICE = ("like", *_TEXTS, *_NUMBERS, *_WHOLE, "peak", "measured", "inside", "between")


def read(path: str | Path) -> Cluster:
    """JobError with file and line for whatever is wrong with it."""
    return parse(Source.read(path, "the cluster").text, str(path))


def parse(text: str, path: str = "<text>") -> Cluster:
    """The cluster in a TOML text; `path` is named in errors, and gives the name of one that has none."""
    source = Source(path, text)
    top = _Table(source, (), source.tables())
    if "machine" in top.values and "pool" not in top.values:
        fix = "shoal plan JOB.toml takes it; what clusters are: docs/clusters.md"
        raise JobError(
            "this is what `shoal calibrate` wrote of one machine, and no cluster", where=f"{path}:1", fix=fix
        )
    top.knows(("name", "pool", "device", "across"))
    own = {table.name: _device(table) for table in top.inner("device").tables()}
    pools = tuple(_pool(table, own) for table in top.inner("pool").tables())
    if not pools:
        raise JobError("the cluster has no pool", where=f"{path}:1", fix='[pool.NAME], device = "h100", count = 8')
    _check_sites(top, pools)
    name = top.text("name", Path(path).stem)
    return Cluster(name, pools, dict(_across(top, {pool.site for pool in pools})))


@dataclass(frozen=True)
class _Table:
    """A table of the file; keys: where it stands."""

    source: Source
    keys: tuple[str, ...]
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.keys[-1]

    def full(self, key: str) -> str:
        """`pool.north.count`"""
        return ".".join((*self.keys, key))

    def at(self, key: str) -> AbstractContextManager[None]:
        """Errors inside are of that key, or of the table where it has none."""
        return self.source.at(*self.keys, *([key] if key in self.values else []))

    def knows(self, known: Iterable[str]) -> None:
        names = [self.full(key) for key in known]
        for key in self.values:
            if (full := self.full(key)) not in names:
                where = self.source.where(*self.keys, key)
                raise JobError(f"unknown key '{full}'", where=where, fix=nearest(full, names))

    def inner(self, key: str) -> _Table:
        """A table in it, empty where there is none."""
        with self.at(key):
            value = self.values.get(key, {})
            what, head = f"'{self.full(key)}' is a table, not {value!r}", (*self.keys, key)
            # What stands in a file are [pool.NAME], [device.NAME] and [across.SITE.SITE].
            name = f"{head[0]}.NAME" if len(head) < 3 else ".".join(head)
            require(isinstance(value, dict), what, f"write [{name}] above its options")
        return _Table(self.source, (*self.keys, key), value)

    def tables(self) -> Iterator[_Table]:
        """All that is in it."""
        return (self.inner(name) for name in self.values)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """JobError where it is of another kind, or a whole number beyond all reason."""
        if key not in self.values:
            return default
        with self.at(key):
            value = fit(self.full(key), self.values[key], kind)
            too_many = kind is int and value > cluster.MOST
            require(not too_many, f"{self.full(key)} is more than {cluster.MOST}", "give a smaller number")
        return value

    def must(self, key: str, kind: type, example: str) -> Any:
        with self.at(key):
            name = ".".join(self.keys)
            require(key in self.values, f"{name} has no {key}", f"e.g. {key} = {example}")
        return self.get(key, kind)

    def text(self, key: str, default: str = "") -> str:
        return str(self.get(key, str, default))

    def number(self, key: str, whole: bool = False) -> float | None:
        """Above 0."""
        value = self.get(key, int if whole else float)
        if value is not None:
            with self.at(key):
                positive(self.full(key), value)
        return cast("float | None", value)

    def quantity(self, key: str, units: Mapping[str, float]) -> float | None:
        """A number above 0 with its unit, in text; in SI units."""
        if key not in self.values:
            return None
        value, found = self.values[key], None
        if isinstance(value, str):
            found = re.fullmatch(r"\s*([-+]?\d+\.?\d*(?:e[-+]?\d+)?)\s*([^\s\d]+)\s*", value)
        with self.at(key):
            if found is None or found[2] not in units:
                fix = f'e.g. "100 {next(iter(units))}"; units: {", ".join(units)}'
                raise JobError(f"{self.full(key)}={value!r} is no number with a unit", fix=fix)
            amount = float(found[1]) * units[found[2]]
            positive(self.full(key), amount)
        return amount


def _pool(table: _Table, own: Mapping[str, Device]) -> Pool:
    table.knows(_POOL)
    device = _which(table, own)
    count, per_node = table.must("count", int, "64"), table.get("per_node", int)
    with table.at("per_node" if _too_many(count, per_node) else "count"):
        each = cluster.nodes_of(".".join(table.keys), count, per_node, device.per_node, device.tray)
    price, mtbf = table.get("price", float), table.quantity("mtbf", _SPANS)
    if price is not None:
        with table.at("price"):
            at_least(table.full("price"), price, 0)
    return Pool(
        table.name, device, count, each, _link(table, "inside", device.inside, device.link),
        _link(table, "between", device.between, device.nic), table.text("site"), price, mtbf or device.mtbf,
    )  # fmt: skip


def _too_many(count: int, per_node: int | None) -> bool:
    """Whether it is the size of a node that is wrong."""
    return per_node is not None and count >= 1 and not 1 <= per_node <= count


def _which(table: _Table, own: Mapping[str, Device]) -> Device:
    name = table.must("device", str, '"h100"')
    if name in own:
        return own[name]
    with table.at("device"):
        fix = f"{nearest(name, [*own, *devices.catalogue()])} Or describe it: [device.{name}]; see {devices.HOW}"
        require(name.lower() in devices.tables(), f"no device is called {name!r}", fix)
        return devices.device(name)


def _link(table: _Table, key: str, kind: str, bandwidth: float | None) -> Link:
    """`"pcie"`, or a table of kind, bandwidth, latency. kind: where it says none; bandwidth: the usual one of that
    kind, None where there is none."""
    if isinstance(table.values.get(key), str):
        said, rate, latency = _kind(table, key, kind), None, None
    else:
        inner = table.inner(key)
        inner.knows(("kind", "bandwidth", "latency"))
        said = _kind(inner, "kind", kind)
        rate, latency = inner.quantity("bandwidth", _RATES), inner.quantity("latency", _TIMES)
    if rate is None and said == kind:
        rate = bandwidth
    if rate is None:
        with table.at(key):
            what = f"{table.full(key)} has no bandwidth, and none of {said} is in the catalogue"
            raise JobError(what, fix=f'{{ kind = "{said}", bandwidth = "100 Gbit/s" }}')
    return Link(said, rate, latency or cluster.latencies()[said])


def _kind(table: _Table, key: str, default: str) -> str:
    kind, known = table.text(key, default), cluster.latencies()
    with table.at(key):
        require(kind in known, f"{table.full(key)}={kind!r} is no kind of link", nearest(kind, known))
    return kind


def _device(table: _Table) -> Device:
    """[device.NAME]: over the one that it is like."""
    table.knows(_DEVICE)
    with table.source.at(*table.keys):
        what = f"{table.name} is in the catalogue"
        require(table.name.lower() not in devices.tables(), what, f'another name, like = "{table.name.lower()}"')
    like = table.text("like")
    with table.at("like"):
        what = f"{table.full('like')}={like!r}: no device is called so"
        require(not like or like in devices.tables(), what, nearest(like, devices.tables()))
    base: Mapping[str, Any] = devices.tables().get(like, {"inside": "pcie", "between": "ethernet"})
    changed: dict[str, Any] = {"title": table.name, "vendor": "", "source": table.source.path} | dict(base)
    changed |= {key: table.text(key) for key in _TEXTS if key in table.values}
    changed |= {key: table.number(key, key in _WHOLE) for key in (*_NUMBERS, *_WHOLE) if key in table.values}
    for key in ("inside", "between"):
        changed[key] = _kind(table, key, str(changed[key]))
    changed |= _rates(table)
    with table.source.at(*table.keys):
        lacks = devices.missing(changed)
        what, fix = f"{'.'.join(table.keys)} has no {', '.join(lacks)}", 'say it, or like = "a device of the catalogue"'
        require(not lacks, what, f"{fix}; `shoal doctor` measures a machine; see {devices.HOW}")
    return devices.of_table(table.name, changed)


def _rates(table: _Table) -> dict[str, dict[str, float]]:
    """peak and measured, where they are told."""
    found: dict[str, dict[str, float]] = {}
    for key, kinds in (("peak", ("bf16", "fp16", "fp8", "fp32")), ("measured", ("bf16", "fp8"))):
        if key not in table.values:
            continue
        inner = table.inner(key)
        inner.knows(kinds)
        found[key] = {kind: cast(float, inner.number(kind)) for kind in inner.values}
        with table.at(key):
            for kind, share in found[key].items():
                what = f"{inner.full(kind)}={share} is more than all of the peak"
                require(key == "peak" or share <= 1, what, "give a share, like 0.8")
            what, fix = f"{table.full(key)} has neither bf16, fp16 nor fp32", "peak = { bf16 = 312 }, in TFLOP/s"
            require(key != "peak" or bool({"bf16", "fp16", "fp32"} & {*found[key]}), what, fix)
    return found


def _check_sites(top: _Table, pools: tuple[Pool, ...]) -> None:
    """All pools have one, or none has."""
    if any(pool.site for pool in pools):
        for pool in pools:
            with top.source.at("pool", pool.name):
                require(bool(pool.site), f"pool.{pool.name} has no site, and others have", 'site = "NAME"')


def _across(top: _Table, sites: set[str]) -> Iterator[tuple[tuple[str, str], Link]]:
    """[across.SITE.SITE], one for each pair."""
    seen = set()
    for first in top.inner("across").tables():
        with first.source.at(*first.keys):
            require(first.name in sites, f"{first.full('')[:-1]}: no pool is at {first.name!r}", _known(sites))
        for table in first.tables():
            pair = cast("tuple[str, str]", tuple(sorted((first.name, table.name))))
            with table.source.at(*table.keys):
                name = ".".join(table.keys)
                require(table.name in sites, f"{name}: no pool is at {table.name!r}", _known(sites))
                require(first.name != table.name, f"{name} is a link of a site to itself", "name two sites")
                require(pair not in seen, f"{name}: this link is there twice", "say it once, in either order")
            seen.add(pair)
            yield pair, _link(first, table.name, "internet", None)
    for one, other in itertools.combinations(sorted(sites), 2):
        if (one, other) not in seen:
            with top.at("across"):
                fix = f'[across.{one}.{other}], bandwidth = "1 Gbit/s"'
                raise JobError(f"sites {one!r} and {other!r} have no link", fix=fix)


def _known(sites: set[str]) -> str:
    return f"known: {', '.join(sorted(sites))}" if sites != {""} else 'say where: site = "NAME" in [pool.NAME]'
