"""`shoal doctor`: finds out what this machine is and how fast, within seconds, whatever is broken on it."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.launch.cores import cores
from shoal.launch.pool import Pool
from shoal.observe import machine
from shoal.observe.diagnosis import Device, Diagnosis, Finding, Link, judge

if TYPE_CHECKING:
    from shoal.mesh import Seat

T = TypeVar("T")

# Seconds for the peaks of all devices together; for a name to resolve; to end ranks that hang.
_PEAKS, _RESOLVE, _END = 2.0, 2.0, 4.0
_LARGE = 64 * 2**20
_ENTRY = "shoal.launch.doctor:measure_link"


def diagnose(budget: float = 15.0) -> Diagnosis:
    """Looks at everything, for at most `budget` seconds. Never raises: a check that fails is a finding."""
    begin = time.monotonic()
    facts = Diagnosis()
    failed: list[Finding] = []

    def attempt(what: str, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            failed.append(
                Finding(f"{what} could not be found out: {reason[:300]}", "see the message; then run doctor again")
            )
            return None

    facts.load = attempt("the load", lambda: os.getloadavg()[0])
    with Pool(2) as pool:
        # Their imports take seconds, and go on while we look and import.
        attempt("the start of ranks", pool.start)
        facts.host_resolves = attempt("whether this machine's name resolves", _host_resolves)
        _look(facts, attempt)
        facts.devices = attempt("the devices", lambda: _devices(facts, failed)) or []
        left = budget - _END - _PEAKS - (time.monotonic() - begin)
        facts.link = attempt("the link between two ranks", lambda: _link(facts, pool, left))
    attempt("the devices' speed", lambda: _measure_peaks(facts))
    facts.findings = [*judge(facts), *failed]
    facts.seconds = time.monotonic() - begin
    return facts


def _look(facts: Diagnosis, attempt: Callable[[str, Callable[[], Any]], Any]) -> None:
    """What needs no measurement."""
    facts.versions = attempt("versions", machine.versions) or {}
    facts.system = attempt("the system", machine.system)
    facts.cores = attempt("the cores", cores)
    facts.core_limit = attempt("the container's limit", machine.core_limit)
    facts.memory, facts.memory_available = attempt("memory", machine.memory) or (None, None)
    facts.disk_free = attempt("disk space", lambda: shutil.disk_usage(os.getcwd()).free)
    _, facts.shared_memory_free = attempt("shared memory", machine.shared_memory) or (None, None)
    facts.open_files = attempt("the limit of open files", lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    facts.compiler = attempt("the compiler", machine.compiler)


def _host_resolves() -> bool:
    """A name server that does not answer would keep us far longer than we have."""
    resolved = threading.Event()

    def ask() -> None:
        try:
            socket.getaddrinfo(machine.host(), None)
        except (OSError, UnicodeError):
            return
        resolved.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_RESOLVE)
    return resolved.is_set()


def _devices(facts: Diagnosis, failed: list[Finding]) -> list[Device]:
    # Torch takes seconds to import, and may be what is broken.
    from shoal import device

    facts.computes_on = device.kind()
    misfit = device.misfit()
    if misfit:
        failed.append(Finding(*misfit))
    return [Device(device.name(device.of_rank(i))) for i in range(device.count())]


def _measure_peaks(facts: Diagnosis) -> None:
    """Last, when nothing of ours computes beside it."""
    from shoal import device
    from shoal.observe.peak import matmul_peak

    share = _PEAKS / max(1, len(facts.devices)) / 2
    for i, found in enumerate(facts.devices):
        where = device.of_rank(i)
        facts.devices[i] = Device(found.name, {p: matmul_peak(where, p, share) for p in ("fp32", "bf16")})


def _link(facts: Diagnosis, pool: Pool, seconds: float) -> Link | None:
    """Measured between two ranks; None on a machine with a single GPU, where no two ranks have one each."""
    if facts.computes_on not in (None, "cpu") and len(facts.devices) < 2:
        return None
    values = pool.run(_ENTRY, 2, timeout=max(1.0, seconds))
    reachable = sorted({address for value in values for address in value["listening"]})
    return Link(values[0]["latency"], values[0]["bandwidth"], reachable)


def measure_link(seat: Seat) -> dict[str, Any]:
    """What one of two ranks finds: all-reduces of 4 B (median of 100) and of 64 MiB (best of 4)."""
    import torch
    import torch.distributed as dist

    from shoal import device, mesh
    from shoal.job import Layout

    ranks = mesh.build(Layout(replicas=seat.world), seat, timeout=10)

    def seconds(count: int, repeat: int) -> list[float]:
        tensor = torch.zeros(count, device=ranks.device)
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            dist.all_reduce(tensor)
            device.synchronize(ranks.device)
            times.append(time.perf_counter() - start)
        return sorted(times)

    seconds(1, 10)
    latency = seconds(1, 100)[50]
    bandwidth = _LARGE / seconds(_LARGE // 4, 4)[0]
    reachable = [address for address in machine.listening() if not machine.is_loopback(address)]
    ranks.close()
    return {"latency": latency, "bandwidth": bandwidth, "listening": reachable}
