"""Published measurements: the rows of a CSV in the format of published_fit.csv, as `Work` with seconds.

How a field is read is a rule that holds for every table; a row with too little in it is skipped, by reason.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np

from shoal.errors import JobError
from shoal.planning import cluster, devices, published_model, stacks, work
from shoal.planning.devices import Device
from shoal.planning.published_model import either, number
from shoal.planning.stacks import Stack
from shoal.planning.work import Array, Flags, Names, Work

FIT = Path(str(files("shoal.planning").joinpath("published_fit.csv")))
"""The rows that constants were fitted on."""

NEEDED = ("table", "software", "gpu", "num_gpus", "layers", "hidden", "seq_len", "micro_batch", "global_batch")
# FlashAttention's second version, said of a stack that is older.
_SECOND = re.compile(r"flash[- ]?(?:attention|attn)[- ]?v?2|sdpa")
# Tables of devices on which every stack has FlashAttention's second version or later.
_NEW = ("h100", "h200", "h800", "b200", "gb200", "b300", "gb300", "gh200", "mi3", "tpu", "gaudi3")
# A node's network cards, `8x HDR 200Gbps`; a rate of one device, or of a whole node, `1600 Gbps per node`.
_CARDS = re.compile(r"(\d+) ?(?:x|×|nics of) ?(?:[a-z-]+ )?(\d+) ?g")
_RATE = re.compile(r"(\d+) ?(g(?:bps|b/s|bit/s|bit)|GB/s)\b(.{0,12}node)?", re.IGNORECASE)
# A100 of 40 GB are mostly those of clouds, with 4 × 100 Gbit/s for eight.
_CLOUD = {"a100-40": 50.0}

Row = dict[str, str]


@dataclass(frozen=True)
class Filled:
    """Rows that tell of memory, also where they tell no time. measured: GiB of the fullest device, NaN where it ran out
    of memory (`out`). kind: of `memory.KINDS`, (n,)."""

    rows: list[Row]
    work: Work
    measured: Array
    kind: Names
    out: Flags


@dataclass(frozen=True)
class Published:
    """rows: of the file, those that can be scored. seconds: of a step, measured. memory: GiB of the fullest device,
    measured, NaN where none is told; kind: which memory. same: what makes two rows one configuration. known: the stack
    is one whose description names it. skipped: rows by reason. filled: all rows that tell of memory."""

    rows: list[Row]
    work: Work
    seconds: Array
    memory: Array
    kind: list[str]
    same: list[tuple[object, ...]]
    known: Flags
    skipped: Counter[str]
    filled: Filled

    @property
    def table(self) -> Names:
        return np.array([row["table"] for row in self.rows])

    def same_group(self, which: Flags) -> list[tuple[object, ...]]:
        """Of the rows `which`: what rows share whose layouts are compared: model, sequence, devices, batch,
        precision."""
        names = (*work.MODEL, "devices", "global_batch", "low")
        kept = np.flatnonzero(which)
        return [
            (self.work.device[i], *(float(getattr(self.work, name)[i]) for name in names if name != "vocab"))
            for i in kept
        ]


def read(path: Path) -> Published:
    """JobError for a file that is none, or lacks a column."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            rows, names = list(table), table.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise JobError(f"cannot read it: {error}", where=str(path), fix="a CSV in UTF-8, a line for each row") from None
    if missing := [name for name in NEEDED if name not in names]:
        what = f"it has no column {missing[0]}"
        raise JobError(what, where=str(path), fix=f"columns as in {FIT.name}; needed: {', '.join(NEEDED)}")
    kept: list[Row] = []
    cases: list[_Case] = []
    filling: list[tuple[Row, _Case, bool]] = []
    skipped: Counter[str] = Counter()
    for row in rows:
        row = {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)}
        case = _case(row)
        if isinstance(case, str):
            skipped[case] += 1
            continue
        filled = _ran_out(row)
        if filled or not math.isnan(case.memory):
            filling.append((row, case, filled))
        if math.isnan(case.seconds):
            skipped["no seconds, and no tokens/s" if not filled else "out of memory: no time"] += 1
            continue
        kept.append(row)
        cases.append(case)
    names, classes = [c.device.name for c in cases], [c.stack.constants for c in cases]
    return Published(
        kept, work.of_rows([c.columns for c in cases], names, classes),
        np.array([c.seconds for c in cases], dtype=np.float64), np.array([c.memory for c in cases], dtype=np.float64),
        [row.get("mem_kind", "") for row in kept], [c.same for c in cases], np.array([c.known for c in cases], bool),
        skipped, _filled(filling),
    )  # fmt: skip


