"""How replicas are kept consistent: how often, through whom, in which encoding."""

from shoal.job import Job
from shoal.job.codec import POWERSGD, parse
from shoal.mesh import Mesh
from shoal.sync.allreduce import AllReduce
from shoal.sync.codec import Codec, Draws, codec_of
from shoal.sync.gossip import Gossip
from shoal.sync.local import Local
from shoal.sync.lowrank import LowRank

Sync = AllReduce | Local | Gossip


def build(job: Job, mesh: Mesh) -> Sync:
    """As the job says. `job` has been validated."""
    assert job.sync.name != "server", "its replicas are workers, with processes of their own (training.server)"
    draws = Draws(job.train.seed, mesh.rank)
    codec = _codec(job, draws)
    if job.sync.name == "local":
        assert not isinstance(codec, LowRank), "validated"
        return Local(mesh, job.optim.clip, codec, job.sync, draws)
    if job.sync.name == "gossip":
        return Gossip(mesh, job.optim.clip, job.sync, job.train.seed)
    return AllReduce(mesh, job.optim.clip, codec, job.sync.feedback, draws)


def _codec(job: Job, draws: Draws) -> Codec | LowRank | None:
    """How what replicas send each other is written, None = as it is."""
    if job.sync.codec == "none":
        return None
    first = parse(job.sync.codec)[0]
    return LowRank(first.rank, job.train.seed) if first.name == POWERSGD else codec_of(job.sync.codec, draws)
