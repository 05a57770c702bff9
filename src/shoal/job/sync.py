"""How the replicas are kept consistent."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import at_least, one_of, positive, require
from shoal.job.codec import POWERSGD, parse
from shoal.job.idle import OF_SYNC, refuse_idle
from shoal.job.shares import AUTO, flaw
from shoal.job.shares import parse as parse_shares


@dataclass(frozen=True)
class SyncOptions:
    """Replicas agree by all-reducing gradients every step, or train apart and come together every so many steps, or
    push gradients to a server."""

    name: str = "allreduce"
    """`allreduce`: every step, sums of gradients over all replicas. `local`: each replica takes steps of its own, and
    after `every` of them an outer optimizer moves the common weights by the mean of what replicas have learned (local
    SGD, DiLoCo; docs/local-steps.md). `gossip`: the same, but every replica averages with one other, another one each
    time (docs/gossip.md). `server`: replicas are workers of a parameter server, whose options are in [server]
    (docs/parameter-server.md)."""
    codec: str = "none"
    """How gradients are written on their way between replicas: `none` = as they are; `auto` = `none`, `bf16` or `int8`,
    by what an exchange takes at the start of the run; `bf16` or `fp16` = in half the
    bytes, `int8`, `int4`, `int2`, `sign` = in 8, 4, 2, 1 bits and a scale for every 64 numbers; `topk:SHARE` = the
    largest, `randomk:SHARE` = some, `dct:SHARE` = the largest of their cosine transform, each also rounded, as in
    `topk:0.05+int2`; `powersgd:RANK` = each matrix as a product of two that have RANK columns, with `allreduce` only.
    With `:unbiased`, `int8`, `int4` and `randomk:SHARE` are right on average (docs/codecs.md).
    Numbers are encoded once on the way there and once on the way back. Sums are made in full precision. With
    `local`, what replicas have learned; with `server`, what workers push and pull."""
    feedback: bool = True
    """Whether what a codec has lost of a gradient is kept and added to the next one. That takes the bytes of a rank's
    gradients once more, and of sums one part in as many as there are replicas; of both twice as much during a step.
    Checkpoints hold it."""
    every: int = 50
    """local, gossip: steps between two exchanges of the same numbers."""
    outer_lr: float = 0.7
    """local, gossip, server with local_steps: learning rate of the outer optimizer; 1, with `outer_momentum` 0,
    averages weights."""
    outer_momentum: float = -1.0
    """local, server with local_steps: Nesterov momentum of the outer optimizer; gossip: momentum of the slow weights.
    -1 = 0.9 with local and server, 0.5 with gossip."""
    pull: float = 0.0
    """gossip: what part of the way to the mean of a pair its slow weights gain in velocity when they meet; 0 = half of
    the largest that does not drive them apart, 1 - momentum²."""
    fragments: int = 1
    """local: parts of the model that are exchanged in turn, each once in `every` steps: as many bytes, lower peaks."""
    delay: int = 0
    """local: steps for which a fragment may be on its way while training goes on; less than `every`."""
    mix: float = 0.0
    """local: share of its own weights that a replica keeps when a fragment arrives, 0 to less than 1."""
    together: int = 0
    """local: steps at the start of the run with all-reduce (post-local SGD)."""
    pace: str = ""
    """local, on uneven machines: steps of its own that each replica takes in the same time, e.g. `2+1` = the second one
    takes every other step; empty = all the same; `auto` = by their speeds, as measured when a run begins."""
    bucket_mib: float = 25.0
    """Gradients that travel together, in MiB; small buckets start early, large ones cost fewer latencies."""
    timeout: float = 600.0
    """Seconds after which a collective that does not end is an error."""

    compare: bool = True
    """Before every checkpoint, whether what several ranks hold is still equal to the last bit; if not, the run ends."""

    @property
    def momentum(self) -> float:
        """Of the outer optimizer."""
        if self.outer_momentum >= 0:
            return self.outer_momentum
        return 0.5 if self.name == "gossip" else 0.9

    @property
    def pulled(self) -> float:
        """`pull`, decided."""
        return self.pull or 1 - self.momentum**2

    def validate(self) -> None:
        one_of("sync.name", self.name, ("allreduce", "local", "gossip", "server"))
        if self.codec not in ("none", "auto"):
            self._validate_codec()
        positive("sync.bucket_mib", self.bucket_mib)
        positive("sync.timeout", self.timeout)
        self._validate_rounds()

    def _validate_codec(self) -> None:
        kept = parse(self.codec)[0]
        require(
            kept.name != POWERSGD or self.name == "allreduce",
            f"sync.codec={self.codec!r} excludes sync.name={self.name}: PowerSGD is of sums over replicas, each step",
            "sync.name=allreduce, or e.g. sync.codec=topk:0.01+int2",
        )
        require(
            not (self.feedback and kept.name == "randomk" and kept.unbiased),
            f"sync.codec={self.codec!r} with sync.feedback: what is lost would be more in every step",
            self.codec.replace(":unbiased", "", 1) + (", or sync.feedback=false" if self.name != "server" else ""),
        )

    def _validate_rounds(self) -> None:
        for name in ("every", "fragments"):
            at_least(f"sync.{name}", getattr(self, name), 1)
        positive("sync.outer_lr", self.outer_lr)
        for name in ("delay", "together"):
            at_least(f"sync.{name}", getattr(self, name), 0)
        require(0 <= self.mix < 1, f"sync.mix={self.mix} is not in [0, 1)", "e.g. 0.5")
        what = f"sync.outer_momentum={self.outer_momentum} is not in [0, 1)"
        require(0 <= self.outer_momentum < 1 or self.outer_momentum == -1, what, "e.g. 0.9, or -1 for the usual one")
        if self.name == "gossip":
            self._validate_gossip()
        if self.name == "server":
            self._validate_server()
        if self.pace:
            self._validate_pace()
        refuse_idle(self, OF_SYNC, "sync.", "name")
        require(
            self.fragments <= self.every,
            f"sync.fragments={self.fragments} take turns in sync.every={self.every} steps: more than one a step",
            f"sync.fragments={self.every} or fewer",
        )
        require(
            self.delay < self.every,
            f"sync.delay={self.delay} is not less than sync.every={self.every}: a fragment would leave twice",
            f"sync.delay={self.every - 1} or less",
        )

    def _validate_pace(self) -> None:
        what = f"sync.pace={self.pace[:60]!r} with sync.name={self.name}: only replicas that train apart have a pace"
        require(self.name == "local", what, "sync.name=local; or leave out sync.pace, and take layout replica_share")
        if self.pace == AUTO:
            return
        why = flaw(self.pace)
        require(not why, f"sync.pace={self.pace[:60]!r} {why}", f"a number for each replica, such as 2+1, or {AUTO}")
        paces = parse_shares(self.pace)
        require(
            self.every * min(paces) >= max(paces),
            f"sync.pace={self.pace}: a replica would take no step of sync.every={self.every}",
            f"sync.every={-(-max(paces) // min(paces))} or more",
        )

    def _validate_gossip(self) -> None:
        at_least("sync.pull", self.pull, 0)
        # From there on the variance of replicas that meet at random, without any gradient, grows.
        most = 2 * (1 - self.momentum**2)
        what = f"sync.pull={self.pull} with sync.outer_momentum={self.momentum} would drive replicas apart"
        require(self.pull < most, what, f"less than {most:.3g}, or 0 for half of that")
        others = {"fragments": 1, "delay": 0, "mix": 0.0, "together": 0, "codec": "none"}
        for name, none in others.items():
            what = f"sync.name=gossip excludes sync.{name}: pairs exchange whole models, in full precision"
            require(getattr(self, name) == none, what, f"leave out sync.{name}, or take sync.name=local")

    def _validate_server(self) -> None:
        for name in ("every", "pull", "fragments", "delay", "mix", "together"):
            what = f"sync.name=server excludes sync.{name}: workers exchange with servers, not with each other"
            usual = getattr(self, name) == getattr(SyncOptions, name)
            require(usual, what, f"leave out sync.{name}, or take sync.name=local")
