"""One small job computed in ranks by shoal, and by one process with nothing of shoal's but the model."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shoal import mesh as meshes
from shoal.data.batch import Batch
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.mesh import Mesh
from shoal.models import build
from shoal.models.moe import MoE
from shoal.models.spec import parameters
from shoal.ops.attention import document_attend, dropped_attend
from shoal.ops.dropout import Dropout
from shoal.ops.initialise import initialise_
from shoal.optim.schedule import learning_rate
from shoal.training.feed import micro_batches
from shoal.training.parts import Parts, assemble
from tests.models import experts
from tests.optim import reference as muon

GLOBAL_BATCH, LENGTH, VOCAB = 12, 24, 61

# 3 layers of odd sizes, so that fsdp=2 and fsdp=3 cut unevenly; KV heads are shared.
MODEL = ModelOptions(
    vocab_size=VOCAB, hidden_size=20, intermediate_size=37, num_hidden_layers=3, num_attention_heads=5,
    num_key_value_heads=1, head_dim=6, tie_word_embeddings=True, initializer_range=0.3,
)  # fmt: skip


# Sizes that every axis can share; with tensor=4 key heads lie on two ranks each, vocabulary and features unevenly.
EVEN = replace(MODEL, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)

_EXPERTS = replace(EVEN, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=14)
# The weights of all that acts beside the cross-entropy are so large that none of it could be wrong unseen.
QWEN = replace(
    _EXPERTS, family="qwen2_moe", shared_expert_intermediate_size=11, qkv_bias=True, norm_topk_prob=False,
    router_aux_loss_coef=0.3,
)  # fmt: skip
QWEN3 = replace(_EXPERTS, family="qwen3_moe", router_aux_loss_coef=0.3)
MIXTRAL = replace(_EXPERTS, family="mixtral", moe_intermediate_size=0, router_aux_loss_coef=0.3)
DEEPSEEK = replace(
    _EXPERTS, family="deepseek_v3", first_k_dense_replace=1, num_experts=8, n_group=4,
    topk_group=2, num_experts_per_tok=3, shared_expert_intermediate_size=14, num_key_value_heads=4, head_dim=0,
    q_lora_rank=10, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6, routed_scaling_factor=1.5,
    router_aux_loss_coef=0.1, bias_update_rate=0.02, capacity_factor=1.0,
)  # fmt: skip
# Of the 24 rows of q, k and v together, fsdp=3 gives a rank the last 4 of q and the first 4 of k; fsdp=2,tensor=2 gives
# one 6 of q and 3 of k, whose only head both tensor ranks have. Biases likewise; 74 rows of gate and up go unevenly.
BORDERS = replace(EVEN, num_attention_heads=2, num_key_value_heads=1, attention_bias=True, mlp_bias=True)
MODELS = {
    "odd": MODEL, "even": EVEN, "borders": BORDERS,
    "qwen": QWEN, "qwen3": QWEN3, "mixtral": MIXTRAL, "deepseek": DEEPSEEK,
    "few experts": replace(DEEPSEEK, first_k_dense_replace=3),  # in one block of four
}  # fmt: skip


class Row(NamedTuple):
    """Of the suite: what is trained, and how. model: of `MODELS`. Output layers are tied with SGD, apart with AdamW."""

    layout: str
    model: str = "even"
    steps: int = 6
    optimizer: str = "sgd"
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __str__(self) -> str:
        rates = {"dropout": self.dropout, "attention dropout": self.attention_dropout}
        how = "".join(f", {name} {rate}" for name, rate in rates.items() if rate)
        return f"{self.model}, {self.optimizer}, {self.steps} steps{how}: {self.layout}"

    @property
    def options(self) -> dict[str, Any]:
        """For `job`. What a row costs is its number of operations, so there are no more blocks than its stages, or
        FSDP's groups, need."""
        layout = Layout.parse(self.layout)
        return self._asdict() | {
            "tied": self.optimizer == "sgd",
            "layers": 0 if layout.pipeline > 1 or self.model == "odd" else 2,
        }


def accumulated(axes: str) -> str:
    """That layout with two micro-batches; three in a pipeline, or where the batch of a rank is odd."""
    part = GLOBAL_BATCH // Layout.parse(axes).readers
    return f"{axes},micro_batch={part // (3 if 'pipeline' in axes or part % 2 else 2)}"


