"""Training speed of two workers against the two loops that people would otherwise run.

    python benchmarks/step.py [--rows fp32,bf16,...] [--blocks 20] [--starts 3] [--keep] [--format json]

shoal: its own step (buckets, chunked loss, own norm and clipping). ddp: the shortest honest loop: the same model in
DistributedDataParallel, plain cross-entropy, clip_grad_norm_, fused AdamW. hf: transformers' LlamaForCausalLM of the
same shape in its Trainer. All three get the same tokens, threads, precision and compile setting. Each has two
processes of its own, and they take turns, block by block, while the others sleep. (In the same processes, who is built
first gets other memory, which alone was worth up to 3 %.) All are started anew a few times, since two starts of one
program differ too; A/A, shoal against shoal in two more processes, shows by how much. shoal's processes keep the memory
of freed tensors, as in `shoal train`; the others' do what glibc does, unless --keep says otherwise. shoal and ddp
are given their batch; the Trainer's own loop collates it from memory, as it always does. MFU: of shoal, against the
matmul peak of the same processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.paired import ratio
from benchmarks.turns import over_starts, take_turns

from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.train import TrainOptions


@dataclass(frozen=True)
class Row:
    """One comparison. compile: both torch.compile'd per block (shoal, ddp) or as a whole (hf). packed: documents of
    mixed length, packed by shoal's data (also for ddp), padded to the longest by hf, counted in useful tokens."""

    precision: str
    vocab: int
    compile: bool = False
    packed: bool = False
    sequences: int = 4
    steps: int = 3


ROWS = {
    "fp32": Row("fp32", 4096, steps=2),
    "bf16": Row("bf16", 4096),
    "bf16-compiled": Row("bf16", 4096, compile=True),
    "vocab-49152": Row("bf16", 49152, steps=1),
    "packed": Row("bf16", 4096, packed=True, sequences=8, steps=1),
}
LENGTH = 256


