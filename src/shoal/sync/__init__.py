"""How replicas are kept consistent: how often, through whom, in which encoding."""

from shoal.job import Job
from shoal.mesh import Mesh
from shoal.sync.allreduce import AllReduce
from shoal.sync.codec import Draws, codec_of
from shoal.sync.gossip import Gossip
from shoal.sync.local import Local

Sync = AllReduce | Local | Gossip


def build(job: Job, mesh: Mesh) -> Sync:
    """As the job says. `job` has been validated."""
    assert job.sync.name != "server", "its replicas are workers, with processes of their own (training.server)"
    draws = Draws(job.train.seed, mesh.rank)
    codec = codec_of(job.sync.codec, draws) if job.sync.codec != "none" else None
    if job.sync.name == "local":
        return Local(mesh, job.optim.clip, codec, job.sync, draws)
    if job.sync.name == "gossip":
        return Gossip(mesh, job.optim.clip, job.sync, job.train.seed)
    return AllReduce(mesh, job.optim.clip, codec, job.sync.feedback, draws)
