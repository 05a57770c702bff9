"""Ranks of the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from shoal import mesh as meshes
from shoal.training.parts import assemble
from tests.equivalence import cases


def count_bytes(seat: meshes.Seat, layout: str, precision: str = "fp64") -> dict[str, Any]:
    """Elements that one step (the third) gives to each kind of collective, by what the whole operation produces; and
    of which dtypes they are."""
    torch.set_num_threads(1)
    what = cases.job(layout, 10, precision=precision)
    assert what.layout is not None
    parts = assemble(what, meshes.build(what.layout, seat, timeout=60))
    sent = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    calls = dict.fromkeys(sent, 0)
    dtypes: dict[str, set[str]] = {kind: set() for kind in sent}
    originals = {}

    def watch(name: str, kind: str, which: int) -> None:
        originals[name] = getattr(dist, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *(kwargs[k] for k in kwargs if isinstance(kwargs[k], torch.Tensor))]
            tensor = given[which] if len(given) > which else given[0]
            if tensor.numel() > 4:  # not the tally
                sent[kind] += tensor.numel()
                calls[kind] += 1
                dtypes[kind].add(str(tensor.dtype))
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
    told = {kind: sorted(found) for kind, found in dtypes.items()}
    return {"elements": gathered, "calls": calls, "parameters": parameters, "dtypes": told}


def held(seat: meshes.Seat, **options: Any) -> dict[str, Any]:
    """Elements that the forward passes of a step keep for backward, and how many graphs were compiled."""
    torch.set_num_threads(1)
    what = cases.job(steps=1, **options)
    assert what.layout is not None
    before = counters["stats"]["unique_graphs"]
    parts = assemble(what, meshes.build(what.layout, seat, timeout=60))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        cases.take_steps(parts, 1)
    parts.mesh.close()
    return {"kept": sum(kept), "graphs": counters["stats"]["unique_graphs"] - before}


def exchanges(seat: meshes.Seat, layout: str) -> int:
    """All-to-alls of a step."""
    torch.set_num_threads(1)
    what = cases.job(layout, 1, model="even")
    assert what.layout is not None
    parts = assemble(what, meshes.build(what.layout, seat, timeout=60))
    calls, original = [], dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    try:
        cases.take_steps(parts, 1)
    finally:
        dist.all_to_all_single = original
        parts.mesh.close()
    return len(calls)