def job(row: Row) -> Job:
    """The 23.5 M-parameter Llama (at vocabulary 4096) on two workers."""
    model = ModelOptions(
        vocab_size=row.vocab, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    train = TrainOptions(
        steps=10_000, global_batch=2 * row.sequences, precision=row.precision, compile="on" if row.compile else "off"
    )
    return Job(
        layout=Layout(replicas=2), model=model, data=DataOptions(sequence_length=LENGTH),
        optim=OptimOptions(lr=1e-4, clip=1.0, schedule="constant", warmup=0), train=train,
    )  # fmt: skip


def lengths(count: int, seed: int) -> list[int]:
    """Document lengths as of chat or code snippets: log-normal, median 60 tokens, none beyond a sequence."""
    import numpy as np

    drawn = np.random.default_rng(seed).lognormal(np.log(60), 0.9, count)
    return [int(n) for n in np.clip(drawn, 8, LENGTH)]


def rank_main(seat: Any, name: str, contender: str, keep: bool, folder: str) -> dict[str, Any]:
    """One of a contender's two workers: builds it, then runs a block whenever it is told to."""
    import torch
    import torch.distributed as dist

    from shoal import device
    from shoal import mesh as meshes
    from shoal.observe.peak import matmul_peak

    torch.set_num_threads(1)
    row = ROWS[name]
    what = job(row)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat)
    if keep:
        device.keep_memory(mesh.device)
    os.environ.update(
        RANK=str(seat.member),
        WORLD_SIZE=str(seat.world),
        LOCAL_RANK=str(seat.local),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )
    maker = {"shoal": shoal_steps, "ddp": ddp_steps, "hf": hf_steps}[contender.split()[0]]
    block, mine = maker(what, mesh, row)

    def timed() -> float:
        dist.barrier()
        slowest = torch.tensor([block()], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    timed()
    timed()
    take_turns(folder, contender, seat.member, timed)
    tokens = torch.tensor([mine], dtype=torch.float64)
    dist.all_reduce(tokens)
    peak = matmul_peak(mesh.device, row.precision) if contender == "shoal" else None
    mesh.close()
    return {"tokens": tokens.item(), "peak": peak, "memory": device.memory_peak(mesh.device)}


def full_rows(row: Row, mesh: Any) -> tuple[Any, float]:
    """This rank's batch without padding, and its useful tokens."""
    import torch

    from shoal.data.batch import Batch

    tokens_BL = torch.randint(
        row.vocab, (row.sequences, LENGTH + 1), generator=torch.Generator().manual_seed(mesh.rank)
    )
    shape = (row.sequences, LENGTH)
    batch = Batch(
        tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous(), torch.zeros(shape, dtype=torch.int64),
        torch.arange(LENGTH).expand(shape).contiguous(), torch.arange(row.sequences), torch.ones(shape),
    )  # fmt: skip
    return batch, float(row.sequences * LENGTH)


def mixed_documents(row: Row, mesh: Any) -> list[Any]:
    """Token ids of this rank's documents of mixed length: as many as fill about `sequences` rows."""
    import torch

    generator = torch.Generator().manual_seed(mesh.rank)
    sizes, total = [], 0
    for size in lengths(10_000, mesh.rank):
        if total + size > row.sequences * LENGTH:
            break
        sizes.append(size)
        total += size
    return [torch.randint(row.vocab, (size,), generator=generator) for size in sizes]


def packed_rows(row: Row, mesh: Any) -> tuple[Any, float]:
    """The same documents by shoal's best-fit packing."""
    import numpy as np
    import torch

    from shoal.data.batch import Batch
    from shoal.data.pack import plan

    texts = mixed_documents(row, mesh)
    flat = torch.cat(texts)
    length_D = np.array([len(t) for t in texts], np.int32)
    start_D = np.concatenate(([0], np.cumsum(length_D)[:-1])).astype(np.int64)
    packing = plan(start_D, length_D, LENGTH, "best_fit")
    shape = (packing.rows, LENGTH)
    tokens, labels, document, position = (torch.zeros(shape, dtype=torch.int64) for _ in range(4))
    weight = torch.zeros(shape)
    for r in range(packing.rows):
        place = 0
        for number, p in enumerate(range(packing.first_R[r], packing.first_R[r + 1])):
            start, n = int(packing.start_P[p]), int(packing.length_P[p])
            here = slice(place, place + n)
            tokens[r, here], labels[r, here] = flat[start : start + n], flat[start + 1 : start + n + 1]
            document[r, here], position[r, here], weight[r, here] = number, torch.arange(n), 1.0
            place += n
        document[r, place:] = -1
    return Batch(tokens, labels, document, position, torch.arange(packing.rows), weight), float(weight.sum())


def padded_rows(row: Row, mesh: Any) -> tuple[dict[str, Any], float]:
    """The same documents one a row, padded to the longest, as a Hugging Face collator makes them."""
    import torch

    texts = mixed_documents(row, mesh)
    longest = max(len(t) for t in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)], labels[i, : len(text)], mask[i, : len(text)] = text, text, 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}, float(sum(len(t) - 1 for t in texts))


Contender = tuple[Callable[[], float], float]
"""(a block of steps, which returns its seconds; useful tokens of this worker in it)"""


def shoal_steps(what: Job, mesh: Any, row: Row) -> Contender:
    from shoal.training.parts import assemble

    parts = assemble(what, mesh)
    batch, useful = packed_rows(row, mesh) if row.packed else full_rows(row, mesh)

    def block() -> float:
        start = time.perf_counter()
        for step in range(row.steps):
            parts.sync.begin(step)
            parts.sync.end(parts.replica.gradients([batch], parts.objective))
        return time.perf_counter() - start

    return block, useful * row.steps


