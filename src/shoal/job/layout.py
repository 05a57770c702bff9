"""How one replica is spread over ranks, and how many replicas there are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from shoal.errors import LayoutError
from shoal.job import shares
from shoal.job.check import nearest

AXES = ("replicas", "pipeline", "fsdp", "context", "tensor")
"""The axes of the rank grid, the outermost first."""

SCHEDULES = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "looped_bfs": 2,
    "interleaved_zero_bubble": 2,
    "zbv": 2,
    "dualpipev": 2,
}
"""Pipeline schedules -> stages on each rank (those of the V shape have exactly two, loops two or more)."""

_V_SHAPED = ("zbv", "dualpipev")

MOST = 2**20
"""Of ranks, and of any number in a layout."""

MEASURED = "measured"
"""What `stages` says until a run has measured what its layers cost."""


@dataclass(frozen=True)
class Layout:
    """replicas × pipeline × fsdp × context × tensor ranks; printed and parsed as `replicas=2,fsdp=2,tensor=2`."""

    replicas: int = 1
    """Copies of the model; `sync` adds up their gradients."""
    replica_share: str = ""
    """On uneven machines, each replica's part of the global batch in proportion to these numbers, e.g. `3+1`; empty =
    equal; `auto` = by their speeds, as measured when a run begins."""
    pipeline: int = 1
    """Ranks that hold consecutive blocks of one copy, each computing what the one before it hands on."""
    fsdp: int = 1
    """Ranks that share one copy, each holding 1/fsdp of what `zero` says and computing its own sequences."""
    context: int = 1
    """Ranks that share each sequence, each computing a part of its positions."""
    tensor: int = 1
    """Ranks that share each matrix, each computing a part of its features."""
    expert: int = 1
    """Of the fsdp × context × tensor ranks, as many as share the experts, each computing some for all their tokens. It
    divides these and adds none."""
    zero: int = 3
    """With fsdp or context > 1, what those ranks share: 1 optimizer state; 2 gradients too; 3 parameters too."""
    micro_batch: int = 0
    """Sequences a rank computes at a time; 0 = its whole part of the global batch, or with a pipeline the largest that
    makes twice as many micro-batches as there are stages."""
    schedule: str = "1f1b"
    """Order of a pipeline's forwards and backwards: gpipe, 1f1b, interleaved, looped_bfs, interleaved_zero_bubble,
    zbv or dualpipev."""
    stages: str = ""
    """Blocks of each pipeline stage, e.g. `3+5`; empty = balanced by what layers cost as estimated; `measured` = as
    measured when a run begins."""
    context_by: str = "ring"
    """How context ranks attend to each other: `ring` (keys and values go around) or `ulysses` (heads are exchanged)."""
    tensor_by: str = "gather"
    """How tensor ranks share the sequence around matrix products: `gather` (by collectives) or `ring` (parts go
    around while others are multiplied)."""
    recompute: str = "none"
    """Activation checkpointing: `none` keeps all activations, `block` keeps each block's input only."""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.replicas * self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        return self.pipeline * self.fsdp * self.context * self.tensor

    @property
    def shares(self) -> tuple[int, ...]:
        """Of each replica, its part of the global batch in the smallest whole numbers; equal where `auto`."""
        return shares.parse(self.replica_share) or (1,) * self.replicas

    @property
    def readers(self) -> int:
        """Parts into which the global batch is cut, those of a replica equal: ranks that differ only elsewhere read
        the same."""
        return self.replicas * self.fsdp

    @property
    def pieces(self) -> int:
        """Equal parts of the global batch of which readers have some; where replicas share it evenly, one each."""
        return sum(self.shares) * self.fsdp if self.replica_share else self.readers

    @property
    def sharers(self) -> int:
        """Ranks over which `zero` spreads parameters, gradients or optimizer state."""
        return self.fsdp * self.context

    @property
    def rest(self) -> int:
        """Ranks of a replica's stage that hold the same experts."""
        return self.fsdp * self.context * self.tensor // self.expert

    @property
    def stages_per_rank(self) -> int:
        if self.blocks_per_stage and self.pipeline > 1:
            return len(self.blocks_per_stage) // self.pipeline
        return SCHEDULES[self.schedule]

    @property
    def stage_count(self) -> int:
        """Stages of the whole pipeline; 1 without one."""
        return self.pipeline * self.stages_per_rank if self.pipeline > 1 else 1

    @property
    def blocks_per_stage(self) -> tuple[int, ...]:
        """As given in `stages`; empty = to be balanced."""
        return tuple(int(part) for part in self.stages.split("+")) if self.stages not in ("", MEASURED) else ()

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that this rank of the pipeline holds, in their order: dealt out in turns, or down and up a V."""
        if self.pipeline == 1:
            return (0,)
        if self.schedule in _V_SHAPED:
            return (rank, self.stage_count - 1 - rank)
        return tuple(range(rank, self.stage_count, self.pipeline))

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`replicas=2,fsdp=4` -> Layout. Raises LayoutError naming the part that is wrong."""
        known = {f.name: f.type for f in fields(cls)}
        values: dict[str, Any] = {}
        if not text.strip(", "):
            raise LayoutError("the layout is empty", fix="layout=replicas=2, or replicas=1 for one process")
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, equals, value = (s.strip() for s in part.partition("="))
            if key not in known:
                raise LayoutError(f"unknown layout key '{key}'", fix=nearest(key, known))
            if key in values:
                raise LayoutError(f"layout key '{key}' is given twice in '{text}'", fix="give it once")
            if not equals:
                raise LayoutError(f"layout key '{key}' has no value", fix=f"e.g. {key}=2")
            if " " in value and "=" in value:
                fix = f"put a comma between them: {','.join(part.split())}"
                raise LayoutError(f"layout '{part}' is two options", fix=fix)
            values[key] = _whole(key, value) if known[key] == "int" else value
        layout = cls(**values)
        layout.validate()
        return layout

    def validate(self) -> None:
        least = {"replicas": 1, "pipeline": 1, "fsdp": 1, "context": 1, "tensor": 1, "expert": 1}
        least["micro_batch"] = 0
        for name, number in least.items():
            if getattr(self, name) < number:
                raise LayoutError(f"layout {name}={getattr(self, name)} is less than {number}", fix=f"e.g. {name}=2")
            if getattr(self, name) > MOST:
                raise _too_many(f"layout {name}")
        if self.world > MOST:
            raise _too_many("layout of " + " × ".join(f"{axis}={n}" for axis in AXES if (n := getattr(self, axis)) > 1))
        if self.replica_share and self.replicas == 1:
            what = f"layout replica_share={self.replica_share[:60]} has no replicas to share among"
            raise LayoutError(what, fix="leave it out, or give replicas=2")
        shares.check_list("layout replica_share", self.replica_share, self.replicas)
        if self.zero not in (1, 2, 3):
            raise LayoutError(f"layout zero={self.zero} is not a ZeRO stage", fix="1, 2 or 3")
        if self.recompute not in ("none", "block"):
            raise LayoutError(f"layout recompute='{self.recompute}' is unknown", fix="none or block")
        if self.context_by not in ("ring", "ulysses"):
            raise LayoutError(f"layout context_by='{self.context_by}' is unknown", fix="ring or ulysses")
        if self.tensor_by not in ("gather", "ring"):
            raise LayoutError(f"layout tensor_by='{self.tensor_by}' is unknown", fix="gather or ring")
        if self.tensor_by == "ring" and self.tensor == 1:
            raise LayoutError("layout tensor_by=ring has no ranks to go around", fix="give tensor=2, or leave it out")
        if self.schedule not in SCHEDULES:
            raise LayoutError(f"layout schedule='{self.schedule}' is unknown", fix=nearest(self.schedule, SCHEDULES))
        if self.stages == MEASURED and self.pipeline == 1:
            raise LayoutError("layout stages=measured has no pipeline to split", fix="leave it out, or give pipeline=2")
        if self.stages not in ("", MEASURED):
            self._validate_stages()
        sharing = self.fsdp * self.context * self.tensor
        if sharing % self.expert:
            fits = [str(n) for n in range(1, min(sharing, 64) + 1) if sharing % n == 0]
            raise LayoutError(
                f"layout expert={self.expert} does not divide the fsdp × context × tensor = {sharing} ranks",
                fix=f"expert={' or '.join(fits)}",
            )

    def _validate_stages(self) -> None:
        parts = self.stages.split("+")
        if any(len(part) > len(str(MOST)) for part in parts):
            raise _too_many("a number in layout stages")
        if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
            what = f"layout stages='{self.stages}' is not a list of numbers"
            raise LayoutError(what, fix="e.g. stages=3+5, or stages=measured")
        per_rank, rest = divmod(len(parts), self.pipeline)
        usual = SCHEDULES[self.schedule]
        wrong = rest or per_rank < usual or (per_rank > usual and (usual == 1 or self.schedule in _V_SHAPED))
        if self.pipeline == 1 or wrong:
            wanted = "no stages" if self.pipeline == 1 else f"{usual * self.pipeline} numbers"
            raise LayoutError(
                f"layout stages='{self.stages}' names {len(parts)} stages for pipeline={self.pipeline}",
                fix=f"with schedule={self.schedule}, give {wanted}",
            )

    def __str__(self) -> str:
        parts = [f"{axis}={n}" for axis in AXES if (n := getattr(self, axis)) > 1] or ["replicas=1"]
        if self.replica_share:
            parts.append(f"replica_share={self.replica_share}")
        if self.expert > 1:
            parts.append(f"expert={self.expert}")
        if self.sharers > 1 or self.zero != Layout.zero:
            parts.append(f"zero={self.zero}")
        if self.micro_batch:
            parts.append(f"micro_batch={self.micro_batch}")
        if self.pipeline > 1 or self.schedule != Layout.schedule:
            parts.append(f"schedule={self.schedule}")
        if self.stages:
            parts.append(f"stages={self.stages}")
        if self.context > 1 or self.context_by != Layout.context_by:
            parts.append(f"context_by={self.context_by}")
        if self.tensor_by != Layout.tensor_by:
            parts.append(f"tensor_by={self.tensor_by}")
        if self.recompute != Layout.recompute:
            parts.append(f"recompute={self.recompute}")
        return ",".join(parts)


def _whole(key: str, value: str) -> int:
    digits = value.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()):
        raise LayoutError(f"layout {key}='{value}' is not a whole number", fix=f"e.g. {key}=2")
    if len(digits) > len(str(MOST)):  # int() itself refuses thousands of digits
        raise _too_many(f"layout {key}")
    return int(value)


def _too_many(what: str) -> LayoutError:
    return LayoutError(f"{what} is more than {MOST:,}, the most that a layout can have", fix="give a smaller number")
