"""Dropout by hash: the mask of its definition, the same whoever holds the element, and as good as chance."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from shoal.ops import counter, dropout
from shoal.ops.dropout import Dropout, LayerDropout

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None,
    reason="torch.compile needs a C++ compiler on CPU",
)


def made(rate: float = 0.5, seed: int = 0, step: int = 0, batch: int = 4, length: int = 16) -> Dropout:
    return Dropout(rate, seed, step, torch.arange(batch) * 1_000_003, torch.arange(length))


def mask(drop: Dropout, features: int, layer: int = 0, site: int = 0, first_feature: int = 0) -> Tensor:
    """(B, L, features) bools: which are kept."""
    return drop(torch.ones(*drop.row_BL.shape, features), layer, site, first_feature) != 0


# The definition, in Python's own integers.


def split_mix(state: int, number: int) -> int:
    """Steele, Lea & Flood 2014, as in Vigna's splitmix64.c."""
    x = (state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def low_bias(x: int, between: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = ((x ^ (x >> 15)) + between) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def expected(rate: float, names: tuple[int, ...], feature: int) -> bool:
    """names: seed, step, sample, position, layer, site."""
    state = 0
    for name in names:
        state = split_mix(state, name)
    unsigned = low_bias(state % 2**32 ^ feature, state >> 32)
    return unsigned - 2**32 * (unsigned >= 2**31) >= rate * 2**32 - 2**31


def test_split_mix_has_the_published_stream() -> None:
    """Of seed 1234567: the values that Rosetta Code lists for its reference implementation."""
    stream = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    state = torch.tensor(1234567)
    for number, value in enumerate(stream):
        assert split_mix(1234567, number) == value
        assert int(dropout.draw(state, number)) % 2**64 == value


whole = st.integers(-(2**63), 2**63 - 1)
index = st.integers(0, 2**40)


names = st.tuples(whole, index, index, index, st.integers(-1, 200), st.integers(0, 9))


def assert_as_defined(rate: float, names: tuple[int, ...], first: int) -> None:
    seed, step, sample, position, layer, site = names
    drop = Dropout(rate, seed, step, torch.tensor([sample]), torch.tensor([position]))
    kept = mask(drop, 37, layer, site, first)[0, 0].tolist()
    assert kept == [expected(rate, names, feature) for feature in range(first, first + 37)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((0.1, 0.5, 0.75)), names, st.integers(0, 2**31 - 40))
def test_every_element_is_as_defined(rate, names, first) -> None:
    assert_as_defined(rate, names, first)


# Whoever holds it.

B, L, D = 5, 23, 70


@st.composite
def pieces(draw: st.DrawFn) -> tuple[list[int], list[int], slice]:
    """Some samples and some positions in any order, and neighbouring features."""
    samples = draw(st.lists(st.integers(0, B - 1), min_size=1, unique=True))
    places = draw(st.lists(st.integers(0, L - 1), min_size=1, unique=True))
    start = draw(st.integers(0, D - 1))
    return samples, places, slice(start, draw(st.integers(start + 1, D)))


def assert_piece_is_slice(samples: list[int], places: list[int], features: slice, dtype: torch.dtype) -> None:
    x_BLD = torch.randn(B, L, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    all_ = Dropout(0.3, 7, 11, torch.arange(B), torch.arange(L))(x_BLD, 2, 1)
    held = x_BLD[samples][:, places][..., features]
    place_L = torch.tensor(places)
    for place in (place_L, place_L.int().expand(len(samples), -1)):
        piece = Dropout(0.3, 7, 11, torch.tensor(samples), place)(held, 2, 1, features.start)
        assert piece.dtype == dtype
        assert torch.equal(piece, all_[samples][:, places][..., features])


@settings(max_examples=60, deadline=None)
@given(pieces(), st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)))
def test_a_piece_is_the_slice_of_the_whole(piece, dtype) -> None:
    assert_piece_is_slice(*piece, dtype)


def test_rows_may_have_positions_of_their_own() -> None:
    x_BLD, sample_B = torch.ones(2, 4, 50), torch.tensor([8, 9])
    both = Dropout(0.5, 0, 0, sample_B, torch.tensor([[0, 1, 2, 3], [6, 5, 9, 4]]))(x_BLD, 0, 0)
    for row, place_L in enumerate((torch.tensor([0, 1, 2, 3]), torch.tensor([6, 5, 9, 4]))):
        one = Dropout(0.5, 0, 0, sample_B[row : row + 1], place_L)(x_BLD[:1], 0, 0)
        assert torch.equal(both[row], one[0])


def test_torchs_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = mask(made(), 40)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, mask(made(), 40))


