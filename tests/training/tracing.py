"""A rank that looks at what tracing replaces."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.optim.update import Update
from shoal.training.objective import Objective
from shoal.training.traced import traced


def before_and_after(seat: meshes.Seat) -> list[bool]:
    """[replaced inside, the very same functions afterwards]"""

    def functions():
        stage = (PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk)
        operations = (vars(dist.ProcessGroup)[name] for name in ("allreduce", "send", "recv", "_start_coalescing"))
        return vars(dist.Work)["wait"], *operations, Objective.__call__, torch.Tensor.backward, *stage, Update.apply

    mesh = meshes.build(Layout(replicas=2), seat, timeout=60)
    try:
        before = functions()
        with tempfile.TemporaryDirectory() as folder, traced(mesh, Path(folder)):
            inside = functions()
        return [all(a is not b for a, b in zip(before, inside, strict=True)), functions() == before]
    finally:
        mesh.close()
