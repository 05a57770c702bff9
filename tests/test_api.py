"""`import shoal`: what the README shows works as it stands there, and names are loaded when first used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import shoal

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

# The job of the README's example, small: `shoal.Job()` in it makes this one.
_SMALL = """
import shoal
from dataclasses import replace
from shoal.job.data import DataOptions

small = shoal.job.parse('''
[data]
tokenizer = "bytes"
sequence_length = 32
[model]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
[train]
steps = 3
global_batch = 4
precision = "fp32"
compile = "off"
''')
small = replace(small, layout="replicas=2", data=replace(small.data, source="a.txt", cache="cache"))
shoal.Job = lambda: small
"""
_AFTER = """
import torch
assert isinstance(model, torch.nn.Module)
tokens = torch.zeros(1, 4, dtype=torch.int64)
assert model(input_ids=tokens).shape == (1, 4, 257)
assert shoal.job.read(result.run + "/job.toml").data.source[0].endswith("a.txt")
"""


def fresh(code: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What Python says to a text, in a process that has imported nothing of ours."""
    return subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, timeout=300)


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a text\n\n" for i in range(200)))
    ended = fresh(_SMALL + example + _AFTER, tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("text", [README, shoal.__doc__], ids=["README", "docstring"])
def test_every_name_that_is_shown_exists(text: str) -> None:
    names = set(re.findall(r"\bshoal((?:\.[A-Za-z_]+)+)\(", text))
    assert {".train", ".load", ".job.read"} <= names
    ended = fresh("import shoal\n" + "\n".join(f"assert callable(shoal{name})" for name in sorted(names)))
    assert ended.returncode == 0, ended.stderr


def test_importing_it_loads_neither_torch_nor_anything_slow() -> None:
    """Nor do the jobs, which are there without another import; here no other name has brought them along."""
    modules = "print(*{name.partition('.')[0] for name in sys.modules})"
    ended = fresh(f"import sys, shoal; dir(shoal); shoal.__version__; shoal.job.read; {modules}")
    assert ended.returncode == 0, ended.stderr
    assert not {"torch", "numpy", "tokenizers", "tyro", "plotly"} & set(ended.stdout.split())
    assert "shoal" in ended.stdout.split()


def test_all_of_it_exists_and_what_does_not_is_said() -> None:
    for name in (*shoal.__all__, "job"):
        assert getattr(shoal, name)
        assert name in dir(shoal)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        shoal.trian  # noqa: B018
