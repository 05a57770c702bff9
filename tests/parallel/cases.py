"""Ranks of the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from shoal import mesh as meshes
from shoal.training.parts import assemble
from tests.equivalence import cases


def count_bytes(seat: meshes.Seat, layout: str) -> dict[str, Any]:
    """Elements that one step (the third) gives to each kind of collective, by what the whole operation produces."""
    torch.set_num_threads(1)
    what = cases.job(layout, 10)
    assert what.layout is not None
    parts = assemble(what, meshes.build(what.layout, seat, timeout=60))
    sent = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    calls = dict.fromkeys(sent, 0)
    originals = {}

    def watch(name: str, kind: str, which: int) -> None:
        originals[name] = getattr(dist, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *(kwargs[k] for k in kwargs if isinstance(kwargs[k], torch.Tensor))]
            tensor = given[which] if len(given) > which else given[0]
            if tensor.numel() > 4:  # not the tally
                sent[kind] += tensor.numel()
                calls[kind] += 1
            return originals[name](*args, **kwargs)

        setattr(dist, name, watched)

    for step in range(3):
        if step == 2:
            watch("all_gather_single", "all_gather", 0)
            watch("reduce_scatter_single", "reduce_scatter", 1)
            watch("all_reduce", "all_reduce", 0)
        parts.sync.begin(step)
        parts.sync.end(parts.replica.gradients(cases.rank_batches(parts.mesh, step, 0), parts.objective))
    for name, original in originals.items():
        setattr(dist, name, original)
    gathered = {name: sent[name] for name in sent}
    parameters = sum(torch.Size(s.global_shape).numel() for s in parts.replica.shards())
    parts.mesh.close()
    return {"elements": gathered, "calls": calls, "parameters": parameters}
