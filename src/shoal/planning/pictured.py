"""A simulated step as the spans that a traced one has, so that the same chart and the same file show it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoal.observe.trace import Kind, Recording, Span
from shoal.planning.schedules import BACKWARD, FORWARD, INPUT, WEIGHT
from shoal.planning.simulation import Picture, Scene
from shoal.planning.timeline import Event

_NAMES: dict[int, tuple[str, Kind]] = {
    FORWARD: ("forward", "forward"),
    BACKWARD: ("backward", "backward"),
    INPUT: ("backward: input", "backward"),
    WEIGHT: ("backward: weights", "backward"),
}


def recordings(scene: Scene, picture: Picture, pipelines: Iterable[int]) -> list[Recording]:
    """Of every actor of these pipelines, numbered as `Scene.slow` counts them: all ranks of the first pipeline, then
    those of the next."""
    return [
        Recording(pipeline * scene.ranks + rank, f"pipeline {pipeline}", "simulated", 0, list(spans))
        for pipeline in pipelines
        for rank, spans in _by_rank(scene, picture, pipeline)
    ]


def _by_rank(scene: Scene, picture: Picture, pipeline: int) -> Iterator[tuple[int, Iterator[Span]]]:
    events: list[list[Event]] = [[] for _ in range(scene.ranks)]
    for event in picture.step.events(pipeline):
        events[event.rank].append(event)
    for rank, own in enumerate(events):
        yield rank, _spans(scene, own, picture.longest)


def _spans(scene: Scene, events: list[Event], longest: float) -> Iterator[Span]:
    """Of one rank: what it computes, what it waits between, and the step's end, which is the same for all."""
    now = 0.0
    for event in events:
        if event.start > now:
            yield _span("wait", "wait", now, event.start)
        name, kind = _NAMES[event.kind]
        yield _span(name, kind, event.start, event.end, event.stage, event.micro_batch)
        now = event.end
    if longest > now:
        yield _span("wait for the last", "wait", now, longest)
    done = longest + scene.exchange
    if scene.exchange:
        yield _span("gradients", "communication", longest, done)
    if scene.optimizer:
        yield _span("optimizer", "optimizer", done, done + scene.optimizer)


def _span(
    name: str, kind: Kind, start: float, end: float, stage: int | None = None, micro_batch: int | None = None
) -> Span:
    return Span(name, kind, round(start * 1e9), round(end * 1e9), stage=stage, micro_batch=micro_batch)
