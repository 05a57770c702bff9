"""The constants of the cost model that were fitted (constants.toml), and those that were not.

Few: shared curve constants in units that no device has, up to five of a device (what it reaches of its data sheet) and
three of a class of software. A device or a class of which no row was fitted has the priors.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from shoal.planning.work import Array, Names, Work

FILE = "constants.toml"
# Not determined by what is published, so from physics and NCCL's own tables, and never fitted. Power of the share of a
# wave's tiles that are useful; depth at which a product is half as fast as a deep one; seconds between two kernels; of
# a collective's call within a node, and of one hop between nodes (NCCL, src/graph/tuning.cc: ring, simple protocol).
WAVE, DEPTH, GAP, CALL, HOP = 0.8, 50.0, 2.5e-6, 14e-6, 9.6e-6

SHARED, DEVICE, STACK, MEMORY = "shared", "device", "stack", "memory"
_GROUPS = {
    DEVICE: {"rate": (1.0, 0.05), "low": (1.0, 0.05), "memory": (0.8, 0.15), "link": (0.75, 0.2), "nic": (0.8, 0.25)},
    STACK: {"host": (12e-6, 0.5), "fuse": (1.0, 0.3), "speed": (1.0, 0.07)},
}


class Constant(NamedTuple):
    """kind: SHARED, DEVICE or STACK; group: which device or class, empty of shared ones. prior, spread: what it is
    believed to be before any row, and the standard deviation of its logarithm. rows: that feel it."""

    kind: str
    group: str
    name: str
    prior: float
    spread: float
    value: float
    rows: int
    what: str = ""


class OfMemory(NamedTuple):
    """A constant of the memory model, without a prior. rows: that it was fitted on."""

    value: float
    rows: int
    what: str


@dataclass(frozen=True)
class Constants:
    """all: in the file's order."""

    all: tuple[Constant, ...]

    @property
    def logs(self) -> Array:
        return np.log([c.value for c in self.all])

    @property
    def priors(self) -> Array:
        return np.log([c.prior for c in self.all])

    @property
    def spreads(self) -> Array:
        return np.array([c.spread for c in self.all])

    def at(self, logs: Array) -> Constants:
        """The same with other values."""
        return Constants(tuple(c._replace(value=float(np.exp(x))) for c, x in zip(self.all, logs, strict=True)))

    def shared(self, name: str) -> float:
        return next(c.value for c in self.all if c.kind == SHARED and c.name == name)

    def of(self, kind: str, name: str, groups: Names) -> Array:
        """A device's or a class's constant for each candidate. groups: (n,) names."""
        known = {c.group: c.value for c in self.all if c.kind == kind and c.name == name}
        usual = _GROUPS[kind][name][0]
        names, where = np.unique(groups, return_inverse=True)
        return np.array([known.get(str(one), usual) for one in names], dtype=np.float64)[where]


def chip(device: str) -> str:
    """Whose constants a device has: of all that are called `h100-…` the same; of a die by another name that die's."""
    group = device.partition("-")[0]
    return _CHIPS.get(group, group)


# Of the same die, with other links (devices.toml says so).
_CHIPS = {"h800": "h100"}


@functools.cache
def load() -> Constants:
    """Those of time."""
    tables = _tables()
    found = [Constant(SHARED, "", name, **told) for name, told in tables[SHARED].items()]
    for kind in (DEVICE, STACK):
        for group, constants in tables[kind].items():
            found += [Constant(kind, group, name, **told) for name, told in constants.items()]
    return Constants(tuple(found))


@functools.cache
def memory() -> dict[str, OfMemory]:
    """Those of memory, two, by name: fragments, a factor of what is allocated; beside, GiB outside of the allocator."""
    return {name: OfMemory(**told) for name, told in _tables()[MEMORY].items()}


def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("shoal.planning").joinpath(FILE).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Rates:
    """What devices do under constants, (n,) each. product, product_low: FLOP/s of a large 16-bit and fp8 product.
    memory, link, nic: bytes/s. host: seconds to launch a kernel. fuse: bytes of element-wise operations, times what the
    stack's own factor says. speed: share of its rate that the software's products reach."""

    product: Array
    product_low: Array
    memory: Array
    link: Array
    nic: Array
    host: Array
    fuse: Array
    speed: Array

    @classmethod
    def of(cls, constants: Constants, work: Work) -> Rates:
        device = np.array([chip(name) for name in work.device])
        sustained = constants.shared("sustained")

        def share(name: str) -> Array:
            return constants.of(DEVICE, name, device)

        return cls(
            product=work.peak * work.measured * share("rate") * sustained,
            product_low=2 * work.peak * work.measured_low * share("low") * sustained,
            memory=work.bandwidth * share("memory"), link=work.link * share("link"), nic=work.nic * share("nic"),
            host=constants.of(STACK, "host", work.stack), fuse=constants.of(STACK, "fuse", work.stack) * work.fused,
            speed=constants.of(STACK, "speed", work.stack),
        )  # fmt: skip
