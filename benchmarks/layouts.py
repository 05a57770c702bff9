"""Training speed of each layout on two ranks against the shortest hand-written use of the same torch interface.

    python benchmarks/layouts.py [--rows fsdp,tensor,pipeline] [--blocks 20] [--starts 3] [--size usual]
                                 [--no-keep] [--format json]

fsdp: ZeRO 3 against `fully_shard` of each block and of the root. tensor: against `parallelize_module` with
sequence parallelism, an embedding and an output layer split over the vocabulary, and `loss_parallel` (the recipe of
torchtitan). pipeline: 1F1B of eight micro-batches against `PipelineStage` and `Schedule1F1B`, with blocks cut as shoal
cuts them. By hand: shoal's Decoder (under tensor parallelism with nn.RMSNorm and with q, k, v, gate and up as layers of
their own, where ours do not take DTensor), F.cross_entropy, clip_grad_norm_ and fused AdamW, as one would write it
first. Same first weights, tokens, fp32, one thread a rank, all logits of a batch at once. Each contender has two
processes of its own, which take turns (see step.py). All keep the memory of freed tensors, shoal's fsdp up to 16 MiB a
piece, as `shoal train` does; with --no-keep those by hand give it back, as torch does by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.paired import ratio
from benchmarks.turns import over_starts, take_turns

from shoal import device
from shoal import mesh as meshes
from shoal.data.batch import Batch
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.train import TrainOptions
from shoal.models import build
from shoal.models.spec import parameters
from shoal.models.storage import FusedLinear, canonical
from shoal.ops.initialise import initialise_
from shoal.parallel.stages import layers_of_stages
from shoal.training.parts import assemble

RANKS = 2
LAYOUTS = {
    "fsdp": Layout(fsdp=RANKS, zero=3),
    "tensor": Layout(tensor=RANKS),
    "pipeline": Layout(pipeline=RANKS, micro_batch=1),
}


class Size(NamedTuple):
    hidden: int
    intermediate: int
    blocks: int
    vocab: int
    length: int
    batch: int
    steps: int
    """Of a block of the measurement."""


SIZES = {"usual": Size(256, 688, 8, 4096, 256, 8, 2), "tiny": Size(32, 88, 3, 64, 16, 8, 1)}

Step = Callable[[], Tensor]
"""One step; this rank's share of the mean loss before it (the ranks' shares add up to it)."""


def job(row: str, size: Size) -> Job:
    model = ModelOptions(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    return Job(
        layout=LAYOUTS[row], model=model, data=DataOptions(sequence_length=size.length),
        optim=OptimOptions(lr=1e-3, clip=1.0, schedule="constant", warmup=0),
        train=TrainOptions(steps=10_000, global_batch=size.batch, precision="fp32", compile="off",
            loss_chunk=size.batch * size.length,
        ),
    )  # fmt: skip


def tokens(size: Size) -> tuple[Tensor, Tensor]:
    """(tokens, labels) of the global batch, of which all steps are made."""
    rows_BL = torch.randint(size.vocab, (size.batch, size.length + 1), generator=torch.Generator().manual_seed(0))
    return rows_BL[:, :-1].contiguous(), rows_BL[:, 1:].contiguous()


def rank_main(seat: Any, row: str, contender: str, size: str, keep: bool, folder: str) -> dict[str, Any]:
    """One of a contender's two ranks: builds it, then runs a block whenever it is told to."""
    step, mesh, steps = _built(seat, row, contender, size, keep)

    def timed() -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    timed()
    timed()
    take_turns(folder, contender, seat.member, timed)
    mesh.close()
    return {"memory": device.memory_peak(mesh.device)}


def losses(seat: Any, row: str, contender: str, size: str, steps: int) -> list[float]:
    """The mean loss before each of so many steps, the same on all ranks."""
    step, mesh, _ = _built(seat, row, contender, size, keep=False)
    found = torch.stack([step().double() for _ in range(steps)])
    dist.all_reduce(found)
    mesh.close()
    return found.tolist()


