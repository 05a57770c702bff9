"""Time to a loss on slow networks: ways to keep replicas consistent, on hosts whose links are limited for real.

    python benchmarks/network.py [--rate 100mbit] [--workers 4] [--methods ddp/none allreduce/bf16 ...] [--seeds 3]
                                 [--lr 1e-3,2e-3,4e-3] [--longest 2] [--confirm] [--only-steps] [--out FOLDER]
                                 [--format json]

A method is `SYNC/CODEC`: `allreduce/none`, `allreduce/bf16`; options of [sync] follow the first word, as in
`local:every=50/none`. `server:mode=asp,shards=2/none` takes options of [server]. By hand, with torch's
DistributedDataParallel on the same model, data and optimizer: `ddp/none`, and `ddp/powersgd:RANK` with torch's hook.
`ddp/none` always runs: it sets the target. --methods all: the usual ones and MORE below (other codecs, gossip, quorum,
asynchronous DiLoCo, servers with codecs), of which each takes another quarter of an hour or more.

Workload: text of `shoal train` (the source of Python's library; --data for another), a Llama of 10 M parameters, a row
of 256 tokens for each worker and step, fp32, one thread a worker, AdamW with a constant rate after 40 steps of
warm-up. The target is DDP's validation loss at step --steps (400), of each seed. Every method has the same grid of
learning rates: its best is that with the lowest loss at that step with the first seed, and the other seeds take it.

seconds_to_loss = steps to the target × the median of 20 steps on the limited network. Steps are counted on loopback,
for the network does not change them: the loss is looked at every --every steps, with a straight line between two looks,
for at most --longest times --steps; mean of seeds. Where a method does not send in every step, a step takes the mean
over whole periods, at least 20 steps. --confirm: also once from the start to the target on the limited network, with
the first seed; what looking for the loss takes is left out. final_loss is that of step --steps, mean of seeds.
bytes_per_token: sent by all workers in the timed steps, counted by the kernel at their sockets, for each token of these
steps.
--only-steps: just how long a step takes on the limited network, and its bytes, which is minutes instead of hours.

Methods with a server are run as they are, on the limited network, with `shoal train` and `shoal join`, for staleness
depends on it. Servers share hosts with workers, in turn; with --server-hosts N they are on N hosts of their own, whose
links are as slow (a single one takes all pushes), and the coordinator stays with the first worker. seconds_to_loss
is time that has passed, with the looks at the loss (by the first worker, with what it pulled), mean of seeds; rates are
chosen on loopback; bytes_per_token: sent and received by workers.

Hosts are network namespaces with `tc tbf` at both ends of every link (benchmarks/hosts.py): Linux, root, iproute2;
else it says why not, and ends. What has been measured lies in --out and is not measured again, so a long benchmark can
be done in pieces, or go on after it was stopped. Delete the folder when the code has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import network_server
from benchmarks.hosts import Hosts, terminable, why_not

from shoal.data.prepare import Prepared, prepare
from shoal.errors import ShoalError
from shoal.job import Job, Layout, parse, write
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.launch.pool import Pool
from shoal.launch.train import absolute_paths
from shoal.models.spec import count

BASELINE = "ddp/none"
METHODS = [
    BASELINE,
    *(f"ddp/powersgd:{rank}" for rank in (1, 2, 4, 8)),
    *(f"allreduce/{c}" for c in ("none", "bf16", "fp16", "int8", "int4", "topk:0.05+int2", "topk:0.01+int2")),
    *(f"allreduce/powersgd:{rank}" for rank in (1, 2, 4, 8)),
    *(f"local:every=50/{c}" for c in ("none", "int8")),
    "server:mode=bsp,shards=4/none",
    "server:mode=ssp,staleness=4,shards=4/none",
    "server:mode=asp,compensation=look-ahead,shards=4/none",
]
# With `all`.
MORE = [
    *(f"allreduce/{c}" for c in ("sign", "dct:0.05+int2")),
    "gossip:every=50/none",
    "server:mode=quorum,quorum=3,shards=4/none",
    *(f"server:mode=bsp,shards=4/{c}" for c in ("int8", "topk:0.05+int2")),
    *(f"server:mode=asp,compensation=look-ahead,shards=4/{c}" for c in ("int8", "topk:0.05+int2")),
    "server:mode=asp,local_steps=50,compensation=delayed-nesterov,shards=4/none",
]
TIMED = 20
# As tc reads it; without a unit it would be bits/s.
RATE = r"(?i)(?=.*[1-9])\d+(\.\d+)?[kmg]bit"
_DAY = 86400.0


class Method(NamedTuple):
    """options: of [sync], beside name and codec. by_hand: what is compressed how, empty = shoal's."""

    text: str
    sync: str
    options: dict[str, str]
    codec: str

    @classmethod
    def of(cls, text: str) -> Method:
        sync, slash, codec = text.partition("/")
        name, _, options = sync.partition(":")
        pairs = [pair.partition("=") for pair in options.split(",") if pair]
        if not (slash and name and codec) or not all(key and value for key, _, value in pairs):
            raise SystemExit(f"{text!r} is not a method, e.g. allreduce/bf16 or local:every=50/none")
        return cls(text, name, {key: value for key, _, value in pairs}, codec)

    @property
    def by_hand(self) -> str:
        return self.codec if self.sync == "ddp" else ""

    def job(self, base: Job) -> Job:
        """JobError for a sync, codec or option that shoal does not know."""
        if self.by_hand:
            return base.validate()
        plain = r"[+-]?[0-9.]+(e[+-]?\d+)?|true|false"
        given = {"sync": {"name": self.sync, "codec": self.codec}}
        given.setdefault("server" if self.sync == "server" else "sync", {}).update(self.options)
        lines = []
        for table, values in given.items():
            lines += [
                f"[{table}]",
                *(f"{k} = {v if re.fullmatch(plain, v) else json.dumps(v)}" for k, v in values.items()),
            ]
        return parse("\n".join(lines), self.text, base).validate()

    def period(self, what: Job) -> int:
        """Steps after which what is sent repeats itself."""
        return 1 if self.by_hand or self.sync == "allreduce" else int(getattr(what.sync, "every", 1))


