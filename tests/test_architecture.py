"""Rules of the whole code base that no single file can hold: layers, backends, pickle, dependencies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

import shoal

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
FILES = sorted((SOURCE / "shoal").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS, FREE_OF_TORCH = PROJECT["tool"]["importlinter"]["contracts"]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; `from a import b` is a and a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_each_layer_imports_only_from_below():
    layers = [layer.replace(" ", "").split("|") for layer in LAYERS["layers"]]
    level = {room: height for height, rooms in enumerate(reversed(layers)) for room in rooms}

    def room(name: str) -> str | None:
        return next((r for r in level if name == r or name.startswith(r + ".")), None)

    wrong = [
        f"{module(path)} imports {name}"
        for path in FILES
        if (mine := room(module(path)))
        for name in imports(path)
        if (other := room(name)) and other != mine and level[other] >= level[mine]
    ]
    assert not wrong


def test_every_room_stands_in_the_contract():
    layers = " ".join(LAYERS["layers"])
    rooms = {module(path).split(".")[1] for path in FILES if module(path) != "shoal"}
    assert {room for room in rooms if f"shoal.{room}" not in layers} == set()


@pytest.mark.parametrize("name", FREE_OF_TORCH["source_modules"])
def test_modules_that_start_without_torch(name: str):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# What serialises Python objects, and the functions of torch that do. Of multiprocessing only shared memory is
# bytes: its queues, pipes and pools pickle.
PICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "multiprocessing"}
SHARED_MEMORY = "multiprocessing.shared_memory"
OBJECTS = {
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip


def pickles(path: Path) -> list[str]:
    found = [name for name in imports(path) if name.split(".")[0] in PICKLE]
    found = [name for name in found if not f"{name}.".startswith(f"{SHARED_MEMORY}.") and name != "multiprocessing"]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [name for name in names if name == "multiprocessing" or name.startswith("torch.multiprocessing")]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [alias.name for alias in node.names]
            queues = node.module == "torch.multiprocessing" or "multiprocessing" in names
            of_torch = node.module == "torch" and {"save", "load"} & {*names}
            found += names if queues or of_torch or OBJECTS & {*names} else []
        if isinstance(node, ast.Attribute):
            of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            found += [node.attr] if node.attr in OBJECTS or (of_torch and node.attr in ("save", "load")) else []
    return found


def test_nothing_is_pickled():
    assert {module(path): found for path in FILES if (found := pickles(path))} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "def f():\n    from multiprocessing import Queue",
        "import multiprocessing as mp",
        "torch.load('x')",
        "dist.broadcast_object_list([1])",
        "from torch import load",
        "from torch.distributed import all_reduce, broadcast_object_list",
        "def f():\n    import torch.multiprocessing as mp",
        "from torch import multiprocessing",
        "from torch.multiprocessing import Queue",
    ],
)
def test_a_planted_pickle_is_found(planted: str, tmp_path: Path):
    (tmp_path / "planted.py").write_text(planted)
    assert pickles(tmp_path / "planted.py")


def test_one_file_names_backends():
    """Strings in code, docstrings apart: `gloo` and `nccl` stand in device.py only."""
    found = set()
    for path in FILES:
        docstrings = {
            id(node.value)
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                words = node.value.lower()
                if any(backend in words for backend in ("gloo", "nccl")) or words in ("cuda", "mps", "xpu"):
                    found.add(f"{module(path)}:{node.lineno}: {node.value}")
    assert {line for line in found if not line.startswith("shoal.device:")} == set()


def test_what_is_imported_is_a_declared_dependency():
    declared = {line.split(">")[0] for line in PROJECT["project"]["dependencies"]}
    imported = {name.split(".")[0] for path in FILES for name in imports(path)}
    # A package of which only a data file is read: resources.files("plotly").
    imported |= {package for path in FILES for package in re.findall(r'resources.files\("(\w+)"\)', path.read_text())}
    assert imported - set(sys.stdlib_module_names) - {"shoal", ""} == declared


def test_no_room_has_the_name_of_a_public_function():
    rooms = {
        path.parent.name if path.name == "__init__.py" else path.stem
        for path in (SOURCE / "shoal").glob("*/__init__.py")
    }
    rooms |= {path.stem for path in (SOURCE / "shoal").glob("*.py")}
    assert not rooms & set(shoal.__all__)


def test_every_file_says_what_it_is_about():
    assert [module(path) for path in FILES if not ast.get_docstring(tree(path))] == []


def test_nothing_is_left_to_do():
    marks = ("TODO", "FIXME", "XXX", "NotImplementedError", "breakpoint()")
    assert [(module(path), mark) for path in FILES for mark in marks if mark in path.read_text()] == []


def test_constraints_pin_every_dependency_and_the_tested_torch():
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    wanted = chain(PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values())
    assert {name.split(">")[0].lower() for name in wanted} <= set(pins)
    assert pins["torch"] == "2.13.0"
