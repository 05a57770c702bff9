"""How far two records of steps are apart: of whole tensors, each against its own noise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shoal.training import equality

EXACT = {"gradient": 1e-10, "weight": 1e-8}
LOW = {"gradient": 2**-23, "weight": 2**-23, "turned": 0.1}
NORMS = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)]
EXPERTS = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(4)]


def _compare(folder: Path, reordered: list[str], bounds: dict[str, float]):
    where = {"folder": str(folder / "layout"), "reference": str(folder / "one")}
    return equality.compare(None, **where, reordered=[str(folder / each) for each in reordered], bounds=bounds)


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """As one rank writes them."""
    folder.mkdir(exist_ok=True)
    pieces = {}
    for name, tensor in tensors.items():
        kind, _, own = name.partition("/")
        pieces[f"{kind}/0/{own}@{','.join('0' * tensor.ndim)}"] = tensor
    save_file(pieces, folder / "rank-0.safetensors")


@pytest.fixture
def records(tmp_path):
    """One process, two reorderings of it, and a layout that is another one; and what each consists of."""
    generator = torch.Generator().manual_seed(1)
    shapes = {**dict.fromkeys(NORMS, (32,)), **dict.fromkeys(EXPERTS, (8, 8)), "lm_head.weight": (200, 32)}
    right = {
        f"{kind}/{name}": torch.randn(shape, generator=generator)
        for kind in ("gradient", "weight")
        for name, shape in shapes.items()
    }
    start = {
        f"start/{name}": right[f"weight/{name}"] + 0.1 * torch.randn(shapes[name], generator=generator)
        for name in shapes
    }
    noisy = lambda: {name: t * (1 + 1e-4 * torch.randn(t.shape, generator=generator)) for name, t in right.items()}  # noqa: E731
    _write(tmp_path / "one", right | start)
    for name in ("first", "second"):
        _write(tmp_path / name, noisy())
    return tmp_path, noisy()


def test_a_layout_that_is_another_order_is_within_the_noise(records):
    folder, layout = records
    _write(folder / "layout", layout)
    worst = _compare(folder, ["first", "second"], LOW)
    assert all(0 < found["difference"] <= found["bound"] < 2e-3 for found in worst.values())
    worst = _compare(folder, [], EXACT)
    assert all(found["difference"] > found["bound"] for found in worst.values())


@pytest.mark.parametrize("kind", ["gradient", "weight"])
def test_one_small_tensor_is_not_lost_among_large_ones(records, kind):
    """Of all as one vector, it would be off by less than the noise."""
    folder, layout = records
    layout[f"{kind}/{NORMS[2]}"] *= 1.01
    _write(folder / "layout", layout)
    worst = _compare(folder, ["first", "second"], LOW)
    assert worst[kind]["name"] == NORMS[2]
    assert worst[kind]["difference"] > 5 * worst[kind]["bound"]
    other = worst["weight" if kind == "gradient" else "gradient"]
    assert other["difference"] <= other["bound"]


def test_weights_may_differ_by_a_part_of_what_training_changed_in_an_element(records):
    """Where AdamW divides a gradient near 0 by its size, noise becomes a step that no few orders show."""
    folder, layout = records
    layout[f"weight/{NORMS[1]}"][3] += 5e-3  # training changed each by 0.1, of which a tenth may be chance
    layout[f"gradient/{NORMS[1]}"][3] += 5e-3
    _write(folder / "layout", layout)
    worst = _compare(folder, ["first", "second"], LOW)
    assert worst["weight"]["difference"] <= worst["weight"]["bound"]
    assert worst["gradient"]["difference"] > worst["gradient"]["bound"]


def test_the_experts_of_a_layer_are_one_tensor_in_low_precision(records):
    """A token that is routed to another one moves two of them, and all of them together by little."""
    folder, layout = records
    for each in ("first", "layout"):
        changed = {name: tensor.clone() for name, tensor in layout.items()}
        one, other = (3, 0) if each == "layout" else (1, 2)
        changed[f"gradient/{EXPERTS[one]}"] *= 1.02
        changed[f"gradient/{EXPERTS[other]}"] *= 0.98
        _write(folder / each, changed)
    assert _compare(folder, ["first", "second"], LOW)["gradient"]["difference"] < 0.02
    worst = _compare(folder, [], EXACT)
    assert worst["gradient"]["name"] in (EXPERTS[0], EXPERTS[3])


@pytest.mark.parametrize(
    ("bug", "flaw"),
    [("number", "not all of it are finite"), ("missing", "no rank holds all"), ("unequal", "two ranks hold different")],
)
def test_pieces_that_are_no_numbers_missing_or_unequal_are_infinitely_wrong(tmp_path, bug, flaw):
    whole = {"w": torch.arange(8.0).view(4, 2)}
    for where, rows in (("one", [(0, 4)]), ("two", [(0, 2), (1, 4)])):
        (tmp_path / where).mkdir()
        for rank, (start, stop) in enumerate(rows):
            piece = whole["w"][start:stop].clone()
            if where == "two" and rank == 1:
                if bug == "number":
                    piece[2, 1] = torch.nan
                elif bug == "unequal":
                    piece[0, 0] += 1e-6
                elif bug == "missing":
                    piece = piece[:2].clone()
            save_file({f"weight/0/w@{start},0": piece}, tmp_path / where / f"rank-{rank}.safetensors")
    assert equality._differences(str(tmp_path / "one"), "weight", whole) == ({"w": 0.0}, {})
    differences, flaws = equality._differences(str(tmp_path / "two"), "weight", whole)
    assert differences == {"w": math.inf}
    assert flaw in flaws["w"]


@pytest.mark.parametrize("sums", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_parts_are_the_same_but_for_rounding(sums, bias):
    module = nn.Linear(14, 10, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 5, 14, dtype=torch.float64, requires_grad=True)
    (right,) = torch.autograd.grad(module(x).square().sum(), x)
    for products in (equality._of_inputs, equality._of_outputs):
        torch.testing.assert_close(products(module, sums, x), module(x))
        (gradient,) = torch.autograd.grad(products(module, sums, x).square().sum(), x)
        torch.testing.assert_close(gradient, right)
