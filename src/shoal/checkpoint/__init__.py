"""Saving and loading the state of a run.

A checkpoint is a folder `step-00000100` with a safetensors file of each rank that had something to write, and
a `manifest.json` that says which box of which tensor lies in which bytes. It has that name only when whole.
The helper process that writes it starts without torch, so names are loaded from here when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_HOME = {
    "Pending": "shoal.checkpoint.saver",
    "Saver": "shoal.checkpoint.saver",
    "fit": "shoal.checkpoint.reader",
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
    from shoal.checkpoint.reader import fit, load, tensors
    from shoal.checkpoint.saver import Pending, Saver

__all__ = ["Pending", "Saver", "complete", "describe", "fit", "load", "newest", "tensors", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shoal.checkpoint' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