def ddp_steps(what: Job, mesh: Any, row: Row) -> Contender:
    """The loop of the PyTorch tutorials, on the same model."""
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from shoal.models import build
    from shoal.ops.attention import document_attend

    batch, useful = packed_rows(row, mesh) if row.packed else full_rows(row, mesh)
    torch.manual_seed(0)
    model = build(what.model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.ones_(p)
    if row.compile:
        for module in model.blocks:
            module.compile()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def block() -> float:
        start = time.perf_counter()
        for _ in range(row.steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=row.precision == "bf16"):
                logits_BLV = parallel(batch.tokens_BL, batch.position_BL, document_attend(batch.document_BL))
            nll_N = F.cross_entropy(logits_BLV.flatten(0, 1).float(), batch.labels_BL.flatten(), reduction="none")
            ((nll_N * batch.weight_BL.flatten()).sum() / batch.weight_BL.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return time.perf_counter() - start

    return block, useful * row.steps


def hf_steps(what: Job, mesh: Any, row: Row) -> Contender:
    """transformers' model in its Trainer, timed from the end of its first step to the end of its last."""
    import torch
    import transformers

    from shoal.models.config import to_hf

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_hf(what.model)))
    if row.packed:
        rows, useful = padded_rows(row, mesh)
    else:
        batch, useful = full_rows(row, mesh)
        rows = {"input_ids": batch.tokens_BL, "labels": batch.tokens_BL}
    batch_size = len(rows["input_ids"])
    # The Trainer shards its data set over the ranks: each finds its own rows in it.
    both = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    data = both * (2 * (row.steps + 1))
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

    folder = tempfile.TemporaryDirectory()  # the Trainer wants one; it is removed with the last block
    arguments = transformers.TrainingArguments(
        output_dir=folder.name, per_device_train_batch_size=batch_size, max_steps=row.steps + 1, use_cpu=True,
        bf16=row.precision == "bf16", optim="adamw_torch_fused", max_grad_norm=1.0, save_strategy="no", report_to=[],
        logging_strategy="no", disable_tqdm=True, torch_compile=row.compile, learning_rate=1e-4, weight_decay=0.1,
        lr_scheduler_type="constant", ddp_backend="gloo", ddp_find_unused_parameters=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Clock()])
    trainer.remove_callback(transformers.PrinterCallback)

    def block() -> float:
        ends.clear()
        trainer.train()
        assert Path(folder.name).is_dir()
        assert len(ends) == row.steps + 1
        return ends[-1] - ends[0]

    return block, useful * row.steps


def measure(name: str, blocks: int, starts: int = 1, keep: bool = False) -> dict[str, Any]:
    """keep: whether all contenders keep the memory of freed tensors, not shoal alone."""
    from shoal.models.spec import flops_per_token

    contenders = {
        contender: {"name": name, "contender": contender, "keep": keep or contender.startswith("shoal")}
        for contender in ("shoal", "ddp", "hf", "shoal again")
    }
    seconds, found = over_starts("benchmarks.step:rank_main", contenders, blocks, starts)
    useful, peak = found["shoal"]["tokens"], found["shoal"]["peak"]
    assert all(f["tokens"] == useful for f in found.values()), "contenders count different tokens as useful"
    speed = {contender: useful * len(column) / sum(column) for contender, column in seconds.items()}
    against_ddp, against_hf = ratio(seconds["ddp"], seconds["shoal"]), ratio(seconds["hf"], seconds["shoal"])
    row, what = ROWS[name], job(ROWS[name])
    return {
        "row": name, "precision": row.precision, "vocab": row.vocab, "compile": row.compile, "packed": row.packed,
        "shoal": round(speed["shoal"]), "ddp": round(speed["ddp"]), "hf": round(speed["hf"]),
        "ratio_ddp": against_ddp[0], "ratio_hf": against_hf[0],
        "ratio_ddp_low": against_ddp[1], "ratio_hf_low": against_hf[1],
        "aa": ratio(seconds["shoal again"], seconds["shoal"])[0], "blocks": blocks, "starts": starts, "keep": keep,
        "mfu": peak and speed["shoal"] * flops_per_token(what.model, LENGTH) / (2 * peak),
        "memory": {contender: f["memory"] for contender, f in found.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    parser.add_argument("--blocks", type=int, default=20, help="paired blocks of each row")
    parser.add_argument("--starts", type=int, default=3, help="that the blocks are spread over")
    parser.add_argument("--keep", action="store_true", help="ddp and hf keep the memory of freed tensors too")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    options = parser.parse_args()
    rows = []
    for name in options.rows.split(","):
        rows.append(measure(name, options.blocks, options.starts, options.keep))
        print(table(rows[-1:]), file=sys.stderr if options.format == "json" else sys.stdout, flush=True)
    if options.format == "json":
        print(json.dumps({"rows": rows}))


def table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{r['row']:<14} shoal {r['shoal']:>6,} tok/s, MFU {100 * (r['mfu'] or float('nan')):.1f} %   "
        f"ddp {r['ddp']:>6,}: ×{r['ratio_ddp']:.3f} (≥ {r['ratio_ddp_low']:.3f})   "
        f"hf {r['hf']:>6,}: ×{r['ratio_hf']:.3f} (≥ {r['ratio_hf_low']:.3f})   A/A {r['aa']:.3f}   {r['blocks']} blocks"
        for r in rows
    )


if __name__ == "__main__":
    main()