def job(
    layout: str, steps: int, optimizer: str = "adamw", precision: str = "fp64", tied: bool = True, layers: int = 0,
    clip: float = 0.5, compile: str = "off", model: str = "odd", dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> Job:  # fmt: skip
    """model: of `MODELS`. layers: 0 = as many as it has."""
    options = replace(MODELS[model], tie_word_embeddings=tied)
    if layers:
        options = replace(options, num_hidden_layers=layers)
    lr = 0.3 if optimizer == "sgd" else 1e-2
    return Job(
        layout=Layout.parse(layout),
        model=options,
        data=DataOptions(sequence_length=LENGTH),
        optim=OptimOptions(name=optimizer, lr=lr, schedule="wsd", warmup=0.1, decay=0.3, clip=clip),
        train=TrainOptions(
            steps=steps,
            global_batch=GLOBAL_BATCH,
            precision=precision,
            compile=compile,
            loss_chunk=17,
            seed=5,
            dropout=dropout,
            attention_dropout=attention_dropout,
        ),
        # Buckets of a few kilobytes, so that there are several.
        sync=SyncOptions(bucket_mib=0.01),
    ).validate()


def global_batch(step: int, order: int = 0) -> Batch:
    """Documents of mixed length, a different number of valid tokens in every row, and text that can be learned.

    order: shuffles the rows, another way for each value.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    rows = []
    for _ in range(GLOBAL_BATCH):
        start = torch.randint(VOCAB, (1,), generator=generator)
        tokens = (start + 7 * torch.arange(LENGTH + 1)) % VOCAB
        cut = int(torch.randint(1, LENGTH, (1,), generator=generator))
        valid = int(torch.randint(cut, LENGTH + 1, (1,), generator=generator))
        place = torch.arange(LENGTH)
        document = (place >= cut).long()
        rows.append(
            (tokens[:-1], tokens[1:], document, torch.where(place >= cut, place - cut, place), (place < valid).float())
        )
    tokens_BL, labels_BL, document_BL, position_BL, weight_BL = (
        torch.stack(column) for column in zip(*rows, strict=True)
    )
    sample_B = torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    batch = Batch(tokens_BL, labels_BL, document_BL, position_BL, sample_B, weight_BL)
    if order:
        shuffle = torch.randperm(GLOBAL_BATCH, generator=torch.Generator().manual_seed(order * 1000 + step))
        batch = Batch(**{name: tensor[shuffle] for name, tensor in vars(batch).items()})
    return batch


def rank_batches(mesh: Mesh, step: int, order: int) -> list[Batch]:
    batch = global_batch(step, order)
    if not mesh.layout.replica_share:
        mine = micro_batches(batch, GLOBAL_BATCH // mesh.layout.readers)[mesh.reader]
        return micro_batches(mine, mesh.layout.micro_batch)
    (replica, place), whole = divmod(mesh.reader, mesh.layout.fsdp), micro_batches(batch, 1)
    shares = [int(share) for share in mesh.layout.replica_share.split("+")]
    ends = [GLOBAL_BATCH * sum(shares[:r]) // sum(shares) for r in range(len(shares) + 1)]
    size = (ends[replica + 1] - ends[replica]) // mesh.layout.fsdp
    rows = whole[ends[replica] + place * size : ends[replica] + (place + 1) * size]
    assert len(rows) == size
    mine = Batch(**{name: torch.cat([getattr(row, name) for row in rows]) for name in vars(batch)})
    return micro_batches(mine, mesh.layout.micro_batch)


def take_steps(parts: Parts, steps: int, order: int = 0, first: int = 0) -> dict[str, Any]:
    """Runs the steps from `first` on; losses and norms of each, and this rank's pieces of the gradient of step 0 and of
    the last weights: (name, offsets, values)."""
    losses, norms, gradients = [], [], []
    for step in range(first, steps):
        parts.objective.step = step
        parts.sync.begin(step)
        tally = parts.replica.gradients(rank_batches(parts.mesh, step, order), parts.objective)
        applied = parts.sync.end(tally)
        assert applied.applied
        losses.append(applied.loss_sum / applied.weight)
        norms.append(applied.grad_norm)
        if step == 0:
            shards = parts.replica.shards()
            gradients = [(s.name, s.offsets, s.grad.tolist()) for s in shards if s.grad is not None]
    weights = [(s.name, s.offsets, s.local.tolist()) for s in parts.replica.held()]
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def run(seat: meshes.Seat, layout: str, steps: int, order: int = 0, **options: Any) -> dict[str, Any]:
    """A rank's part of the job."""
    torch.set_num_threads(1)
    what = job(layout, steps, **options)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        return take_steps(assemble(what, mesh), steps, order)
    finally:
        mesh.close()


@functools.cache
def reference(
    steps: int, stop: int = 0, replicas: int = 1, codec: str = "", feedback: bool = False, **options: Any
) -> dict[str, Any]:
    """The same job in one process in float64, with torch's own loss, clipping and optimizers. Once for all rows of it:
    not to be written to. stop: the step before which it ends, 0 = after the last. codec: dtype to which each replica's
    gradient is rounded, and their sum; "coarse": towards zero, to powers of 4. feedback: whether what that loses is
    added to the next ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other, ten times as long as they compute
    try:
        return _reference(steps, stop or steps, replicas, codec, feedback, **options)
    finally:
        torch.set_num_threads(threads)


def _reference(steps: int, stop: int, replicas: int, codec: str, feedback: bool, **options: Any) -> dict[str, Any]:
    what = job("replicas=1", steps, **options)
    model = build(what.model).double()
    fills = parameters(what.model)
    for name, tensor in experts.canonical(model):
        initialise_(tensor.detach(), name, tuple(tensor.shape), (0,) * tensor.ndim, fills[name].fill, what.train.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    o = what.optim
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer_: Any
    if o.name == "muon":
        optimizer_ = muon.OfModel(model, o)
    elif o.name == "adamw":
        optimizer_ = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, foreach=False)
    else:
        optimizer_ = torch.optim.SGD([{**g, "weight_decay": 0.0} for g in groups], lr=o.lr, momentum=o.momentum)
    losses, norms, gradients = [], [], {}
    # Of every replica, and behind them of the sum: what has been lost.
    lost = [[torch.zeros_like(p) for p in model.parameters()] for _ in range(replicas + 1)]
    for step in range(stop):
        batch = global_batch(step)
        loss_sum, sums = 0.0, [torch.zeros_like(p) for p in model.parameters()]
        for part, own in zip(micro_batches(batch, GLOBAL_BATCH // replicas), lost, strict=False):
            model.zero_grad()
            loss = _loss(what, model, part, step)
            # Experts add their balance loss on the way back, as a sum over tokens.
            loss.backward()
            loss_sum += loss.item()
            for p, total, e in zip(model.parameters(), sums, own, strict=True):
                total += _sent(p.grad, e, codec, feedback)
        tokens = batch.weight_BL.double().sum()
        for p, total, e in zip(model.parameters(), sums, lost[replicas], strict=True):
            p.grad = _sent(total, e, codec, feedback) / tokens
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        for p in model.parameters():
            p.grad.mul_(min(1.0, o.clip / norms[-1]) if o.clip else 1.0)
        lr = learning_rate(o, step, steps)
        for group in optimizer_.param_groups:
            group["lr"] = lr
        if step == 0:
            gradients = {n: g.clone() for n, g in experts.canonical(model, gradients=True) if g is not None}
        if o.name == "sgd":
            for p in matrices:
                p.data.mul_(1 - lr * o.weight_decay)
        optimizer_.step()
        balance_(model)
        losses.append(loss_sum / tokens.item())
    weights = {name: tensor.detach() for name, tensor in experts.canonical(model)}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def _loss(what: Job, model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
    """Summed over the batch's tokens."""
    drop = Dropout(what.train.dropout, what.train.seed, step, batch.sample_B, torch.arange(LENGTH))
    attend = document_attend(batch.document_BL)
    if what.train.attention_dropout:
        rate, place_L = what.train.attention_dropout, torch.arange(LENGTH)
        attend = dropped_attend(batch.document_BL, Dropout(rate, what.train.seed, step, batch.sample_B, place_L))
    logits_BLV = model(batch.tokens_BL, batch.position_BL, attend, None, batch.weight_BL > 0, drop)
    nll_BL = F.cross_entropy(logits_BLV.flatten(0, 1), batch.labels_BL.flatten(), reduction="none")
    return (nll_BL.view_as(batch.weight_BL) * batch.weight_BL).sum()


def _sent(tensor: torch.Tensor, lost: torch.Tensor, codec: str, feedback: bool) -> torch.Tensor:
    """What arrives of it, and of what has been lost, which changes."""
    if not codec:
        return tensor
    if feedback:
        tensor = tensor + lost
    arrived = _rounded(tensor, codec)
    lost.copy_(tensor - arrived)
    return arrived


def _rounded(tensor: torch.Tensor, codec: str) -> torch.Tensor:
    if codec == "coarse":
        values = tensor.numpy()
        return torch.from_numpy(np.ldexp(np.sign(values), (np.frexp(values)[1] - 1) // 2 * 2))
    return tensor.to(getattr(torch, codec)).double()


def balance_(model: nn.Module) -> None:
    """Experts used less than the mean gain by their bias."""
    for layer in model.modules():
        usage = layer.take_usage() if isinstance(layer, MoE) else None
        if usage is not None and layer.gate.e_score_correction_bias is not None:
            counts_E, rate = usage.counts_E.double(), layer.options.bias_update_rate
            less_E, more_E = (counts_E < counts_E.mean()).double(), (counts_E > counts_E.mean()).double()
            layer.gate.e_score_correction_bias += rate * less_E - rate * more_E


def gradient_errors(results: list[dict[str, Any]], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Per parameter: how far the worst rank's piece is from its place in the gradient, relative to the whole norm."""
    errors: dict[str, float] = {}
    for result in results:
        for name, offsets, values in result["gradients"]:
            piece, like = torch.tensor(values, dtype=torch.float64), expected[name]
            if piece.numel():
                errors[name] = max(errors.get(name, 0.0), apart(piece, like[place(offsets, piece)], like))
    assert errors.keys() == expected.keys(), "no rank holds a piece of some parameter"
    return errors


def apart(one: torch.Tensor, other: torch.Tensor, whole: torch.Tensor) -> float:
    """The norm of what they differ by, relative to the whole's where that is not 0; inf where anything is no number."""
    difference = ((one - other).double().norm() / (whole.double().norm() or 1.0)).item()
    return difference if math.isfinite(difference) else math.inf


def place(offsets: list[int], piece: torch.Tensor) -> tuple[slice, ...]:
    return tuple(slice(start, start + n) for start, n in zip(offsets, piece.shape, strict=True))


def whole(results: list[dict[str, Any]], what: str, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that the ranks' pieces make up; every rank must agree, to the last bit, where they overlap."""
    out = {name: torch.full_like(tensor, float("nan")) for name, tensor in like.items()}
    for result in results:
        for name, offsets, values in result[what]:
            piece = torch.tensor(values, dtype=out[name].dtype)
            if piece.numel():
                there = out[name][place(offsets, piece)]
                assert torch.all(torch.isnan(there) | (there == piece)), f"ranks differ in {what} of {name}"
                there.copy_(piece)
    for name, tensor in out.items():
        assert not tensor.isnan().any(), f"no rank holds all of {name}"
    return out


def check(ranks: Any, row: Row) -> None:
    """The row's job in ranks, against one process."""
    options = row.options
    layout = Layout.parse(options.pop("layout"))
    assert layout.micro_batch, "a row has several micro-batches"
    most = GLOBAL_BATCH * max(layout.shares) // layout.pieces
    assert most >= 2 * layout.micro_batch, "a row has several micro-batches"
    results = ranks.run("tests.equivalence.cases:run", layout.world, layout=row.layout, **options)
    assert_one_answer(results, reference(**options))


def assert_one_answer(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """The bounds of the design in float64: 1e-10 for the first gradient of every parameter, 1e-8 for all else."""
    got = whole(results, "gradients", expected["gradients"])
    for name, gradient in expected["gradients"].items():
        assert (got[name] - gradient).norm() <= 1e-10 * gradient.norm(), f"gradient of {name}"
    for result in results:
        for what in ("losses", "norms"):
            for value, right in zip(result[what], expected[what], strict=True):
                assert abs(value - right) <= 1e-8 * abs(right), what
    got = whole(results, "weights", expected["weights"])
    for name, weight in expected["weights"].items():
        assert (got[name] - weight).norm() <= 1e-8 * weight.norm(), f"weights of {name}"
    # The comparison means something only where the job learns.
    assert expected["losses"][-1] < 0.95 * expected["losses"][0]


def times_the_bound(results: list[dict[str, Any]], expected: dict[str, Any]) -> float:
    """The worst of the first gradient, of which the bound is 1e-10, and of losses and norms, 1e-8."""
    numbers = [
        abs(got / right - 1)
        for result in results
        for what in ("losses", "norms")
        for got, right in zip(result[what], expected[what], strict=True)
    ]
    return max(max(gradient_errors(results, expected["gradients"]).values()) / 1e-10, max(numbers) / 1e-8)
