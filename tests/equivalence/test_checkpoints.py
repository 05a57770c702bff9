"""What any layout saved, any other loads, weights and optimizer state bit by bit; training goes on from it as if it had
never stopped, and text comes out of it."""

from __future__ import annotations

import functools
from itertools import chain

import pytest
import torch

from shoal.models import build
from shoal.models.decoder import Decoder
from shoal.models.storage import canonical
from shoal.serving.generate import tokens
from shoal.serving.load import fill, load
from shoal.serving.sampler import Sampling
from shoal.serving.source import find
from shoal.shard import Shard
from tests.equivalence import cases, checkpoints

# Every axis alone up to 4 ranks, and what else decides who holds what.
LAYOUTS = [
    "replicas=2",
    "replicas=3",
    "replicas=4",
    "fsdp=2,zero=1",
    "fsdp=2,zero=2",
    "fsdp=2,zero=3",
    "fsdp=3",
    "fsdp=4",
    "tensor=2",
    "tensor=4",
    "context=2",
    "context=3",
    "context=4",
    "context=2,context_by=ulysses",
    "pipeline=2",
    "pipeline=2,schedule=interleaved",
    "pipeline=2,schedule=zbv",
    "pipeline=3",
    "pipeline=4",
]
EXPERT = [
    "fsdp=2,expert=2",
    "fsdp=4,expert=2",
    "fsdp=4,expert=4",
    "context=2,expert=2",
    "tensor=2,expert=2",
    "tensor=4,expert=4",
]
# few experts: with stored experts, and a bias that no gradient reaches; even: key heads on several ranks, stored as one
# with queries and values; borders: trained with Muon, other state for matrices than for the rest.
OF = {
    "few experts": (*LAYOUTS, *EXPERT),
    "even": ("replicas=3", "fsdp=2,zero=1", "fsdp=3", "tensor=2", "tensor=4", "pipeline=2,schedule=zbv"),
    "borders": ("replicas=2", "fsdp=2,tensor=2"),
}
ALL = [(model, layout) for model, layouts in OF.items() for layout in layouts]
# Each goes on from what the next one saved.
TRAINED = {
    "few experts": [
        "replicas=2", "fsdp=2,expert=2", "tensor=2", "context=2,expert=2", "fsdp=2,zero=1", "tensor=2,expert=2",
        "pipeline=2,schedule=zbv", "fsdp=4,expert=4",
    ],
    "even": ["fsdp=3", "tensor=4", "pipeline=2,schedule=zbv", "fsdp=2,tensor=2"],
    "borders": ["fsdp=2,tensor=2", "pipeline=2"],
}  # fmt: skip
TEXTS = [(model, layout) for model, layouts in TRAINED.items() for layout in layouts]
ONWARD = [
    (model, layout, saver)
    for model, layouts in TRAINED.items()
    for layout, saver in zip(layouts, [*layouts[1:], layouts[0]], strict=True)
]


def world(layout: str) -> int:
    return cases.Layout.parse(layout).world


def run(ranks, what: str, layout: str, **args):
    return ranks.run(f"tests.equivalence.checkpoints:{what}", world(layout), layout=layout, **args)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """saved(how, model, layout): a checkpoint in that layout, one of `among`, with `known` values or `trained`."""

    @functools.cache
    def of_world(model: str, size: int, among: tuple[str, ...]) -> dict[tuple[str, str], str]:
        root = str(tmp_path_factory.mktemp("saved"))
        known, trained = ([la for la in known if world(la) == size] for known in (among, TRAINED[model]))
        ranks.run(
            "tests.equivalence.checkpoints:save_all", size, model=model, root=root, known_in=known, trained_in=trained
        )
        names = [*(("known", layout) for layout in known), *(("trained", layout) for layout in trained)]
        return {name: f"{root}/checkpoints/step-{number:08}" for number, name in enumerate(names, 1)}

    return lambda how, model, layout, among=(): of_world(model, world(layout), among or OF[model])[how, layout]


@pytest.mark.parametrize(("model", "layout"), ALL)
def test_a_layout_loads_what_every_layout_saved(ranks, saved, model, layout):
    loads_all(ranks, layout, model, [saved("known", model, other) for other in OF[model] if other != layout])


@pytest.mark.nightly
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_loads_what_every_layout_saved_of_a_dense_model(ranks, saved, layout):
    folders = [saved("known", "even", other, tuple(LAYOUTS)) for other in LAYOUTS if other != layout]
    loads_all(ranks, layout, "even", folders)


def loads_all(ranks, layout: str, model: str, folders: list[str]) -> None:
    results = run(ranks, "load_known", layout, model=model, folders=folders)
    assert not [wrong for wrong, _ in results if wrong]
    checkpoints.assert_all_held(folders[0], list(chain.from_iterable(pieces for _, pieces in results)))


@pytest.mark.parametrize(("model", "layout", "saver"), ONWARD)
def test_the_next_steps_are_those_of_a_run_that_never_stopped(ranks, saved, model, layout, saver):
    results = run(ranks, "go_on", layout, model=model, folder=saved("trained", model, saver))
    expected = cases.reference(checkpoints.STEPS, optimizer=checkpoints.OPTIMIZERS[model], model=model)
    for result in results:
        for what in ("losses", "norms"):
            assert result[what] == pytest.approx(expected[what][1:], rel=1e-8, abs=0)
    weights = cases.whole(results, "weights", expected["weights"])
    for name, weight in expected["weights"].items():
        assert (weights[name] - weight).norm() <= 1e-8 * weight.norm(), name


@pytest.mark.parametrize(("model", "layout"), TEXTS)
def test_text_from_what_a_layout_saved(saved, model, layout):
    """The most likely tokens, as those of the model that one process trained."""
    assert written(load(saved("trained", model, layout))) == one_process(model)


@pytest.mark.parametrize("layout", ["pipeline=2,schedule=zbv", "pipeline=2,tensor=2"])
@torch.no_grad()
def test_ranks_write_what_one_process_does(ranks, saved, layout):
    """From what four ranks saved, with key heads on two each: the same logits in float64, and so the same tokens."""
    folder, text = saved("trained", "even", "tensor=4"), [1, 8, 15]
    source = find(folder)
    model = build(source.options).double().eval()
    fill(source, [Shard(name, tuple(t.shape), (0,) * t.ndim, t) for name, t in canonical(model)])
    text += tokens(model, text, 8, Sampling(0.0, 0, 1.0), 0)
    expected_LV = model(torch.tensor([text]))[0, 2:]
    pieces = [text[:3], *([token] for token in text[3:])]
    results = ranks.run("tests.serving.cases:logits", world(layout), folder=folder, layout=layout, pieces=pieces)
    found = [torch.tensor(rank["logits"], dtype=torch.float64) for rank in results if rank["logits"]]
    assert found
    for made_LV in found:
        assert (made_LV - expected_LV).abs().max() <= 1e-10 * expected_LV.abs().max()
        assert made_LV.argmax(-1)[:-1].tolist() == text[3:]


@functools.cache
def one_process(model: str) -> list[int]:
    expected = cases.reference(checkpoints.STEPS, stop=1, optimizer=checkpoints.OPTIMIZERS[model], model=model)
    decoder = build(checkpoints.job("replicas=1", model).model)
    for name, tensor in canonical(decoder):
        tensor.copy_(expected["weights"][name])
    return written(decoder.eval())


@torch.no_grad()
def written(model: Decoder) -> list[int]:
    return list(tokens(model, [1, 8, 15], 12, Sampling(0.0, 0, 1.0), 0))
