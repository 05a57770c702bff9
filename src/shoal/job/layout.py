"""How one replica is spread over ranks, and how many replicas there are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from shoal.errors import LayoutError
from shoal.job.check import nearest

# Axes that DESIGN names but that are not built: refused by name, not as a spelling mistake.
_LATER = ("pipeline", "context", "tensor", "expert")


@dataclass(frozen=True)
class Layout:
    """replicas × fsdp ranks; printed and parsed as `replicas=2,fsdp=2,zero=3`."""

    replicas: int = 1
    """Copies of the model, each on `fsdp` ranks; `sync` adds up their gradients."""
    fsdp: int = 1
    """Ranks that share one copy, each holding 1/fsdp of what `zero` says."""
    zero: int = 3
    """With fsdp > 1, what is shared: 1 optimizer state; 2 gradients too; 3 parameters too."""
    micro_batch: int = 0
    """Sequences a rank computes at a time; 0 = its whole part of the global batch."""
    recompute: str = "none"
    """Activation checkpointing: `none` keeps all activations, `block` keeps each block's input only."""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.replicas * self.fsdp

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`replicas=2,fsdp=4` -> Layout. Raises LayoutError naming the part that is wrong."""
        known = {f.name: f.type for f in fields(cls)}
        values: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, _, value = (s.strip() for s in part.partition("="))
            if key in _LATER:
                fix = "what works now: replicas, fsdp (docs/roadmap.md)"
                raise LayoutError(f"layout axis '{key}' is not built yet", fix=fix)
            if key not in known:
                raise LayoutError(f"unknown layout key '{key}'", fix=nearest(key, known))
            if key in values:
                raise LayoutError(f"layout key '{key}' is given twice in '{text}'", fix="give it once")
            values[key] = _whole(key, value) if known[key] == "int" else value
        layout = cls(**values)
        layout.validate()
        return layout

    def validate(self) -> None:
        for name, least in (("replicas", 1), ("fsdp", 1), ("micro_batch", 0)):
            if getattr(self, name) < least:
                raise LayoutError(f"layout {name}={getattr(self, name)} is less than {least}", fix=f"e.g. {name}=2")
        if self.zero not in (1, 2, 3):
            raise LayoutError(f"layout zero={self.zero} is not a ZeRO stage", fix="1, 2 or 3")
        if self.recompute not in ("none", "block"):
            raise LayoutError(f"layout recompute='{self.recompute}' is unknown", fix="none or block")

    def __str__(self) -> str:
        parts = [f"replicas={self.replicas}"]
        if self.fsdp > 1:
            parts.append(f"fsdp={self.fsdp}")
        if self.fsdp > 1 or self.zero != Layout.zero:
            parts.append(f"zero={self.zero}")
        if self.micro_batch:
            parts.append(f"micro_batch={self.micro_batch}")
        if self.recompute != Layout.recompute:
            parts.append(f"recompute={self.recompute}")
        return ",".join(parts)


def _whole(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise LayoutError(f"layout {key}='{value}' is not a whole number", fix=f"e.g. {key}=2") from None
