"""One replica's blocks on consecutive ranks: micro-batches go through them in the order of a schedule.

The schedules are PyTorch's (`torch.distributed.pipelining`, an alpha interface that is used in this file only): GPipe
(Huang et al. 2019), 1F1B (Narayanan et al. 2019, PipeDream), interleaved 1F1B (Narayanan et al. 2021), looped
breadth-first (Lamy-Poirier 2023), zero-bubble interleaved and ZBV (Qi et al. 2024), DualPipeV (DeepSeek-AI 2025).
"""

from __future__ import annotations

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

from shoal.job.layout import Layout

B = TypeVar("B")

Compute = Callable[[nn.Module, B, Tensor | None], Tensor]
"""(module of a stage, micro-batch, hidden states from the stage before or None) -> hidden states, or of the last stage
the loss."""

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
        self._schedules: dict[tuple[int, tuple[int, ...], torch.dtype], tuple[Any, list[_Stage]]] = {}

    def run(self, batches: Sequence[B], compute: Compute[B], like: Tensor) -> None:
        """Forward and backward of all micro-batches.

        like: of the shape, dtype and device of the hidden states that one stage hands to the next (any device, no
        values), the same in every micro-batch: nothing about shapes is sent.
        """
        schedule, stages = self._schedule(len(batches), like)
        for stage in stages:
            stage.batches, stage.compute = batches, compute
            stage.has_backward = True
            stage.clear_runtime_states()
        # Of the first stage only the presence of an argument matters; each stage takes its batch by itself.
        args: list[Any] = [(like,)] * len(batches)
        targets = [None] * len(batches)
        schedule._step_microbatches(args, None, targets, None, return_outputs=False)
        for stage in stages:
            stage.clear_runtime_states()
            stage.batches = ()

    @torch.no_grad()
    def forward(self, batches: Sequence[B], compute: Compute[B], like: Tensor) -> list[Tensor]:
        """Forward only: what the last stage makes of each micro-batch; empty on other ranks."""
        outputs: list[Tensor] = []
        sent: list[tuple[dist.Work | None, Tensor]] = []
        for batch in batches:
            for number, module in self.modules.items():
                hidden = None if number == 0 else self._from(number - 1, like)
                out = compute(module, batch, hidden)
                if number == self.layout.stage_count - 1:
                    outputs.append(out)
                elif self._home(number + 1) == self.group.rank():
                    self._own = out
                else:
                    out = out.contiguous()
                    sent.append((dist.isend(out, group=self.group, group_dst=self._home(number + 1)), out))
        for work, _ in sent:
            assert work is not None
            work.wait()
        return outputs

    def swap_ends(self, mine: Tensor, other: Tensor) -> list[dist.Work | None]:
        """Sends `mine` from the rank with the first stage to the one with the last, and theirs into `other`."""
        peer = self._home(self.layout.stage_count - 1 if self.first else 0)
        return [dist.isend(mine, group=self.group, group_dst=peer), dist.irecv(other, group=self.group, group_src=peer)]

    def _from(self, stage: int, like: Tensor) -> Tensor:
        if self._home(stage) == self.group.rank():
            return self._own
        hidden = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        dist.recv(hidden, group=self.group, group_src=self._home(stage))
        return hidden

    def _home(self, stage: int) -> int:
        """The rank of the pipeline that holds this stage."""
        ranks = range(self.layout.pipeline)
        return next(rank for rank in ranks if stage in self.layout.stages_of(rank))

    def _schedule(self, micro_batches: int, like: Tensor) -> tuple[Any, list[_Stage]]:
        """Built once for each number of micro-batches and shape."""
        key = (micro_batches, tuple(like.shape), like.dtype)
        if key not in self._schedules:
            stages = [
                _Stage(module, number, self.layout.stage_count, self.device, self.group, like)
                for number, module in self.modules.items()
            ]
            kind = _SCHEDULES[self.layout.schedule]
            several = self.layout.stages_per_rank > 1
            # The loss is a sum over tokens, divided later by their number in all: nothing is averaged here.
            schedule = kind(
                stages if several else stages[0], micro_batches, loss_fn=lambda loss, _: loss, scale_grads=False
            )
            self._schedules[key] = schedule, stages
        return self._schedules[key]


class _Stage(PipelineStage):
    """Takes its own micro-batch, so that positions, documents and labels need not travel from stage to stage."""

    batches: Sequence[Any] = ()
    compute: Compute[Any]

    def __init__(
        self, module: nn.Module, number: int, count: int, device: torch.device, group: dist.ProcessGroup, like: Tensor
    ):
        # Explicit shapes: else torch sends them as pickled objects.
        hidden = torch.empty(like.shape, dtype=like.dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=like.dtype, device="meta", requires_grad=True)
        out = loss if number == count - 1 else hidden
        super().__init__(module, number, count, device, input_args=hidden, output_args=out, group=group)
        self._at = -1

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._at = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self.submod, self.batches[self._at], None if self.is_first else args[0])
