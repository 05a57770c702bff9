"""One replica's blocks on consecutive ranks: micro-batches go through them in the order of a schedule.

The schedules are PyTorch's (`torch.distributed.pipelining`, an alpha interface that is used in this file only): GPipe
(Huang et al. 2019), 1F1B (Narayanan et al. 2019, PipeDream), interleaved 1F1B (Narayanan et al. 2021), looped
breadth-first (Lamy-Poirier 2023), zero-bubble interleaved and ZBV (Qi et al. 2024), DualPipeV (DeepSeek-AI 2025).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from shoal.errors import LayoutError
from shoal.job.layout import Layout
from shoal.operations import noted

B = TypeVar("B")

Hidden = Tensor | tuple[Tensor, ...]
"""What one stage hands to the next."""

Compute = Callable[[nn.Module, B, Any], Any]
"""(module of a stage, micro-batch, what the stage before hands on or None) -> what it hands on, or of the last stage
the loss."""

Like = Tensor | Sequence[Sequence[Tensor]]
"""Of the shapes and dtypes that are handed on, the same in every micro-batch (any device, no values): a tensor, where
all stages hand on one and a gradient comes back for it; else of each stage but the last its tensors, of which those
that require a gradient get one."""

# Tensors that a forward pass has sent and the next stage may not have taken yet.
_IN_FLIGHT = 8

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "looped_bfs": ScheduleLoopedBFS,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Pipeline(Generic[B]):
    """The stages of this rank, and the schedule that it runs with the other ranks of its pipeline."""

    def __init__(self, modules: dict[int, nn.Module], layout: Layout, group: dist.ProcessGroup, device: torch.device):
        """modules: stage number -> its part of the model, for this rank's stages in their order."""
        self.modules, self.layout, self.group, self.device = modules, layout, group, device
        self.first, self.last = 0 in modules, layout.stage_count - 1 in modules
        self._schedules: dict[tuple[Any, ...], tuple[Any, list[_Stage]]] = {}

    def run(self, batches: Sequence[B], compute: Compute[B], like: Like) -> None:
        """Forward and backward of all micro-batches. like: as nothing about shapes is sent."""
        schedule, stages = self._schedule(len(batches), like)
        for stage in stages:
            stage.batches, stage.compute = batches, compute
            stage.has_backward = True
            stage.clear_runtime_states()
        # Of the first stage only the presence of an argument matters; each stage takes its batch by itself.
        args: list[Any] = [(_NOTHING,)] * len(batches)
        targets = [None] * len(batches)
        schedule._step_microbatches(args, None, targets, None, return_outputs=False)
        for stage in stages:
            stage.clear_runtime_states()
            stage.batches = ()

    @torch.no_grad()
    def forward(self, batches: Sequence[B], compute: Compute[B], like: Like) -> list[Any]:
        """Forward only: what the last stage makes of each micro-batch; empty on other ranks."""
        outputs: list[Any] = []
        sent: deque[tuple[dist.Work | None, Tensor]] = deque()
        for batch in batches:
            for number, module in self.modules.items():
                hidden = None if number == 0 else self._from(number - 1, like)
                out = compute(module, batch, hidden)
                if number == self.layout.stage_count - 1:
                    outputs.append(out)
                elif self._home(number + 1) == self.group.rank():
                    self._own = out
                else:
                    for tensor in (out,) if isinstance(out, Tensor) else out:
                        tensor = tensor.contiguous()
                        home = self._home(number + 1)
                        noted([dist.P2POp(dist.isend, tensor, group=self.group, group_peer=home)])
                        sent.append((dist.isend(tensor, group=self.group, group_dst=home), tensor))
            # A few on their way, not a whole validation's.
            while len(sent) > _IN_FLIGHT or (batch is batches[-1] and sent):
                work, _ = sent.popleft()
                assert work is not None
                work.wait()
        return outputs

    def swap_ends(self, mine: Tensor, other: Tensor) -> list[dist.Work | None]:
        """Sends `mine` from the rank with the first stage to the one with the last, and theirs into `other`."""
        peer = self._home(self.layout.stage_count - 1 if self.first else 0)
        # In one batch: one after the other, two ranks that both send first would wait for each other on NCCL.
        send = dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer)
        receive = dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer)
        return [*dist.batch_isend_irecv(noted([send, receive]))]

    def _from(self, stage: int, like: Like) -> Hidden:
        if self._home(stage) == self.group.rank():
            return self._own
        hidden = tuple(torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in _handed(like, stage))
        for tensor in hidden:
            noted([dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=self._home(stage))])
            dist.recv(tensor, group=self.group, group_src=self._home(stage))
        return hidden[0] if isinstance(like, Tensor) else hidden

    def _home(self, stage: int) -> int:
        """The rank of the pipeline that holds this stage."""
        ranks = range(self.layout.pipeline)
        return next(rank for rank in ranks if stage in self.layout.stages_of(rank))

    def _schedule(self, micro_batches: int, like: Like) -> tuple[Any, list[_Stage]]:
        """Built once for each number of micro-batches and shapes."""
        handed = [_handed(like, stage) for stage in range(self.layout.stage_count - 1)]
        key = (micro_batches, *((t.shape, t.dtype, t.requires_grad) for tensors in handed for t in tensors))
        if key not in self._schedules:
            stages = [
                _Stage(module, number, self.layout.stage_count, self.device, self.group, like)
                for number, module in self.modules.items()
            ]
            kind = _SCHEDULES[self.layout.schedule]
            several = self.layout.stages_per_rank > 1
            # The loss is a sum over tokens, divided later by their number in all: nothing is averaged here.
            try:
                schedule = kind(
                    stages if several else stages[0], micro_batches, loss_fn=lambda loss, _: loss, scale_grads=False
                )
            except ValueError as error:
                what = f"schedule={self.layout.schedule} cannot run {micro_batches} micro-batches: {error}"
                raise LayoutError(
                    what, fix=f"a multiple of {self.layout.pipeline} micro-batches, or schedule=gpipe"
                ) from error
            self._schedules[key] = schedule, stages
        return self._schedules[key]


# In the place of the first stage's input, and of the last one's output.
_NOTHING = torch.empty((), device="meta", requires_grad=True)


def _handed(like: Like, stage: int) -> tuple[Tensor, ...]:
    """What this stage hands on: tensors on meta that say whether they get a gradient."""
    tensors, always = ((like,), True) if isinstance(like, Tensor) else (like[stage], False)
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=always or t.requires_grad) for t in tensors
    )


class _Stage(PipelineStage):
    """Takes its own micro-batch, so that positions, documents and labels need not travel from stage to stage."""

    batches: Sequence[Any] = ()
    compute: Compute[Any]

    def __init__(
        self, module: nn.Module, number: int, count: int, device: torch.device, group: dist.ProcessGroup, like: Like
    ):
        # Explicit shapes: else torch sends them as pickled objects.
        taken = _handed(like, number - 1) if number else (_NOTHING,)
        given = _handed(like, number) if number < count - 1 else (_NOTHING,)
        super().__init__(module, number, count, device, input_args=taken, output_args=given, group=group)
        self._one = isinstance(like, Tensor)
        self._at = -1

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return noted(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return noted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return noted(super().get_bwd_recv_ops(bwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return noted(super().get_bwd_send_ops(bwd_chunk_id))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._at = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        hidden = None if self.is_first else args[0] if self._one else args
        return self.compute(self.submod, self.batches[self._at], hidden)
