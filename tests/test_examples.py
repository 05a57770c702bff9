"""The examples run as their docstrings say, and say the same in every layout."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# torchrun with nothing of it beyond loopback.
LOCAL = ["--local-addr", "127.0.0.1", "--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]


def run(*command: str) -> str:
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/bin:/bin", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?:loss|norm|accuracy) ([0-9.]+)", text)]


def said(path: Path, ranks: int, layout: str, steps: str) -> list[float]:
    options = ("--layout", layout, "--steps", steps)
    if ranks == 1:
        return numbers(run(str(path), *options))
    return numbers(run("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *LOCAL, str(path), *options))


def commands(path: Path) -> list[tuple[int, str]]:
    """(ranks, layout) of each command of the docstring."""
    text = path.read_text(encoding="utf-8")
    assert f"    python examples/{path.name}\n" in text
    found = re.findall(rf"torchrun --nproc-per-node (\d+) examples/{path.name} --layout (\S+)", text)
    return [(int(ranks), layout) for ranks, layout in found]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_one_process_learns(path: Path) -> None:
    losses = numbers(run(str(path)))[:-1:2]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.nightly
def test_two_ranks_of_torchrun_say_what_one_process_does() -> None:
    two_tower = ROOT / "examples" / "two_tower.py"
    assert said(two_tower, 2, "pipeline=2", "50") == pytest.approx(said(two_tower, 1, "replicas=1", "50"), rel=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("path", "ranks", "layout"), [(path, *command) for path in EXAMPLES for command in commands(path)],
)  # fmt: skip
def test_every_layout_of_the_docstrings(path: Path, ranks: int, layout: str) -> None:
    assert said(path, ranks, layout, "50") == pytest.approx(said(path, 1, "replicas=1", "50"), rel=1e-2)
