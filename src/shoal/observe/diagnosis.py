"""What was found out about a machine, and what of it is wrong and what to do. Judges; measures nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table

from shoal.observe.text import plain
from shoal.observe.units import UNKNOWN, short, si, size

# The releases that shoal is developed with (constraints.txt), and the oldest that has what it uses.
TESTED_TORCH, OLDEST_TORCH = (2, 13), (2, 11)

_GIB = 2**30
_LITTLE_MEMORY, _LITTLE_DISK, _LITTLE_SHARED = 2 * _GIB, 2 * _GIB, _GIB // 2
_FEW_FILES = 1024
# Two idle ranks of one machine answer each other in 20 to 200 µs.
_SLOW_LINK = 2e-3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a sentence, and what to do."""

    what: str
    fix: str


@dataclass(frozen=True)
class Device:
    """What ranks compute on."""

    name: str
    peaks: dict[str, float] = field(default_factory=dict)
    """FLOP/s in matrix products, by precision; empty where not measured."""


@dataclass(frozen=True)
class Link:
    """Between two ranks of this machine, by all-reduce."""

    latency: float
    """Seconds for 4 bytes."""
    bandwidth: float
    """Bytes per second for 64 MiB: the tensor's bytes by the time of an all-reduce."""
    listening: list[str]
    """Addresses that other machines can reach, on which ranks waited for connections."""


@dataclass
class Diagnosis:
    """Facts about this machine, None where one could not be found out; `str()` of it is what people see."""

    versions: dict[str, str] = field(default_factory=dict)
    system: str | None = None
    cores: int | None = None
    """That this process may use."""
    core_limit: float | None = None
    """Cores' worth of time that the container gets, where it is limited."""
    load: float | None = None
    """Processes that wanted a core in the last minute, before we began."""
    memory: int | None = None
    memory_available: int | None = None
    disk_free: int | None = None
    """Bytes, in the working directory."""
    shared_memory_free: int | None = None
    """Bytes, in /dev/shm."""
    open_files: int | None = None
    """That one process may have."""
    compiler: str | None = None
    host_resolves: bool | None = None
    computes_on: str | None = None
    """`cpu`, or the kind of GPU."""
    devices: list[Device] = field(default_factory=list)
    link: Link | None = None
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    """That it took to find all this out."""

    def __str__(self) -> str:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in _rows(self):
            table.add_row(*row)
        lines = [plain(table), ""]
        for finding in self.findings:
            lines += [f"! {finding.what}", f"  → {finding.fix}"]
        return "\n".join(lines if self.findings else [*lines, "Nothing is wrong."])


def judge(facts: Diagnosis) -> list[Finding]:
    """Everything that is wrong with these facts, what matters most first."""
    found = [*_software(facts), *_machine(facts), *_speed(facts)]
    return [Finding(what, fix) for what, fix in found]


def _software(facts: Diagnosis) -> list[tuple[str, str]]:
    found = []
    torch = facts.versions.get("torch", "")
    numbers = tuple(int(word) for word in torch.split(".")[:2] if word.isdigit())
    tested = ".".join(map(str, TESTED_TORCH))
    if numbers and numbers < OLDEST_TORCH:
        found.append((f"torch {torch} is too old for shoal", f"pip install 'torch~={tested}.0'"))
    elif numbers and numbers != TESTED_TORCH:
        found.append(
            (
                f"torch {torch} is not the release that shoal is tested with ({tested})",
                f"if something fails, pip install 'torch~={tested}.0' (or -c constraints.txt)",
            )
        )
    if facts.computes_on == "cpu" and facts.compiler is None:
        found.append(
            (
                "there is no C++ compiler, without which torch.compile cannot make CPU code",
                "apt install g++ (or your system's equal); until then training runs uncompiled",
            )
        )
    return found


