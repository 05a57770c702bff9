"""Damage is found, named and passed over."""

from __future__ import annotations

import random
import shutil

import pytest

from shoal import checkpoint
from shoal.errors import CheckpointError
from tests.checkpoint.fleet import Fleet, assert_is


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("health")
    with Fleet(root) as fleet:
        fleet.step(10)
        fleet.step(20)
    return root


def harm(content: bytes, chance: random.Random) -> bytes:
    """One flipped bit, or a shorter or longer file."""
    kind = chance.random()
    if kind < 0.7:
        at = chance.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    return content[: chance.randrange(len(content))] if kind < 0.95 else content + b"\0"


def test_500_bit_flips_and_truncations_are_each_found_and_named(saved):
    chance = random.Random(0)
    previous, newest = saved / "step-00000010", saved / "step-00000020"
    files = sorted(newest.iterdir())
    assert len(files) == 4
    hit = set()
    for trial in range(500):
        file = files[trial % len(files)]
        good = file.read_bytes()
        file.write_bytes(harm(good, chance))
        said: list[str] = []
        assert checkpoint.newest(saved, said.append) == previous
        assert len(said) == 1
        assert said[0].startswith(f"{file} is damaged")
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(newest, [])
        assert error.value.where == str(file)
        file.write_bytes(good)
        hit.add(file.name)
    assert len(hit) == 4
    assert_is(previous, 10)
    assert checkpoint.newest(saved, pytest.fail) == newest
    assert_is(newest, 20)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.safetensors"])
def test_a_missing_file_is_named(saved, tmp_path, name):
    root = shutil.copytree(saved, tmp_path / "copy")
    (root / "step-00000020" / name).unlink()
    said: list[str] = []
    assert checkpoint.newest(root, said.append) == root / "step-00000010"
    assert said == [f"{root / 'step-00000020' / name} is missing; checkpoint step-00000020 is passed over"]


def test_two_damaged_files_are_both_named(saved, tmp_path):
    root = shutil.copytree(saved, tmp_path / "copy")
    for rank in (0, 2):
        (root / "step-00000020" / f"rank-0000{rank}.safetensors").write_bytes(b"")
    damages = checkpoint.verify(root / "step-00000020")
    assert [damage.file.name for damage in damages] == ["rank-00000.safetensors", "rank-00002.safetensors"]
    assert "0 bytes instead of" in damages[0].reason


def test_none_when_there_is_nothing_or_all_is_damaged(saved, tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere", pytest.fail) is None
    root = shutil.copytree(saved, tmp_path / "copy")
    for file in root.glob("*/manifest.json"):
        file.write_bytes(b"{}")
    said: list[str] = []
    assert checkpoint.newest(root, said.append) is None
    assert len(said) == 2


def test_a_file_that_shrank_after_it_was_verified_is_an_error_and_no_crash(saved, tmp_path):
    root = shutil.copytree(saved, tmp_path / "copy")
    for file in (root / "step-00000020").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="reaches beyond"):
        assert_is(root / "step-00000020", 20, verified=True)


def test_describe(saved):
    folder = saved / "step-00000020"
    assert checkpoint.describe(folder) == {
        "step": 20,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "files": 3,
        "tensors": 3,
        "elements": 2 * 12 * 5 + 1,
        "layout": None,
    }
