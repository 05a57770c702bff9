"""Shoal trains, fine-tunes and serves language models on more than one device.

    import shoal
    result = shoal.train(shoal.job.read("recipes/quickstart.toml"))
    model = shoal.load(result.run)
    print(shoal.generate(result.run, "def "))

Names are loaded when first used, so that `import shoal` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Job": "shoal.job",
    "Layout": "shoal.job",
    "ShoalError": "shoal.errors",
    "train": "shoal.launch.train",
    "plan": "shoal.planning.answered",
    "check": "shoal.launch.check",
    "load": "shoal.serving.load",
    "generate": "shoal.launch.generate",
    "parallelize": "shoal.launch.parallelize",
}

_ROOMS = ("job",)

if TYPE_CHECKING:
    from shoal import job as job
    from shoal.errors import ShoalError
    from shoal.job import Job, Layout
    from shoal.launch.check import check
    from shoal.launch.generate import generate
    from shoal.launch.parallelize import parallelize
    from shoal.launch.train import train
    from shoal.planning.answered import plan
    from shoal.serving.load import load

__all__ = ["Job", "Layout", "ShoalError", "check", "generate", "load", "parallelize", "plan", "train"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"shoal.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'shoal' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