def _built(seat: Any, row: str, contender: str, size: str, keep: bool) -> tuple[Step, meshes.Mesh, int]:
    torch.set_num_threads(1)
    mesh = meshes.build(LAYOUTS[row], seat)
    if keep:
        ours = contender.startswith("shoal")
        device.keep_memory(mesh.device, gathering=ours and LAYOUTS[row].sharers > 1)
    by_hand = {"fsdp": by_fully_shard, "tensor": by_parallelize_module, "pipeline": by_schedule_1f1b}[row]
    make = with_shoal if contender.startswith("shoal") else by_hand
    return make(job(row, SIZES[size]), mesh, SIZES[size]), mesh, SIZES[size].steps


def with_shoal(what: Job, mesh: meshes.Mesh, size: Size) -> Step:
    assert what.layout is not None
    parts = assemble(what, mesh)
    rows = torch.arange(size.batch).chunk(what.layout.readers)[mesh.reader]
    batches = [batch_of(size, part) for part in rows.split(what.layout.micro_batch or len(rows))]

    def step() -> Tensor:
        parts.sync.begin(0)
        applied = parts.sync.end(parts.replica.gradients(batches, parts.objective))
        return torch.tensor(applied.loss_sum / applied.weight / RANKS)

    return step


def batch_of(size: Size, rows: Tensor) -> Batch:
    tokens_BL, labels_BL = (x[rows] for x in tokens(size))
    position_BL = torch.arange(size.length).expand(tokens_BL.shape).contiguous()
    return Batch(tokens_BL, labels_BL, torch.zeros_like(tokens_BL), position_BL, rows, torch.ones(tokens_BL.shape))


def model_of(what: Job, layers: range | None = None) -> Any:
    """shoal's model and its first weights."""
    model = build(what.model, layers)
    fills = parameters(what.model)
    for name, p in canonical(model):
        initialise_(p, name, tuple(p.shape), (0,) * p.ndim, fills[name].fill, what.train.seed)
    return model


def adamw(model: nn.Module, what: Job) -> torch.optim.Optimizer:
    """Norms do not decay, as in shoal."""
    groups: Iterable[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    o = what.optim
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)


def cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten())


def by_fully_shard(what: Job, mesh: meshes.Mesh, size: Size) -> Step:
    from torch.distributed.fsdp import fully_shard

    model = model_of(what)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = adamw(model, what)
    tokens_BL, labels_BL = (x.chunk(RANKS)[mesh.rank] for x in tokens(size))

    def step() -> Tensor:
        loss = cross_entropy(model(tokens_BL), labels_BL)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach() / RANKS

    return step


class Unfused(nn.ModuleDict):
    """Its layers, one by one."""

    def __init__(self, fused: FusedLinear):
        super().__init__()
        for name, weight in zip(fused.names, fused.weight.detach().split(fused.sizes), strict=True):
            self[name] = nn.Linear(*weight.T.shape, bias=False)
            self[name].weight = nn.Parameter(weight.clone())

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x_BLD) for layer in self.values())


def by_parallelize_module(what: Job, mesh: meshes.Mesh, size: Size) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

    model = model_of(what)
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            plain = nn.RMSNorm(size.hidden, eps=what.model.rms_norm_eps)
            plain.weight = module.weight
            model.set_submodule(name, plain)
        elif isinstance(module, FusedLinear):
            model.set_submodule(name, Unfused(module))
    parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan())
    optimizer = adamw(model, what)
    tokens_BL, labels_BL = tokens(size)
    position_BL = torch.arange(size.length).expand(tokens_BL.shape)

    def step() -> Tensor:
        with loss_parallel():
            # Called as a module, so that what parallelize_module has put around it runs.
            logits_BLV = model(tokens_BL, position_BL, head=lambda hidden_BLD, _: model.lm_head(hidden_BLD))
            loss: Any = cross_entropy(logits_BLV, labels_BL)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().full_tensor() / RANKS

    return step