# Values and gradients.


def test_kept_elements_are_scaled_by_the_chance_that_was_used() -> None:
    """1.2 × 2⁻³² is rounded to 2⁻³²; the rate nearest to 1 still keeps one hash in 2³²."""
    x_BLD = torch.full((4, 16, 8), 3.0, dtype=torch.float64)
    assert (made(1.2 * 2**-32)(x_BLD, 0, 0) == 3 / (1 - 2**-32)).all()
    assert not made(1 - 2**-40)(x_BLD, 0, 0).any()
    values = made(0.25)(x_BLD, 0, 0).unique().tolist()
    assert values == [0, 4]


def test_the_threshold_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate of 1/2 the lower half of all hashes is dropped: up to −1."""
    hash_4 = torch.tensor([-(2**31), -1, 0, 2**31 - 1], dtype=torch.int32)
    monkeypatch.setattr(dropout, "hashes", lambda key, first, features: hash_4.expand(*key.shape, 4))
    assert mask(made(0.5), 4)[0, 0].tolist() == [False, False, True, True]


@pytest.mark.parametrize("rate", [0.0, 2.0**-34])
def test_without_dropout_x_itself_comes_back(rate: float) -> None:
    x_BLD = torch.randn(4, 16, 8)
    assert made(rate)(x_BLD, 0, 0) is x_BLD
    assert made(rate).at(3)(x_BLD, 0) is x_BLD


def test_a_dropped_infinity_is_gone() -> None:
    x_BLD = torch.full((4, 16, 64), torch.inf, requires_grad=True)
    made()(x_BLD, 0, 0).backward(torch.full((4, 16, 64), torch.nan))
    assert x_BLD.grad is not None
    assert torch.equal(x_BLD.grad.isnan(), mask(made(), 64))


def test_gradient_by_finite_differences() -> None:
    """Also the second, of x³ after dropout; gradcheck's own bounds, relative 1e-3 and absolute 1e-5."""
    x_BLD = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    drop = made(0.4, batch=2, length=3)
    assert torch.autograd.gradcheck(lambda x: drop(x, 1, 0), x_BLD)
    assert torch.autograd.gradgradcheck(lambda x: drop(x, 1, 0) ** 3, x_BLD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backward_applies_the_same_mask(dtype: torch.dtype) -> None:
    x_BLD = torch.randn(4, 16, 64, dtype=dtype, requires_grad=True)
    gradient_BLD = torch.randn(4, 16, 64, dtype=dtype)
    made(0.2)(x_BLD, 3, 2, 5).backward(gradient_BLD)
    assert torch.equal(x_BLD.grad, made(0.2)(gradient_BLD, 3, 2, 5))


def test_no_mask_is_saved() -> None:
    """Between forward and backward lie the rows' keys alone: 8 bytes a row."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        made()(torch.randn(4, 16, 64, requires_grad=True), 0, 0)
    assert saved == [8 * 4 * 16]


def stack(x_BLD: Tensor, weight_DD: Tensor, drop: Dropout, recompute: bool) -> Tensor:
    """Three layers, each with dropout in two places."""

    def block(h_BLD: Tensor, layer: LayerDropout) -> Tensor:
        h_BLD = h_BLD + layer(torch.tanh(h_BLD @ weight_DD), 0)
        return h_BLD + layer(torch.sin(h_BLD), 1)

    for layer in range(3):
        if recompute:
            x_BLD = checkpoint(block, x_BLD, drop.at(layer), use_reentrant=False, preserve_rng_state=False)
        else:
            x_BLD = block(x_BLD, drop.at(layer))
    return x_BLD


def test_recomputation_makes_the_same_mask() -> None:
    x_BLD = torch.randn(4, 16, 32)
    gradients = []
    for recompute in (False, True):
        weight_DD = torch.linspace(-1, 1, 32 * 32).view(32, 32).requires_grad_()
        stack(x_BLD, weight_DD, made(0.3), recompute).square().sum().backward()
        gradients.append(weight_DD.grad)
    assert torch.equal(*gradients)


# Compiled.


@needs_compiler
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.nightly) for d in (torch.bfloat16, torch.float64))]
)
def test_compiled_is_bitwise_the_same(dtype: torch.dtype) -> None:
    """Odd sizes, so that vectorised and remaining elements both occur; forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, drop: drop(x, 1, 3))
    x_BLD, gradient_BLD = torch.randn(2, 3, 9, 77, dtype=dtype)
    drop = made(0.3, batch=3, length=9).at(5)
    found = []
    for function in (compiled, lambda x, drop: drop(x, 1, 3)):
        leaf = x_BLD.clone().requires_grad_()
        out = function(leaf, drop)
        out.backward(gradient_BLD)
        found.append((out, leaf.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@needs_compiler
def test_one_graph_for_all_layers_steps_and_micro_batches() -> None:
    torch._dynamo.reset()
    counters.clear()

    def block(x_BLD: Tensor, layer: LayerDropout) -> Tensor:
        return layer(x_BLD, 0) + layer(x_BLD, 1)

    compiled, x_BLD = torch.compile(block), torch.ones(4, 16, 33)
    for step in range(3):
        for layer in range(4):
            drop = Dropout(0.5, 0, step, torch.arange(4) + 4 * step, torch.arange(16))
            assert torch.equal(compiled(x_BLD, drop.at(layer)), block(x_BLD, drop.at(layer)))
    assert counters["stats"]["unique_graphs"] == 1


# As good as chance: seeds are fixed, so these hold for certain; the bounds are 5 standard errors.


@pytest.fixture(scope="module")
def kept() -> Tensor:
    """(8, 256, 1024) at a rate of 0.1: 2.1 million elements, mean 0, variance 1."""
    return standard(made(0.1, batch=8, length=256))


def standard(drop: Dropout, rate: float = 0.1, layer: int = 3, site: int = 0) -> Tensor:
    return (mask(drop, 1024, layer, site).double() - (1 - rate)) / (rate * (1 - rate)) ** 0.5


def assert_independent(a: Tensor, b: Tensor) -> None:
    assert abs((a * b).mean()) < 5 * a.numel() ** -0.5


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(rate: float) -> None:
    values = standard(made(rate, batch=8, length=256), rate)
    assert abs(values.mean()) < 5 * values.numel() ** -0.5


def test_no_row_or_feature_is_dropped_more(kept: Tensor) -> None:
    """The worst of 2048 rows of 1024 features, and of 1024 features in 2048 rows."""
    assert (kept.mean(-1).abs() * 1024**0.5).max() < 5
    assert (kept.mean((0, 1)).abs() * 2048**0.5).max() < 5


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 64, 100])
def test_neighbours_are_uncorrelated(kept: Tensor, lag: int) -> None:
    assert_independent(kept[..., lag:], kept[..., :-lag])
    assert_independent(kept[:, lag:], kept[:, :-lag])
    assert_independent(kept[:, lag:, lag:], kept[:, :-lag, :-lag])
    assert_independent(kept[:, lag:, :-lag], kept[:, :-lag, lag:])
    assert_independent(kept, kept.roll(1, 0))


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 2**32}, {"step": 1}, {"step": 1000}, {"layer": 4}, {"layer": 3 + 64}, {"site": 1}],
    ids=str,
)
def test_another_seed_step_layer_or_site_is_independent(kept: Tensor, other: dict[str, int]) -> None:
    named = {"layer": 3, "site": 0, "seed": 0, "step": 0} | other
    drop = made(0.1, named["seed"], named["step"], batch=8, length=256)
    assert_independent(kept, standard(drop, layer=named["layer"], site=named["site"]))


