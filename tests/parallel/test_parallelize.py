"""Any module, in every layout that it can have, computes what plain PyTorch computes in one process."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from shoal import ShoalError, parallelize
from shoal.errors import DataError, JobError, LayoutError, ModelError
from shoal.job import Layout
from tests.equivalence import cases
from tests.parallel import own_cases

STEPS = 5

LAYOUTS = [
    ("convnet", "replicas=2"),
    ("convnet", "fsdp=2"),
    ("convnet", "pipeline=2"),
    ("convnet", "replicas=2,pipeline=2,schedule=interleaved"),
    ("two_tower", "replicas=1"),
    ("two_tower", "fsdp=2,zero=2"),
    ("two_tower", "pipeline=4"),
    ("two_tower", "pipeline=2,fsdp=2"),
    ("two_tower", "tensor=2"),
    ("two_tower", "replicas=2,tensor=2"),
    ("hf_module", "pipeline=2"),
    ("hf_module", "fsdp=2,tensor=2"),
    ("qwen3", "tensor=2"),
    ("mixed", "replicas=2"),
    ("mixed", "fsdp=2"),
    ("mixed", "pipeline=3"),
    ("mixed", "pipeline=2,schedule=looped_bfs"),
    ("mixed", "pipeline=2,fsdp=2,schedule=interleaved"),
    ("weight_norm", "fsdp=2"),
    ("weight_norm", "pipeline=2"),
]
MORE = [
    ("hf_module", "fsdp=2"),
    *((name, f"pipeline=2,schedule={s}") for name in own_cases.MODULES for s in ("gpipe", "interleaved", "looped_bfs")),
    *((name, "replicas=2,pipeline=2,fsdp=2") for name in own_cases.MODULES),
    *((name, "replicas=2,fsdp=2,tensor=2") for name in ("two_tower", "hf_module")),
    *((name, f"fsdp=4,zero={zero}") for name in own_cases.MODULES for zero in (1, 2)),
]


@functools.cache
def reference(name: str, optimizer: str, steps: int = STEPS, samples: int = own_cases.SAMPLES):
    return own_cases.reference(name, steps, optimizer, samples)


def times_the_bound(ranks, name: str, layout: str, optimizer: str, steps: int = STEPS, bug: str = "") -> float:
    """The worst of the first gradient (bound 1e-10), losses, norms, held-out loss and last weights (1e-8)."""
    asked = Layout.parse(layout)
    # Two micro-batches a rank at least: more than one adds up, and a pipeline's schedule has them.
    samples = max(own_cases.SAMPLES, 2 * own_cases.MICRO_BATCH * asked.readers)
    expected = reference(name, optimizer, steps, samples)
    results = ranks.run(
        "tests.parallel.own_cases:run", asked.world, name=name, layout=layout, steps=steps, optimizer=optimizer,
        bug=bug, samples=samples,
    )  # fmt: skip
    worst = max(cases.gradient_errors(results, expected["gradients"]).values()) / 1e-10
    for result in results:
        for what in ("losses", "norms"):
            errors = [abs(got / right - 1) for got, right in zip(result[what], expected[what], strict=True)]
            worst = max(worst, *(finite(error) / 1e-8 for error in errors))
        if "held_out" in result:
            worst = max(worst, finite(abs(result["held_out"] / expected["held_out"] - 1)) / 1e-8)
        assert result["weights"].keys() == expected["weights"].keys()
        for key, right in expected["weights"].items():
            got = torch.tensor(result["weights"][key], dtype=right.dtype)
            worst = max(worst, cases.apart(got, right, right) / 1e-8)
    return worst


def finite(error: float) -> float:
    """What is no number is larger than any bound, which `max` would not say."""
    return error if math.isfinite(error) else math.inf


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_computes_what_one_process_does(ranks, name: str, layout: str) -> None:
    # SGD shows a gradient of the wrong size, which AdamW hides.
    assert times_the_bound(ranks, name, layout, "sgd") <= 1
    expected = reference(name, "sgd")
    assert expected["losses"][-1] < 0.99 * expected["losses"][0]


@pytest.mark.parametrize(("name", "layout"), [("mixed", "pipeline=2,fsdp=2"), ("two_tower", "fsdp=2,tensor=2")])
def test_with_adam(ranks, name: str, layout: str) -> None:
    assert times_the_bound(ranks, name, layout, "adamw") <= 1


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("name", "layout"), MORE)
def test_more_layouts(ranks, name: str, layout: str, optimizer: str) -> None:
    assert times_the_bound(ranks, name, layout, optimizer, steps=20) <= 1


# Each with a module and a layout in which it can happen.
PLANTED = {
    "tied gradients added twice": ("mixed", "pipeline=3"),
    "tied gradients not added": ("mixed", "pipeline=3"),
    "tied parameters counted in every stage": ("mixed", "pipeline=3"),
    "mean instead of sum": ("mixed", "replicas=2"),
    "statistics of the first rank": ("convnet", "replicas=2"),
    "no sum behind rows": ("two_tower", "tensor=2"),
    "gradient in front of columns not summed": ("two_tower", "tensor=2"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, bug: str) -> None:
    name, layout = PLANTED[bug]
    before_the_first_step = {
        "no sum behind rows": "the module computes something else",
        "gradient in front of columns not summed": "split as planned, the gradient of 'user.weight' is another",
    }
    if bug in before_the_first_step:
        # Seen by what the module makes of the example.
        with pytest.raises(LayoutError, match=before_the_first_step[bug]):
            times_the_bound(ranks, name, layout, "sgd", 2, bug)
        return
    assert times_the_bound(ranks, name, layout, "sgd", 2) <= 1
    times = times_the_bound(ranks, name, layout, "sgd", 2, bug)
    print(f"{name}, {layout}, {bug}: {times:.1e} times the bound")
    assert times > 100


@pytest.mark.parametrize(
    ("name", "saved", "loaded"),
    [("mixed", "pipeline=2,fsdp=2", "replicas=2"), ("convnet", "replicas=2", "pipeline=2")],
)
def test_a_checkpoint_goes_on_in_another_layout(ranks, tmp_path, name: str, saved: str, loaded: str) -> None:
    entry, folder = "tests.parallel.own_cases:save_then_load", str(tmp_path)
    before = ranks.run(entry, Layout.parse(saved).world, name=name, layout=saved, folder=folder, load=False)
    assert before[0]["path"] == str(tmp_path / "step-00000003")
    after = ranks.run(entry, Layout.parse(loaded).world, name=name, layout=loaded, folder=folder, load=True)
    expected = reference(name, "adamw", 6)
    assert before[0]["losses"] + after[0]["losses"] == pytest.approx(expected["losses"], rel=1e-8, abs=0)
    for key, right in expected["weights"].items():
        torch.testing.assert_close(
            torch.tensor(after[0]["weights"][key], dtype=right.dtype), right, rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize(
    ("what", "world", "sentence"),
    [
        ("seed", 2, "ranks were given different values of 'user.weight'"),
        ("heads", 4, "tensor=4 does not divide 4 query heads and 2 key and value heads\n  → tensor=1 or 2; or fsdp=4"),
        ("no plan", 2, "TwoTower does not say how its matrices can be shared"),
        ("no sum", 2, "the module fails on the example|computes something else"),
        ("computed weight", 2, "'blocks.0.0', whose weight is computed from others"),
        ("norms", 2, "'blocks.0.norm' (BatchNorm2d) computes with the statistics of a micro-batch"),
        ("scalar", 2, "'scale' has no dimension"),
        ("dtypes", 2, "fsdp gathers parameters of one dtype"),
        ("few", 2, "1 micro-batch\n  → a batch of 8 samples, micro_batch=2 (an example of 2), or schedule=gpipe"),
        ("shape", 2, "a micro-batch's inputs are "),
        ("untraceable", 2, "own_cases.py:"),
    ],
)
def test_mistakes_are_said_in_a_sentence(ranks, what: str, world: int, sentence: str) -> None:
    for said in ranks.run("tests.parallel.own_cases:refused", world, what=what):
        assert any(part in said for part in sentence.split("|")), said
        assert "Error: " in said.splitlines()[0]


X = torch.randn(4, 2)


def hooked(kind: str) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    getattr(module.weight, kind)(lambda *_: None)
    return module


def alone(layout: str = "replicas=1", module=None, plan=None, **options):
    module = own_cases.Mixed() if module is None else module
    return parallelize(module, layout, plan, loss=own_cases.MODULES["mixed"][2], **options)


@pytest.mark.parametrize(
    ("kind", "sentence", "options"),
    [
        (LayoutError, "is of 2 ranks, and there are 1", {"layout": "replicas=2"}),
        (LayoutError, "nobody knows which dimensions", {"layout": "context=2"}),
        (LayoutError, "nobody knows which parts", {"layout": "fsdp=2,expert=2"}),
        (LayoutError, "exclude each other", {"layout": "pipeline=2,tensor=2"}),
        (LayoutError, "an example is needed to trace", {"layout": "pipeline=2"}),
        (LayoutError, "an example is needed to see", {"layout": "tensor=2", "plan": {"shared": "columns"}}),
        (LayoutError, "an example is needed to see", {"layout": "tensor=2"}),
        (LayoutError, "recompute counts blocks", {"layout": "fsdp=2,recompute=block"}),
        (LayoutError, "compute gradients of inputs and of weights apart", {"layout": "pipeline=2,schedule=zbv"}),
        (JobError, "no option 'momentun'", {"momentun": 0.9}),
        (JobError, "needs to know how long", {"schedule": "cosine"}),
        (JobError, "muon is for matrices inside blocks", {"optimizer": "muon"}),
        (ModelError, "on meta", {"module": torch.nn.Linear(2, 2, device="meta")}),
        (ModelError, "no shape before the first forward pass", {"module": torch.nn.LazyLinear(2)}),
        (ModelError, "its gradient is sparse", {"module": torch.nn.Embedding(3, 2, sparse=True)}),
        (LayoutError, "'weight' has a hook", {"module": hooked("register_hook"), "layout": "fsdp=2"}),
        (LayoutError, "'weight' has a hook", {"module": hooked("register_hook"), "layout": "pipeline=2", "example": X}),
        (
            LayoutError,
            "'weight' has a post-accumulate-grad hook",
            {"module": hooked("register_post_accumulate_grad_hook"), "layout": "replicas=2"},
        ),
        (LayoutError, "is of 2 ranks", {"module": hooked("register_hook"), "layout": "replicas=2"}),
        (JobError, "inputs are a tensor or a tuple of tensors, and this is a dict", {"example": {"x": X}}),
        (JobError, "this is a tuple with int in it", {"example": (X, 3)}),
        (JobError, "this is a tuple with NoneType in it", {"example": (X, None), "layout": "pipeline=2"}),
        (JobError, "this is a tuple with nothing in it", {"example": (), "layout": "pipeline=2"}),
        (JobError, "the example has no samples", {"example": torch.tensor(1.0), "layout": "pipeline=2"}),
        (ModelError, "no parameter of the module requires", {"module": torch.nn.Linear(2, 2).requires_grad_(False)}),
    ],
)
def test_what_is_refused_before_any_rank_talks(kind: type[ShoalError], sentence: str, options: dict) -> None:
    with pytest.raises(kind, match=sentence):
        alone(**options)


def test_one_process_needs_no_launcher_and_can_be_started_again() -> None:
    for _ in range(2):
        with alone("micro_batch=2", lr=0.1, optimizer="sgd") as trained:
            first, *_, last = (trained.step(trained.share(own_cases._mixed_batch(0, 8))) for _ in range(20))
            assert last.loss < first.loss
            with pytest.raises(LayoutError, match="has a process group already"):
                alone()
            with pytest.raises(DataError, match="a batch of 7 samples"):
                trained.share(own_cases._mixed_batch(0, 7))
            with pytest.raises(DataError, match="at least one"):
                trained.step([])
            x, y = own_cases._mixed_batch(0, 2)
            for inputs in ({"x": x}, (x, 3), (x, None), 3):
                with pytest.raises(DataError, match="inputs are a tensor or a tuple of tensors"):
                    trained.step([(inputs, y)])


def test_a_loss_that_is_no_number_is_refused() -> None:
    with (
        parallelize(torch.nn.Linear(2, 2), "replicas=1", loss=lambda out, target: (out - target).square()) as trained,
        pytest.raises(DataError, match=r"shape \[4, 2\]"),
    ):
        trained.step([(torch.randn(4, 2), torch.randn(4, 2))])
