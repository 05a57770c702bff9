"""The catalogue of accelerators (devices.toml): peak rates, memory, links, each with where its figures are from."""

from __future__ import annotations

import difflib
import functools
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from shoal.errors import JobError

# What a large product alone reaches of the peak, where nobody has published it: its maker's other devices' mean. Of
# TPUs none is published; their clock is fixed, and whole training steps reach 0.78 (MaxText's v5p page).
_MEASURED = {"NVIDIA": 0.80, "AMD": 0.58, "Intel/Habana": 0.85, "Google": 0.95}
_MEASURED_LOW = {"NVIDIA": 0.74, "Intel/Habana": 0.86}
_ELSE = 0.80

NEEDED = ("memory", "bandwidth", "peak", "link", "nic", "per_node", "units", "inside", "between")
HOW = "docs/clusters.md"


@dataclass(frozen=True)
class Device:
    """peak: dense FLOP/s by `bf16`, `fp16`, `fp8`, `fp32`. measured: share of the bf16 (fp16) and fp8 peak that a large
    product alone reaches; is_measured: published, and not its maker's mean. memory: bytes. bandwidth: of it, bytes/s.
    link, nic: one device's, in one direction, bytes/s, within its node and beyond; inside, between: kinds of these
    (links.toml). units: what tiles of a product are dealt to. mtbf: seconds between failures of one that stop a run,
    None where nobody published it. older: FLOP/s that attention reaches with kernels written for the generation before
    it, infinite where these are its own, or nothing is known. tray: as of `cluster.usual_node`."""

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
    inside: str
    between: str
    mtbf: float | None
    source: str
    older: float = math.inf
    tray: int = 0

    @property
    def peak_16(self) -> float:
        """Of 16-bit products; of fp32 ones on a device that has no others."""
        return self.peak.get("bf16") or self.peak.get("fp16") or self.peak["fp32"]

    @property
    def columns(self) -> dict[str, float]:
        """What `work.DEVICE` names, and per_node."""
        return {
            "peak": self.peak_16, "measured": self.measured["bf16"], "measured_low": self.measured["fp8"],
            "older": self.older,
            "memory": self.memory, "bandwidth": self.bandwidth, "link": self.link, "nic": self.nic,
            "units": float(self.units), "per_node": float(self.per_node),
        }  # fmt: skip


@functools.cache
def tables() -> Mapping[str, Mapping[str, Any]]:
    """The file's, by name; some lack NEEDED."""
    return tomllib.loads(files("shoal.planning").joinpath("devices.toml").read_text(encoding="utf-8"))


@functools.cache
def catalogue() -> Mapping[str, Device]:
    """All whole devices by name, in the order in which `published` looks through them."""
    return {name: of_table(name, table) for name, table in tables().items() if not missing(table)}


def missing(table: Mapping[str, Any]) -> list[str]:
    """Of NEEDED."""
    return [key for key in NEEDED if key not in table]


def of_table(name: str, table: Mapping[str, Any]) -> Device:
    """table: as in devices.toml, with all of NEEDED, and checked."""
    peak, told = table["peak"], table.get("measured", {})
    vendor = str(table["vendor"])
    usual = {"bf16": _MEASURED.get(vendor, _ELSE), "fp8": _MEASURED_LOW.get(vendor, _MEASURED.get(vendor, _ELSE))}

    return Device(
        name, str(table["title"]), vendor, {kind: 1e12 * rate for kind, rate in peak.items()}, {**usual, **told},
        "bf16" in told, table["memory"] * 2.0**30, table["bandwidth"] * 1e9, table["link"] * 1e9,
        table["nic"] * 1e9 / 8, table["per_node"], table["units"], table["inside"], table["between"],
        3600.0 * table["mtbf"] if "mtbf" in table else None, str(table["source"]),
        1e12 * table["older"] if "older" in table else math.inf, table.get("tray", 0),
    )  # fmt: skip


def device(name: str) -> Device:
    """Of the catalogue. JobError with the nearest names for another one, or with what a file has to say of it."""
    found = catalogue().get(name.lower())
    if found is None and name.lower() in tables():
        lacks = ", ".join(missing(tables()[name.lower()]))
        fix = f'say it in a cluster file: [device.NAME], like = "{name.lower()}"; see {HOW}; or `shoal calibrate` this '
        fix += "machine, and plan a job with --cluster here"
        raise JobError(f"the catalogue has no {lacks} of a {name.lower()}", fix=fix)
    if found is None:
        near = difflib.get_close_matches(name.lower(), catalogue(), n=3) or list(catalogue())
        what = f"no device is called {name!r}"
        raise JobError(what, fix=f"one of {', '.join(near)}; or describe it in a cluster file: {HOW}")
    return found


def published(text: str) -> Device | None:
    """The device that a published table names so, None where it is none of the catalogue."""
    return next((catalogue()[name] for name, called in _called().items() if called.search(text.lower())), None)


@functools.cache
def _called() -> Mapping[str, re.Pattern[str]]:
    return {name: re.compile(tables()[name]["called"]) for name in catalogue()}