def assert_even_patterns(mask: Tensor, dimension: int) -> None:
    """Chi-square of 256 patterns of 8 neighbours: 255 degrees of freedom, so 255 ± 5·sqrt(510)."""
    bits = mask.movedim(dimension, -1).reshape(-1, 8).long()
    counts = (bits << torch.arange(8)).sum(-1).bincount(minlength=256).double()
    mean = bits.shape[0] / 256
    assert abs(((counts - mean) ** 2 / mean).sum() - 255) < 5 * 510**0.5


def test_patterns_of_eight_are_equally_frequent() -> None:
    kept = mask(made(batch=8, length=256), 1024)
    for dimension in (0, 1, 2):
        assert_even_patterns(kept, dimension)
    for names in ({"layer": range(8)}, {"step": range(8)}, {"seed": range(8)}, {"site": range(8)}):
        ((name, values),) = names.items()
        of = {"layer": 0, "step": 0, "seed": 0, "site": 0}
        masks = []
        for value in values:
            v = of | {name: value}
            drop = made(0.5, v["seed"], v["step"], batch=8, length=32)
            masks.append(mask(drop, 1024, v["layer"], v["site"]))
        assert_even_patterns(torch.stack(masks), 0)


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_a_feature_changes_the_hash(bit: int) -> None:
    """Avalanche: a flipped bit of the counter flips each bit of the hash in half of 32,768 rows."""
    key = dropout.draw(torch.zeros(1 << 15, dtype=torch.int64), torch.arange(1 << 15))
    feature = 1 << bit if bit < 31 else -(1 << 31)
    changed = dropout.hashes(key, 0, 1) ^ dropout.hashes(key, feature, 1)
    share = ((changed >> torch.arange(32)) & 1).double().mean(0)
    assert (share - 0.5).abs().max() < 5 * 0.5 / (1 << 15) ** 0.5