def _machine(facts: Diagnosis) -> list[tuple[str, str]]:
    found = []
    if facts.host_resolves is False:
        found.append(
            (
                "this machine's own name does not resolve, which some libraries wait for",
                "add it to /etc/hosts: echo 127.0.0.1 $(hostname) >> /etc/hosts",
            )
        )
    if facts.link and facts.link.listening:
        found.append(
            (
                f"ranks can be reached from other machines at {', '.join(facts.link.listening)}",
                "this is a bug in shoal: please report it; until then close these ports in the firewall",
            )
        )
    if facts.memory_available is not None and facts.memory_available < _LITTLE_MEMORY:
        found.append(
            (
                f"only {size(facts.memory_available)} of memory are free",
                "end other programs, or take a smaller model, micro_batch or recompute=block in the layout",
            )
        )
    if facts.disk_free is not None and facts.disk_free < _LITTLE_DISK:
        found.append(
            (
                f"only {size(facts.disk_free)} are free on this folder's disk, where runs keep checkpoints",
                "remove old runs (`shoal runs` shows their sizes), or train with --run-dir on another disk",
            )
        )
    gpus = facts.computes_on not in (None, "cpu") and len(facts.devices) > 1
    if gpus and facts.shared_memory_free is not None and facts.shared_memory_free < _LITTLE_SHARED:
        found.append(
            (
                f"/dev/shm has {size(facts.shared_memory_free)} left, which GPUs of one machine exchange data through",
                "in Docker: --shm-size=8g; else: mount -o remount,size=8G /dev/shm",
            )
        )
    if facts.open_files is not None and facts.open_files < _FEW_FILES:
        found.append((f"a process may have only {facts.open_files} open files", "ulimit -n 4096"))
    return found


def _speed(facts: Diagnosis) -> list[tuple[str, str]]:
    found = []
    if facts.cores == 1 and facts.computes_on == "cpu":
        found.append(("there is one core, so two workers are slower than one", "--layout replicas=1"))
    if facts.cores and facts.load is not None and facts.load > max(1.0, facts.cores / 2):
        found.append(
            (
                f"other programs keep this machine busy (load {facts.load:.1f} on {facts.cores} cores)",
                "end them, or expect slower training and too low figures above",
            )
        )
    # All devices of a machine are alike in practice; the slowest decides.
    for device in facts.devices[:1]:
        fp32, bf16 = device.peaks.get("fp32"), device.peaks.get("bf16")
        if fp32 and bf16 and bf16 < fp32:
            found.append(
                (
                    f"bf16 is slower than fp32 here ({si(bf16, 'FLOP/s')} against {si(fp32, 'FLOP/s')})",
                    "--train.precision fp32 (auto measures both and takes the faster)",
                )
            )
    if facts.link and facts.link.latency > _SLOW_LINK:
        found.append(
            (
                f"two ranks need {short(facts.link.latency)} to answer each other, far longer than when idle",
                "end other programs; give every rank a core (--layout replicas=<cores>, --run.threads 1)",
            )
        )
    return found


def _rows(facts: Diagnosis) -> list[tuple[str, str]]:
    limit = f", limited to {facts.core_limit:g} by the container" if facts.core_limit is not None else ""
    load = f", load {facts.load:.1f}" if facts.load is not None else ""
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("system", facts.system or UNKNOWN),
        ("cores", f"{facts.cores or UNKNOWN}{limit}{load}"),
        ("memory", f"{size(facts.memory_available)} free of {size(facts.memory)}"),
        ("disk", f"{size(facts.disk_free)} free here, {size(facts.shared_memory_free)} in /dev/shm"),
        ("C++ compiler", facts.compiler or "none"),
    ]
    for i, device in enumerate(facts.devices):
        peaks = ", ".join(f"{precision} {si(peak, 'FLOP/s')}" for precision, peak in device.peaks.items())
        name = facts.computes_on if len(facts.devices) == 1 else f"{facts.computes_on} {i}"
        rows.append((f"device {name}", f"{device.name}; matmul peak {peaks or 'not measured'}"))
    if facts.link:
        link = f"{short(facts.link.latency)} for 4 B, {size(facts.link.bandwidth)}/s for 64 MiB (all-reduce)"
        rows.append(("two ranks", link))
    rows.append(("took", short(facts.seconds)))
    return rows