def base_job(asked: argparse.Namespace, corpus: Prepared, data: DataOptions) -> Job:
    """The workload, for plain all-reduce."""
    usual = asked.size == "usual"
    shape = (320, 864, 7, 5) if usual else (32, 64, 2, 2)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = ModelOptions(
        vocab_size=corpus.vocab_size,
        **dict(zip(names, shape, strict=True)),
        num_key_value_heads=shape[-1],
        initializer_range=0.06,
    )
    assert not usual or 9.5e6 <= count(model) <= 10.5e6, f"{count(model):,} parameters"
    return Job(
        layout=Layout(replicas=asked.workers), model=model, data=data, sync=SyncOptions(),
        # Warm-up is a share of the steps; how many are really trained does not matter then.
        optim=OptimOptions(betas=(0.9, 0.98), schedule="constant", warmup=0.004),
        train=TrainOptions(steps=10_000, global_batch=asked.workers, precision="fp32", compile="off"),
    )  # fmt: skip


class Bench:
    """All measurements of one command, each from its file where there is one."""

    def __init__(self, asked: argparse.Namespace, corpus: Prepared, base: Job, ending: ExitStack):
        self.asked, self.corpus, self.base, self._ending = asked, corpus, base, ending
        self._started: dict[str, tuple[list[str], Pool]] = {}

    def measured(self, kind: str, key: dict[str, Any], make: Callable[[], Any]) -> Any:
        """What `make()` gives for this key, once."""
        text = json.dumps({"kind": kind, "data": self.corpus.fingerprint, **key}, sort_keys=True)
        file = self.asked.out / f"{kind}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"
        if not file.exists():
            start = time.monotonic()
            value = make()
            seconds = time.monotonic() - start
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".new")
            temporary.write_text(json.dumps({"key": json.loads(text), "seconds": seconds, "value": value}) + "\n")
            temporary.replace(file)
            say(f"{kind} {key['method']}: took {seconds:.0f} s, {file}")
        return json.loads(file.read_text())["value"]

    def train(
        self, method: Method, lr: float, seed: int, target: float | None, longest: int, rate: str = ""
    ) -> dict[str, Any]:
        """rate: of the hosts' links, empty = on loopback."""
        job = method.job(self.base)
        job = replace(job, optim=replace(job.optim, lr=lr), train=replace(job.train, seed=seed))
        asked = self.asked
        how = {
            "job": write(job), "by_hand": method.by_hand, "steps": longest, "least": asked.steps if not rate else 0,
            "target": target, "every": asked.every, "rows": asked.rows,
        }  # fmt: skip
        key = {"method": method.text, "rate": rate, **how}
        kind = "confirm" if rate else "train"
        return self.measured(kind, key, lambda: self._run("train", how, rate)[0])

    def clock(self, method: Method) -> tuple[float, float]:
        """(seconds of a step, bytes that all workers sent for each token) on the limited network."""
        job = method.job(self.base)
        period = method.period(job)
        how = {"job": write(job), "by_hand": method.by_hand, "steps": period * -(-self.asked.timed // period)}
        key = {"method": method.text, "rate": self.asked.rate, **how}
        of_ranks = self.measured("clock", key, lambda: self._run("clock", how, self.asked.rate))
        seconds, tokens = of_ranks[0]["seconds"], of_ranks[0]["tokens"]
        of_step = statistics.median(seconds) if period == 1 else statistics.fmean(seconds)
        return of_step, sum(rank["sent"] for rank in of_ranks) / tokens

    def _run(self, what: str, how: dict[str, Any], rate: str) -> list[Any]:
        entry, world = f"benchmarks.network_ranks:{what}", self.asked.workers
        how = {**how, "prepared": str(self.corpus.folder)}
        if rate not in self._started:
            # Ranks stay on the host that they have entered.
            hosts = self._ending.enter_context(Hosts(world, rate)).names if rate else []
            self._started[rate] = hosts, self._ending.enter_context(Pool(world, ["benchmarks.network_ranks"]))
        hosts, pool = self._started[rate]
        return pool.run(entry, world, timeout=_DAY, names=hosts, **how)

    def serve(
        self, method: Method, lr: float, seed: int, target: float | None, longest: int, rate: str, least: int = 0
    ) -> dict[str, Any]:
        """A run with a parameter server. rate: of the hosts' links, empty = on loopback. least: steps in any case."""
        asked, least = self.asked, least or self.asked.steps
        job = method.job(self.base)
        tokens = asked.rows * job.data.sequence_length
        every = asked.every if least == asked.steps else longest + 1
        train = replace(job.train, seed=seed, validate_every=every, validate_tokens=tokens)
        warmup = min(1.0, job.optim.warmup * job.train.steps / longest)
        checkpoints = replace(job.checkpoint, every=10 * longest)
        job = replace(job, optim=replace(job.optim, lr=lr, warmup=warmup), train=train, checkpoint=checkpoints)
        key = {"method": method.text, "rate": rate, "job": write(job), "target": target, "steps": longest}
        apart = asked.server_hosts if rate else 0
        if apart:
            key["server_hosts"] = apart

        def run() -> dict[str, Any]:
            with Hosts(asked.workers + apart, rate) if rate else nullcontext() as hosts:
                return network_server.train(job, hosts, longest, least, target)

        return self.measured("serve", key, run)

    @property
    def longest(self) -> int:
        """Steps after which a method that has not come to the target does not come to it."""
        return round(self.asked.longest * self.asked.steps)

    def timed_row(self, method: Method) -> dict[str, Any]:
        """Of a step on the limited network, and nothing else."""
        if method.sync == "server":
            # Whole rounds, where workers take steps of their own.
            own = int(method.options.get("local_steps", 1))
            steps = own * max(-(-self.asked.timed // own), min(own, 2))
            run = self.serve(method, self.asked.lr[0], 0, None, steps, self.asked.rate, least=steps)
            of_step, of_token = run["total_seconds"] / run["steps"], run["moved"] / run["tokens"]
        else:
            of_step, of_token = self.clock(method)
        return {
            "sync": method.text.partition("/")[0], "codec": method.codec, "seconds_per_step": of_step,
            "bytes_per_token": of_token, "rate": self.asked.rate, "workers": self.asked.workers,
        }  # fmt: skip

    def best_rate(self, method: Method) -> float:
        """Of the grid, with the first seed."""
        steps = self.asked.steps

        def loss(lr: float) -> float:
            served = method.sync == "server"
            return (
                last(self.serve(method, lr, 0, None, steps, ""))
                if served
                else loss_at(self.train(method, lr, 0, None, steps), steps)
            )

        return min(self.asked.lr, key=loss)

    def targets(self) -> list[float]:
        """DDP's loss with each seed."""
        method, steps = Method.of(BASELINE), self.asked.steps
        lr = self.best_rate(method)
        return [loss_at(self.train(method, lr, seed, None, steps), steps) for seed in range(self.asked.seeds)]

    def served_row(self, method: Method, targets: list[float]) -> dict[str, Any]:
        """Of a method with a server."""
        steps, lr, rate = self.asked.steps, self.best_rate(method), self.asked.rate
        runs = [self.serve(method, lr, seed, target, self.longest, rate) for seed, target in enumerate(targets)]
        reached = [at for run, target in zip(runs, targets, strict=True) if (at := first(run, target)) is not None]
        final = [near(run, steps) for run in runs]
        all_reached = len(reached) == len(targets)
        return {
            "sync": method.text.partition("/")[0], "codec": method.codec,
            "seconds_to_loss": statistics.fmean(at["seconds"] for at in reached) if all_reached else None,
            "bytes_per_token": sum(run["moved"] for run in runs) / sum(run["tokens"] for run in runs),
            "final_loss": statistics.fmean(final),
            "steps_to_loss": [at["step"] for at in reached] if all_reached else None,
            "seconds_per_step": sum(run["total_seconds"] for run in runs) / sum(run["steps"] for run in runs),
            "lr": lr, "final_losses": final, "rate": rate, "workers": self.asked.workers,
            "staleness": [run["staleness"] for run in runs], "rejected": [run["rejected"] for run in runs],
            "server_hosts": self.asked.server_hosts,
        }  # fmt: skip

    def row(self, method: Method, targets: list[float]) -> dict[str, Any]:
        """speedup_vs_ddp comes later."""
        if method.sync == "server":
            return self.served_row(method, targets)
        steps, lr = self.asked.steps, self.best_rate(method)
        found, final = [], []
        for seed, target in enumerate(targets):
            # Those runs are there already: of the grid, and of the targets.
            short = seed == 0 or method.text == BASELINE
            run = self.train(method, lr, seed, None, steps) if short else None
            if run is None or first(run, target) is None:
                run = self.train(method, lr, seed, target, self.longest)
            final.append(loss_at(run, steps))
            found.append(first(run, target))
        reached = [at["step"] for at in found if at is not None]
        of_step, bytes_per_token = self.clock(method)
        all_reached = len(reached) == len(targets)
        row = {
            "sync": method.text.partition("/")[0], "codec": method.codec,
            "seconds_to_loss": statistics.fmean(reached) * of_step if all_reached else None,
            "bytes_per_token": bytes_per_token, "final_loss": statistics.fmean(final),
            "steps_to_loss": reached if all_reached else None, "seconds_per_step": of_step, "lr": lr,
            "final_losses": final, "rate": self.asked.rate, "workers": self.asked.workers,
        }  # fmt: skip
        if self.asked.confirm:
            confirmed = first(self.train(method, lr, 0, targets[0], self.longest, self.asked.rate), targets[0])
            row["confirmed_seconds"] = confirmed and confirmed["seconds"]
        return row


def loss_at(run: dict[str, Any], step: int) -> float:
    return dict(map(tuple, run["losses"]))[step]


def near(run: dict[str, Any], step: int) -> float:
    """The loss at the look that is nearest: a server's first worker looks where its own samples come to another one."""
    return min(run["losses"], key=lambda look: abs(look[0] - step))[1]


def last(run: dict[str, Any]) -> float:
    return run["losses"][-1][1]


def first(run: dict[str, Any], target: float) -> dict[str, float] | None:
    """Where the loss comes down to the target for the first time: the step, and the seconds until then; on a straight
    line between two looks. None where it does not."""
    before = None
    for (step, loss), seconds in zip(run["losses"], run["seconds"], strict=True):
        if loss <= target:
            part = (before[1] - target) / (before[1] - loss) if before else 1.0
            step0, seconds0 = (before[0], before[2]) if before else (0, 0.0)
            return {"step": step0 + part * (step - step0), "seconds": seconds0 + part * (seconds - seconds0)}
        before = step, loss, seconds
    return None


def table(row: dict[str, Any]) -> str:
    def said(name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    return (
        f"{row['sync'] + '/' + row['codec']:<28} {said('seconds_to_loss', ',.1f'):>9} s to the loss   "
        f"×{said('speedup_vs_ddp', '.2f')}   {said('seconds_per_step', '.3f')} s a step   "
        f"{row['bytes_per_token']:,.0f} bytes a token   loss {said('final_loss', '.4f')}   lr {said('lr', 'g')}"
        + (f"   confirmed {said('confirmed_seconds', ',.1f')} s" if "confirmed_seconds" in row else "")
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rows_of(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The baseline's and those of the methods that this shoal accepts, in the order asked for."""
    data = DataOptions(source=(asked.data,), tokenizer=asked.tokenizer, sequence_length=asked.length, cache=asked.cache)
    corpus = prepare(data, say=say)
    base = absolute_paths(base_job(asked, corpus, data))
    methods = []
    for method in map(Method.of, dict.fromkeys([BASELINE, *asked.methods])):
        try:
            method.job(base)
            methods.append(method)
        except ShoalError as error:
            say(f"{method.text}: left out: {error}")
    rows = []
    with terminable(), ExitStack() as ending:
        bench = Bench(asked, corpus, base, ending)
        if asked.only_steps:
            for method in methods:
                rows.append(bench.timed_row(method))
                say(table(rows[-1]))
            return rows
        targets = bench.targets()
        say(f"target: {', '.join(f'{target:.4f}' for target in targets)} nats per token")
        for method in methods:
            row = bench.row(method, targets)
            ours, ddps = row["seconds_to_loss"], (rows or [row])[0]["seconds_to_loss"]
            row["speedup_vs_ddp"] = ddps / ours if ours and ddps else None
            rows.append(row)
            say(table(row))
    return rows


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="of every host's link, as tc writes it")
    parser.add_argument("--workers", type=int, default=4, help="hosts, with a worker on each")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="SYNC/CODEC", help="or all")
    parser.add_argument("--server-hosts", type=int, default=0, help="for servers alone; 0 = they are with workers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=lambda text: [float(lr) for lr in text.split(",")], default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--steps", type=int, default=400, help="after which DDP's loss is the target")
    parser.add_argument("--every", type=int, default=10, help="steps between two looks at the loss; divides --steps")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows that the loss is of")
    parser.add_argument("--timed", type=int, default=TIMED, help="steps that are timed on the limited network")
    parser.add_argument("--longest", type=float, default=2.0, help="times --steps, until the target is given up")
    parser.add_argument("--only-steps", action="store_true", help="time steps and count bytes, no losses")
    parser.add_argument("--confirm", action="store_true", help="also from start to target on the limited network")
    parser.add_argument("--data", default="python", help="text, as for shoal train --data")
    parser.add_argument("--tokenizer", default="bpe")
    parser.add_argument("--cache", default="", help="as data.cache")
    parser.add_argument("--length", type=int, default=256, help="tokens for each worker and step")
    parser.add_argument(
        "--size", choices=["usual", "tiny"], default="usual", help="of the model; tiny: to try the program"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/network"), help="folder of what has been measured")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    asked = parser.parse_args()
    if asked.steps % asked.every:
        parser.error("--every does not divide --steps")
    if asked.workers < 2:
        parser.error("--workers is less than 2: there is nobody to send to")
    if not re.fullmatch(RATE, asked.rate):
        parser.error(f"--rate {asked.rate}: a number and its unit, e.g. 10mbit, 1gbit")
    if asked.server_hosts < 0:
        parser.error("--server-hosts is less than 0")
    if asked.methods == ["all"]:
        asked.methods = [*METHODS, *MORE]
    return asked


def main() -> None:
    asked = options()
    if reason := why_not():
        say(f"skipped: {reason}")
        if asked.format == "json":
            print(json.dumps({"rows": [], "skipped": reason}))
        return
    rows = rows_of(asked)
    print(json.dumps({"rows": rows}) if asked.format == "json" else "\n".join(map(table, rows)))


if __name__ == "__main__":
    main()