# What the tests above would catch.


def test_sees_features_counted_anew_on_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = dropout.hashes
    monkeypatch.setattr(dropout, "hashes", lambda key, first, features: honest(key, 0, features))
    with pytest.raises(AssertionError):
        assert_piece_is_slice([0, 1], [3, 4, 5], slice(8, 40), torch.float32)


def test_sees_a_generator_in_place_of_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(key: Tensor, first: int, features: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (*key.shape, features), dtype=torch.int32)

    monkeypatch.setattr(dropout, "hashes", drawn)
    with pytest.raises(AssertionError):
        test_backward_applies_the_same_mask(torch.float32)
    with pytest.raises(AssertionError):
        test_recomputation_makes_the_same_mask()


def test_sees_a_hash_without_mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiplication, as of a row number and a column number: uniform, but neighbours follow each other."""

    def unmixed(key: Tensor, first: int, features: int) -> Tensor:
        return (key[..., None].int() + torch.arange(first, first + features, dtype=torch.int32)) * (0x7FEB352D)

    monkeypatch.setattr(dropout, "hashes", unmixed)
    values = standard(made(0.1, batch=8, length=256))
    assert abs(values.mean()) < 5 * values.numel() ** -0.5
    with pytest.raises(AssertionError):
        test_neighbours_are_uncorrelated(values, 1)
    with pytest.raises(AssertionError):
        test_patterns_of_eight_are_equally_frequent()


def test_sees_a_shift_that_repeats_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counter, "_shifted", lambda x, bits: x >> bits)
    with pytest.raises(AssertionError):
        assert_as_defined(0.5, (0, 0, 0, 0, 0, 0), 0)
