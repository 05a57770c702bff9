"""Saving and loading the state of a run (docs/checkpoints.md says what lies on disk).

Names are loaded when first used: the helper process that writes checkpoints must start without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_HOME = {
    "Pending": "shoal.checkpoint.saver",
    "Saver": "shoal.checkpoint.saver",
    "load": "shoal.checkpoint.reader",
    "tensors": "shoal.checkpoint.reader",
    "verify": "shoal.checkpoint.health",
    "newest": "shoal.checkpoint.health",
    "describe": "shoal.checkpoint.health",
    "complete": "shoal.checkpoint.folders",
}

if TYPE_CHECKING:
    from shoal.checkpoint.folders import complete
    from shoal.checkpoint.health import describe, newest, verify
    from shoal.checkpoint.reader import load, tensors
    from shoal.checkpoint.saver import Pending, Saver

__all__ = ["Pending", "Saver", "complete", "describe", "load", "newest", "tensors", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shoal.checkpoint' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
