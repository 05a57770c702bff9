"""When simulated messages arrive: every replica has one line into the network, with a rate each way and a delay."""

from __future__ import annotations

import math

# Bytes of a message that goes in one packet: connections share a line, so it finds its way between those of others.
_PACKET = 1500


class Links:
    """Lines of replicas, each used both ways at once, one message after the other each way. Times are in seconds.

    sent: bytes that have gone out of each line: what is in messages, without headers of protocols.
    """

    def __init__(self, replicas: int, rate: float = math.inf, delay: float = 0.0):
        """rate: bits a second of each line, each way. delay: seconds that a message is on its way besides."""
        self.rate, self.delay = rate, delay
        self.sent = [0] * replicas
        self._out, self._in = [0.0] * replicas, [0.0] * replicas

    def message(self, sender: int, receiver: int, size: int, time: float) -> float:
        """When so many bytes that may leave at this time have arrived."""
        seconds = 8 * size / self.rate
        self.sent[sender] += size
        if size <= _PACKET:
            return time + seconds + self.delay
        leaves = max(time, self._out[sender])
        self._out[sender] = leaves + seconds
        self._in[receiver] = max(leaves + self.delay, self._in[receiver]) + seconds
        return self._in[receiver]

    def pair(self, one: int, other: int, size: int, time: float) -> float:
        """When two that have come together at this time have each other's bytes."""
        return max(self.message(one, other, size, time), self.message(other, one, size, time))

    def direct(self, size: int, begun: list[float]) -> list[float]:
        """When each replica has what every other one sent it, so many bytes, as soon as it began."""
        replicas, ends = len(begun), list(begun)
        for turn in range(1, replicas):
            for sender in range(replicas):
                receiver = (sender + turn) % replicas
                arrives = self.message(sender, receiver, size, begun[sender])
                ends[receiver] = max(ends[receiver], arrives)
                ends[sender] = max(ends[sender], self._out[sender])
        return ends

    def ring(self, size: int, begun: list[float], rounds: int) -> list[float]:
        """When each replica is done, if in each round all send their neighbour so many bytes that the last one gave.

        An all-gather of n replicas has n − 1 rounds, an all-reduce twice as many (Patarasuk & Yuan 2009, "Bandwidth
        optimal all-reduce algorithms for clusters of workstations").
        """
        replicas, at = len(begun), list(begun)
        for _ in range(rounds):
            arrived = [0.0] * replicas
            for sender in range(replicas):
                receiver = (sender + 1) % replicas
                arrived[receiver] = self.message(sender, receiver, size, at[sender])
            at = [max(before, now) for before, now in zip(at, arrived, strict=True)]
        return at
