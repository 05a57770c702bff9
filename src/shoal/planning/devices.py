"""The catalogue of accelerators (devices.toml): peak rates, memory, links, each with where its figures are from."""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from shoal.errors import JobError

# What a large product alone reaches of the peak, where nobody has published it: its maker's other devices' mean.
_MEASURED = {"NVIDIA": 0.80, "AMD": 0.58, "Intel/Habana": 0.85}
_MEASURED_LOW = {"NVIDIA": 0.74, "Intel/Habana": 0.86}
_ELSE = 0.80


@dataclass(frozen=True)
class Device:
    """peak: dense FLOP/s by `bf16`, `fp16`, `fp8`. measured: share of the bf16 (fp16) and fp8 peak that a large product
    alone reaches; is_measured: published, and not its maker's mean. memory: bytes. bandwidth: of it, bytes/s. link,
    nic: one device's, in one direction, bytes/s, within its node and beyond. units: what tiles of a product are dealt
    to."""

    name: str
    title: str
    vendor: str
    peak: Mapping[str, float]
    measured: Mapping[str, float]
    is_measured: bool
    memory: float
    bandwidth: float
    link: float
    nic: float
    per_node: int
    units: int
    source: str

    @property
    def peak_16(self) -> float:
        """Of 16-bit products."""
        return self.peak.get("bf16") or self.peak["fp16"]


@functools.cache
def catalogue() -> Mapping[str, Device]:
    """All devices by name, in the order in which `published` looks through them."""
    tables = tomllib.loads(files("shoal.planning").joinpath("devices.toml").read_text(encoding="utf-8"))
    return {name: _device(name, table) for name, table in tables.items()}


def _device(name: str, table: Mapping[str, object]) -> Device:
    peak, told = table["peak"], table.get("measured", {})
    assert isinstance(peak, dict)
    assert isinstance(told, dict)
    vendor = str(table["vendor"])
    usual = {"bf16": _MEASURED.get(vendor, _ELSE), "fp8": _MEASURED_LOW.get(vendor, _MEASURED.get(vendor, _ELSE))}

    def number(key: str) -> float:
        value = table[key]
        assert isinstance(value, int | float)
        return float(value)

    return Device(
        name, str(table["title"]), vendor, {kind: 1e12 * rate for kind, rate in peak.items()}, {**usual, **told},
        "bf16" in told, number("memory") * 2**30, number("bandwidth") * 1e9, number("link") * 1e9,
        number("nic") * 1e9 / 8, int(number("per_node")), int(number("units")), str(table["source"]),
    )  # fmt: skip


def device(name: str) -> Device:
    """Of the catalogue. JobError with the nearest names for another one."""
    found = catalogue().get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), catalogue(), n=3) or list(catalogue())
        what = f"no device is called {name!r}"
        raise JobError(what, fix=f"one of {', '.join(near)}; or describe it in a cluster file: docs/planning.md")
    return found


def published(text: str) -> Device | None:
    """The device that a published table names so, None where it is none of the catalogue."""
    tables = _called()
    return next((catalogue()[name] for name, called in tables.items() if called.search(text.lower())), None)


@functools.cache
def _called() -> Mapping[str, re.Pattern[str]]:
    tables = tomllib.loads(files("shoal.planning").joinpath("devices.toml").read_text(encoding="utf-8"))
    return {name: re.compile(table["called"]) for name, table in tables.items()}