@dataclass(frozen=True)
class _Case:
    columns: dict[str, float]
    device: Device
    stack: Stack
    known: bool
    seconds: float
    memory: float
    same: tuple[object, ...]


def _filled(found: list[tuple[Row, _Case, bool]]) -> Filled:
    cases = [case for _, case, _ in found]
    return Filled(
        [row for row, _, _ in found],
        work.of_rows([c.columns for c in cases], [c.device.name for c in cases], [c.stack.constants for c in cases]),
        np.array([c.memory for c in cases], dtype=np.float64),
        np.array([_kind(row.get("mem_kind", "")) for row, _, _ in found], dtype=np.str_),
        np.array([out for _, _, out in found], dtype=bool),
    )


def _kind(said: str) -> str:
    """Of `memory.KINDS`. Where a table does not say, what frameworks print as a peak: allocated."""
    said = said.lower()
    if "reserved" in said or "cached" in said:
        return "reserved"
    return "device" if re.search(r"device|nvidia-smi|smi", said) else "allocated"


def _ran_out(row: Row) -> bool:
    """Of memory: what stands where a measurement would, or in the notes where there is no measurement at all."""
    measured = ("iteration_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "peak_mem_gib")
    if any(number(row, name) > 0 for name in measured):
        return False
    said = " ".join(row.get(name, "") for name in (*measured, "mem_kind", "notes")).lower()
    return bool(re.search(r"\boom\b|out[ -]of[ -]memory", said))


def _case(row: Row) -> _Case | str:
    """Or why it is skipped."""
    if row.get("mem_kind") == "formula":
        return "memory is a formula, and there is no time"
    for name in ("layers", "hidden", "seq_len", "num_gpus", "micro_batch", "global_batch"):
        if not number(row, name) > 0:
            return f"no {name}"
    if "fp4" in row.get("precision", "").lower():
        return "products in 4 bits are not modelled"
    model = published_model.columns(row)
    if isinstance(model, str):
        return model
    device = devices.published(row["gpu"])
    if device is None:
        return f"unknown device {row['gpu']!r}"
    sharded = bool(re.search(r"fsdp|zero-?3", f"{row.get('zero_stage_or_fsdp', '')} {row['software']}".lower()))
    stack, known = stacks.of(row["software"], sharded=sharded, flash_age=device.name.startswith(_NEW))
    if stack.flash == 1 and _SECOND.search(row["software"].lower()):
        stack = replace(stack, flash=2)
    columns = model | _device(row, device) | {name: float(getattr(stack, name)) for name in work.STACK}
    if stack.kept_bf16 is not None and "bf16" in row.get("precision", "").lower():
        columns["kept_bytes"] = stack.kept_bf16
    columns |= _layout(row, columns, stack)
    columns = work.complete(columns)
    if columns["global_batch"] < columns["data"] * columns["micro_batch"]:
        return "global batch < replicas × micro-batch"
    # Printed seconds and tokens/s: what is said of the model counts before anything is padded.
    seconds = _seconds(row, columns)
    if stack.pads:
        whole = 128 * columns["tensor"]
        columns["vocab"] = math.ceil(columns["vocab"] / whole) * whole
    layout = tuple(columns[name] for name in work.LAYOUT)
    same = (*(columns[name] for name in work.MODEL), device.name, *layout, stack.name)
    return _Case(columns, device, stack, known, seconds, number(row, "peak_mem_gib"), same)


def _device(row: Row, device: Device) -> dict[str, float]:
    count = int(either(number(row, "num_gpus"), 1.0))
    node = cluster.usual_node(count, device.per_node, device.tray) if device.tray else device.per_node
    each = either(number(row, "gpus_per_node"), float(node))
    told, cloud = _network(row.get("interconnect", ""), each), _CLOUD.get(device.name)
    nic = device.nic if told is None and cloud is None else (told or cloud or 0.0) * 1e9 / 8
    return device.columns | {"nic": nic, "per_node": each}


def _network(wires: str, each: float) -> float | None:
    """Gbit/s of one device to other nodes, of `each` in a node; None where a row does not tell."""
    beyond = re.sub(r"nvlink[^,;+(]*", "", wires, flags=re.IGNORECASE)
    if cards := _CARDS.search(beyond.lower()):
        return float(cards[1]) * float(cards[2]) / each
    found = _RATE.search(beyond)
    if found is None:
        return None
    return float(found[1]) * (8.0 if "GB" in found[2] else 1.0) / (each if found[3] else 1.0)


def _layout(row: Row, columns: dict[str, float], stack: Stack) -> dict[str, float]:
    devices_ = number(row, "num_gpus")
    tensor, pipeline, chunks, context = (max(1.0, either(number(row, name), 1.0)) for name in ("tp", "pp", "vpp", "cp"))
    data = max(1.0, devices_ / (tensor * pipeline * context))
    micro, batch = number(row, "micro_batch"), number(row, "global_batch")
    zero, fsdp = _sharding(row.get("zero_stage_or_fsdp", ""), data)
    if stack.interleaves and pipeline > 1 and not row.get("vpp"):
        # The paper interleaves and does not print how many chunks.
        each = columns["layers"] / pipeline
        chunks = max(v for v in (1.0, 2.0, 3.0) if each % v == 0) if batch / data / micro % pipeline == 0 else 1.0
    again, half, operators = _again(row.get("activation_ckpt", "").lower(), stack)
    shares = row.get("sp", "").lower()
    return {
        "devices": devices_, "tensor": tensor, "pipeline": pipeline, "chunks": chunks, "context": context,
        "data": data, "zero": zero, "fsdp": fsdp,
        "shards": float(shares in ("yes", "true", "1") or (stack.shards and tensor > 1 and not shares)),
        "recompute": again, "selective": half, "operators": operators,
        "micro_batch": micro, "global_batch": batch, "low": float("fp8" in row.get("precision", "").lower()),
    }  # fmt: skip


def _again(said: str, stack: Stack) -> tuple[float, float, float]:
    """(recompute, selective, operators) of `work.LAYOUT`."""
    if said.startswith("full") or said == "block":
        return 1.0, 0.0, 0.0
    if "selective" in said and "layer" in said:  # every second block
        return 0.5, 0.0, 0.0
    operators = stack.operators and "selective" in said
    return 0.0, float("selective" in said and not operators), float(operators)


def _sharding(said: str, data: float) -> tuple[float, float]:
    """(ZeRO stage, ranks that share). said: as printed. data: replicas in all."""
    said = said.upper()
    if "FSDP" in said or "ZERO-3" in said:
        told = re.search(r"FSDP=(\d+)", said)
        return 3.0, min(float(told.group(1)), data) if told else data
    if "ZERO-2" in said:
        return 2.0, data
    if "ZERO-1" in said or "DISTRIBUTED" in said:
        return 1.0, data
    return 0.0, 1.0


def _seconds(row: Row, columns: dict[str, float]) -> float:
    """Of a step, as printed or as a printed rate says. NaN where neither is."""
    if (seconds := number(row, "iteration_s")) > 0:
        return seconds
    if (rate := number(row, "tokens_per_s_per_gpu")) > 0:
        return columns["global_batch"] * columns["sequence"] / (rate * columns["devices"])
    if row["table"] == "sc21" and (rate := number(row, "tflops_per_gpu")) > 0:
        # Narayanan et al. 2021, equation 3: with what is computed again.
        h, s, layers = columns["hidden"], columns["sequence"], columns["layers"]
        part = 1 + s / (6 * h) + columns["vocab"] / (16 * layers * h)
        return 96 * columns["global_batch"] * s * layers * h**2 * part / (rate * 1e12 * columns["devices"])
    return math.nan