def plan() -> dict[str, Any]:
    """Module -> how it is split, as in torchtitan's `parallelize_llama` with sequence parallelism."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

    def gathered(others: int) -> PrepareModuleInput:
        nothing = (None,) * others
        return PrepareModuleInput(input_layouts=(Shard(1), *nothing), desired_input_layouts=(Replicate(), *nothing))

    block = "model.layers.*"
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        f"{block}.input_layernorm": SequenceParallel(),
        f"{block}.self_attn": gathered(3),
        **{f"{block}.self_attn.qkv_proj.{name}_proj": ColwiseParallel() for name in "qkv"},
        f"{block}.self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        f"{block}.post_attention_layernorm": SequenceParallel(),
        f"{block}.mlp": gathered(0),
        **{f"{block}.mlp.gate_up_proj.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        f"{block}.mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }


def by_schedule_1f1b(what: Job, mesh: meshes.Mesh, size: Size) -> Step:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    assert what.layout is not None
    model = model_of(what, layers_of_stages(what.model, what.layout, size.length)[mesh.rank])
    stage = PipelineStage(model, mesh.rank, RANKS, mesh.device)
    schedule = Schedule1F1B(stage, size.batch, loss_fn=cross_entropy)
    optimizer = adamw(model, what)
    tokens_BL, labels_BL = tokens(size)

    def step() -> Tensor:
        found: list[Tensor] = []
        if mesh.rank == 0:
            schedule.step(tokens_BL)
        else:
            schedule.step(target=labels_BL, losses=found)
        clip_over_stages(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(found).mean().detach() if found else torch.zeros(())

    return step


def clip_over_stages(mine: list[nn.Parameter]) -> None:
    """`clip_grad_norm_` knows of this rank's parameters only."""
    square = nn.utils.get_total_norm([p.grad for p in mine if p.grad is not None]) ** 2
    dist.all_reduce(square)
    nn.utils.clip_grads_with_norm_(mine, 1.0, square.sqrt())


def measure(row: str, size: str, blocks: int, starts: int, keep: bool) -> dict[str, Any]:
    """keep: whether those by hand keep the memory of freed tensors too, as shoal does."""
    contenders = {
        name: {"row": row, "contender": name, "size": size, "keep": keep or name.startswith("shoal")}
        for name in ("shoal", "by hand", "shoal again")
    }
    seconds, found = over_starts("benchmarks.layouts:rank_main", contenders, blocks, starts)
    useful = SIZES[size].batch * SIZES[size].length * SIZES[size].steps
    speed = {name: round(useful * len(column) / sum(column)) for name, column in seconds.items()}
    faster, low = ratio(seconds["by hand"], seconds["shoal"], starts)
    aa, aa_low = ratio(seconds["shoal again"], seconds["shoal"], starts)
    return {
        "row": row, "layout": str(LAYOUTS[row]), "size": size, "shoal": speed["shoal"], "by_hand": speed["by hand"],
        "step": sum(seconds["shoal"]) / len(seconds["shoal"]) / SIZES[size].steps, "ratio": faster, "ratio_low": low,
        "aa": aa, "aa_low": aa_low, "blocks": blocks, "starts": starts, "keep": keep,
        "memory": {name: f["memory"] for name, f in found.items()}, "seconds": seconds,
    }  # fmt: skip


def table(row: dict[str, Any]) -> str:
    return (
        f"{row['row']:<9} shoal {row['shoal']:>6,} tok/s ({row['step']:.3f} s a step)   by hand {row['by_hand']:>6,}: "
        f"×{row['ratio']:.3f} (≥ {row['ratio_low']:.3f})   A/A {row['aa']:.3f}   {row['blocks']} blocks"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(LAYOUTS), help=f"some of {','.join(LAYOUTS)}")
    parser.add_argument("--blocks", type=int, default=20, help="paired blocks of each row")
    parser.add_argument("--starts", type=int, default=3, help="that the blocks are spread over")
    parser.add_argument("--size", choices=SIZES, default="usual")
    parser.add_argument("--no-keep", action="store_true", help="by hand gives the memory of freed tensors back")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    asked = parser.parse_args()
    rows = []
    for row in asked.rows.split(","):
        rows.append(measure(row, asked.size, asked.blocks, asked.starts, not asked.no_keep))
        print(table(rows[-1]), file=sys.stderr if asked.format == "json" else sys.stdout, flush=True)
    if asked.format == "json":
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
