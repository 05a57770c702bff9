"""What one layout saved, another one loads, bit by bit."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from shoal import checkpoint
from shoal.checkpoint import manifest, reader
from shoal.errors import CheckpointError
from shoal.shard import Shard, State
from tests.checkpoint.fleet import Fleet, assert_is

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
WORLD = 3


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with Fleet(tmp_path_factory.mktemp("round"), WORLD, keep=1) as fleet:
        yield fleet


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits: NaNs, infinities and subnormals too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


@st.composite
def cells(draw, shape):
    """A cut of a tensor into a grid of boxes, some of them empty."""
    edges = [sorted([0, n, *draw(st.lists(st.integers(0, n), max_size=2))]) for n in shape]
    spans = [[(a, b - a) for a, b in pairwise(e)] for e in edges]
    return [(tuple(o for o, _ in cell), tuple(n for _, n in cell)) for cell in product(*spans)]


@st.composite
def tensors(draw):
    """Tensors, how they are saved (box and rank), and how they are loaded (box)."""
    cases = []
    for index in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        tensor = random_tensor(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1 << 30)))
        saved = [(draw(st.integers(0, WORLD - 1)), box) for box in draw(cells(shape))]
        cases.append((f"layers.{index}.weight", tensor, saved, draw(cells(shape))))
    return cases


def box_of(tensor: torch.Tensor, box) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]


def save(fleet: Fleet, cases) -> None:
    states = [State([], {"cases": len(cases)}) for _ in range(WORLD)]
    for name, tensor, saved, _ in cases:
        for rank, box in dict.fromkeys(saved):
            states[rank].shards.append(Shard(name, tuple(tensor.shape), box[0], box_of(tensor, box)))
        # Everybody else holds a copy that is not theirs to save.
        for state in states:
            state.shards.append(Shard(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor, owner=False))
    for pending in fleet.save(states, 1):
        assert pending.error is None, pending.error


def check(fleet: Fleet, cases) -> None:
    folder = checkpoint.newest(fleet.root, pytest.fail)
    assert folder is not None
    wanted = [
        (
            Shard(
                name,
                tuple(tensor.shape),
                box[0],
                box_of(random_tensor(tuple(tensor.shape), tensor.dtype, 1), box),
            ),
            tensor,
            box,
        )
        for name, tensor, _, boxes in cases
        for box in boxes
    ]
    assert checkpoint.load(folder, [shard for shard, _, _ in wanted], verified=True) == {"cases": len(cases)}
    for shard, tensor, box in wanted:
        assert bits(shard.local) == bits(box_of(tensor, box)), (shard.name, box)
    for (name, tensor, _, _), (read, values) in zip(
        cases, checkpoint.tensors(folder, [c[0] for c in cases]), strict=True
    ):
        assert (name, bits(tensor), tensor.shape) == (read, bits(values), values.shape)
    oracle(folder, cases)


def oracle(folder, cases) -> None:
    """safetensors' own library reads the files, and finds in them what was saved."""
    read = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    entries = 0
    for name, tensor, saved, _ in cases:
        for rank, box in dict.fromkeys(saved):
            part = box_of(tensor, box)
            if part.numel():
                key = name if part.shape == tensor.shape else f"{name}@{','.join(map(str, box[0]))}"
                found = read[f"rank-{rank:05d}.safetensors"][key]
                assert (found.dtype, bits(found)) == (part.dtype, bits(part))
                entries += 1
    assert entries == sum(map(len, read.values()))


@given(tensors())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_layout_loads_any_other(fleet, cases):
    save(fleet, cases)
    check(fleet, cases)


ROWS_TO_COLUMNS = [
    (
        "layers.0.weight",
        torch.arange(24.0).view(4, 6),
        [(0, ((0, 0), (1, 6))), (1, ((1, 0), (2, 6))), (2, ((3, 0), (1, 6)))],
        [((0, 0), (4, 2)), ((0, 2), (4, 1)), ((0, 3), (4, 3))],
    )
]


@pytest.mark.parametrize("bug", ["begin", "size"])
def test_planted_off_by_one_is_caught(fleet, monkeypatch, bug):
    save(fleet, ROWS_TO_COLUMNS)
    check(fleet, ROWS_TO_COLUMNS)

    def intersect(*boxes):
        common = manifest.intersect(*boxes)
        if common is None or common[1][0] < 2:
            return common
        (begin, *begins), (size, *sizes) = common
        return (begin + (bug == "begin"), *begins), (size - 1, *sizes)

    monkeypatch.setattr(reader, "intersect", intersect)
    with pytest.raises(AssertionError):
        check(fleet, ROWS_TO_COLUMNS)


def test_floating_point_converts_and_nothing_else(fleet, tmp_path):
    weight = torch.randn(4, 6, dtype=torch.float32)
    save(
        fleet,
        [("weight", weight, [(0, ((0, 0), (4, 6)))], []), ("ids", torch.arange(4), [(1, ((0,), (4,)))], [])],
    )
    folder = checkpoint.newest(fleet.root, pytest.fail)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        shard = Shard("weight", (4, 6), (1, 2), torch.zeros(3, 4, dtype=dtype, requires_grad=True))
        checkpoint.load(folder, [shard])
        assert torch.equal(shard.local, weight[1:, 2:].to(dtype))
    for name, local in (
        ("weight", torch.zeros(4, 6, dtype=torch.int64)),
        ("ids", torch.zeros(4, dtype=torch.int32)),
    ):
        with pytest.raises(CheckpointError, match=f"'{name}' is torch") as error:
            checkpoint.load(folder, [Shard(name, tuple(local.shape), (0,) * local.ndim, local)])
        assert "rank-0000" in error.value.where
        assert error.value.fix


def test_missing_tensor_and_wrong_shape_are_named(tmp_path):
    with Fleet(tmp_path) as fleet:
        fleet.step(3)
    folder = checkpoint.newest(tmp_path, pytest.fail)
    with pytest.raises(CheckpointError, match=r"'other\.weight' is missing") as error:
        checkpoint.load(folder, [Shard("other.weight", (2,), (0,), torch.zeros(2))])
    assert error.value.where == str(folder / "manifest.json")
    with pytest.raises(
        CheckpointError, match=r"'norm\.weight' has shape \[12, 5\], the job makes it \[12, 6\]"
    ) as error:
        checkpoint.load(folder, [Shard("norm.weight", (12, 6), (0, 0), torch.zeros(12, 6))])
    assert error.value.where == str(folder / "rank-00000.safetensors")
    assert error.value.fix
    with pytest.raises(CheckpointError, match=r"'none' is missing"):
        list(checkpoint.tensors(folder, ["none"]))


def test_tensors_are_the_models_unless_asked_for(tmp_path):
    with Fleet(tmp_path) as fleet:
        fleet.step(3)
    folder = checkpoint.newest(tmp_path, pytest.fail)
    assert_is(folder, 3)
    assert [name for name, _ in checkpoint.tensors(folder)] == ["norm.weight", "count"]


def test_transposed_and_strided_pieces_are_saved_row_by_row(tmp_path):
    square = torch.arange(36.0).view(6, 6)
    with Fleet(tmp_path, world=1) as fleet:
        assert fleet.save([State([Shard("w", (6, 3), (0, 0), square.t()[:, ::2])])], 1)[0].error is None
    folder = checkpoint.newest(tmp_path, pytest.fail)
    strided = torch.zeros(6, 6)
    checkpoint.load(folder, [Shard("w", (6, 3), (0, 0), strided[:, 1::2])])
    assert torch.equal(strided[:, 1::2], square.t()[:, ::2])
    assert not strided[:, ::2].any()
