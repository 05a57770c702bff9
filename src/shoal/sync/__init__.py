"""How replicas are kept consistent: how often, through whom, in which encoding."""

from shoal.sync.allreduce import AllReduce

SYNCS = {"allreduce": AllReduce}
