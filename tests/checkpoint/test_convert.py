"""Checkpoints into other files, to and from Hugging Face folders: every bit, whole or not at all, in little memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shoal import checkpoint
from shoal import job as jobs
from shoal.checkpoint import blocks, contents, convert, hf_folder, huggingface, manifest, safetensors
from shoal.checkpoint.blocks import Box
from shoal.checkpoint.manifest import Piece, Tensor
from shoal.checkpoint.safetensors import Part
from shoal.checkpoint.stage import staged
from shoal.data import tokenizer as tokenizers
from shoal.errors import CheckpointError, ModelError
from shoal.job import Job, Layout
from shoal.job.model import ModelOptions
from shoal.models.spec import parameters
from shoal.models.storage import canonical
from shoal.serving.load import load
from shoal.shard import Shard, State
from tests.checkpoint.fleet import Fleet
from tests.checkpoint.test_round_trip import ROWS_TO_COLUMNS, WORLD, bits, cells, save, tensors
from tests.models import experts, tiny

SLOTS = ("exp_avg", "exp_avg_sq")
VALUES = {"step": 7, "position": 70, "update": {"updates": 7}, "sync": {}, "layout": "replicas=2"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with Fleet(tmp_path_factory.mktemp("convert"), WORLD, keep=1) as fleet:
        yield fleet


def run_of(folder: Path, options: ModelOptions, dtype: torch.dtype = torch.float32) -> Path:
    """A run with a checkpoint of two ranks: matrices that write to the residual stream are cut by columns, the rest
    by rows. Returns the run's folder."""
    states = [State([], VALUES) for _ in range(2)]
    for name, spec in parameters(options).items():
        for slot in ("", *(f"{slot}." for slot in SLOTS)):
            generator = torch.Generator().manual_seed(prod(map(ord, slot + name)) % 2**31)
            whole = torch.randn(spec.shape, generator=generator).to(dtype)
            axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            for rank, local in enumerate(whole.chunk(2, axis)):
                offsets = [0] * whole.ndim
                offsets[axis] = rank * -(-whole.shape[axis] // 2)
                states[rank].shards.append(Shard(slot + name, tuple(whole.shape), tuple(offsets), local))
    folder.mkdir()
    (folder / "job.toml").write_text(jobs.write(Job(layout=Layout(replicas=2), model=options)))
    tokenizers.single_bytes().save(folder)
    with Fleet(folder / "checkpoints", 2) as fleet:
        assert fleet.save(states, 7)[0].error is None
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory.mktemp("run") / "run", tiny.BASE)


@pytest.fixture(scope="module")
def saved(run: Path) -> Path:
    return contents.find(run)


def small_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(safetensors, "BLOCK", size)


@given(st.lists(st.integers(0, 6), max_size=4).map(tuple), st.integers(1, 40))
def test_blocks_are_the_box_in_the_order_of_storage(shape, limit):
    numbers = np.arange(prod(shape)).reshape(shape)
    found = []
    for offsets, extent in blocks.split(Box((0,) * len(shape), shape), limit):
        part = numbers[tuple(slice(o, o + n) for o, n in zip(offsets, extent, strict=True))]
        assert 0 < part.size <= limit
        found += part.flatten().tolist()
    assert found == numbers.flatten().tolist()


def read_back(folder: Path, cases) -> None:
    """safetensors' own library puts the pieces of the new files together, bit by bit."""
    read = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    what = manifest.read(folder)
    for name, tensor, _, _ in cases:
        whole = torch.zeros_like(tensor)
        for piece in what.tensors[name].pieces:
            key = name if piece.shape == tensor.shape else f"{name}@{','.join(map(str, piece.offsets))}"
            place = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.shape, strict=True))
            whole[place] = read[piece.file][key]
        assert (bits(whole), what.tensors[name].dtype) == (bits(tensor), manifest.read(folder).tensors[name].dtype)
    assert sum(map(len, read.values())) == sum(len(what.tensors[name].pieces) for name, *_ in cases)


@given(tensors(), st.integers(1, 5), st.sampled_from([8, 24, 1 << 20]))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_reshard_keeps_every_bit_of_any_cut(fleet, cases, pieces, block):
    save(fleet, cases)
    source = contents.find(fleet.root)
    out = fleet.root.parent / "resharded"
    shutil.rmtree(out, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, block)
        convert.reshard(source, out, pieces=pieces)
    assert checkpoint.verify(out) == []
    before, after = manifest.read(source), manifest.read(out)
    assert (before.step, before.values) == (after.step, after.values)
    assert len(after.files) <= pieces
    read_back(out, cases)


@pytest.mark.parametrize("bug", ["stride", "edge"])
def test_planted_bugs_are_caught(fleet, tmp_path, monkeypatch, bug):
    save(fleet, ROWS_TO_COLUMNS)
    cut = ("w", torch.arange(24.0).view(4, 6), [(0, ((0, 0), (4, 2))), (1, ((0, 2), (4, 4)))], [])
    save(fleet, [cut])
    source = contents.find(fleet.root)
    if bug == "stride":
        real = blocks._place
        monkeypatch.setattr(blocks, "_place", lambda offsets, box: (real(offsets, box)[0], [1] * len(box.shape)))
        convert.reshard(source, tmp_path / "out", pieces=2)
        with pytest.raises(AssertionError):
            read_back(tmp_path / "out", [cut])
    else:
        real_row = convert._row
        monkeypatch.setattr(convert, "_row", lambda *args: max(real_row(*args) - 1, 0))
        with pytest.raises(CheckpointError, match="saved by no rank"):
            convert.reshard(source, tmp_path / "out", pieces=2)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_files_are_equal_but_for_a_row(saved, tmp_path, count):
    what = manifest.read(saved)
    convert.reshard(saved, tmp_path / "out", pieces=count)
    assert checkpoint.verify(tmp_path / "out") == []
    wholes = [Part(name, tensor, blocks.whole(tensor), tensor.dtype) for name, tensor in what.tensors.items()]
    sizes = [sum(part.size for part in parts) for parts in convert.spread(wholes, count)]
    rows = [blocks.size(tensor) // tensor.shape[0] for tensor in what.tensors.values()]
    assert len(sizes) == len(manifest.read(tmp_path / "out").files) == count
    assert max(sizes) - min(sizes) <= 2 * max(rows)
    for (name, old), (_, new) in zip(checkpoint.tensors(saved), checkpoint.tensors(tmp_path / "out"), strict=True):
        assert torch.equal(old, new), name


def test_the_size_of_a_file_says_how_many(saved, tmp_path):
    total = sum(map(blocks.size, manifest.read(saved).tensors.values()))
    convert.reshard(saved, tmp_path / "out", file_bytes=total // 4 + 1)
    assert len(manifest.read(tmp_path / "out").files) == 4


def in_order(model):
    """Biases beside their matrices, though in memory those of a fused matrix follow all of its parts."""
    tensors = dict(canonical(model))
    return ((name, tensors[name]) for name in parameters(model.options))


@pytest.mark.parametrize("case", ["llama", "tied", "biases"])
@pytest.mark.parametrize(("dtype", "kind"), [(None, None), ("BF16", torch.bfloat16)])
@pytest.mark.parametrize("file_bytes", [1 << 30, 20_000])
def test_export_is_the_folder_of_a_finished_run(case, dtype, kind, file_bytes, tmp_path, monkeypatch):
    """`huggingface.export` writes that, by way of torch and safetensors' own library: the same bytes."""
    small_blocks(monkeypatch, 1 << 12)
    run = run_of(tmp_path / "run", tiny.CASES[case])
    model = load(run)
    huggingface.export(
        model.options, in_order(model), tmp_path / "expected", tokenizer=run, start_token=256, end_token=256,
        dtype=kind, file_bytes=file_bytes,
    )  # fmt: skip
    convert.export_hf(contents.find(run), tmp_path / "out", dtype=dtype, file_bytes=file_bytes)
    names = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert len(names) > (5 if file_bytes == 20_000 else 4)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == (kind or torch.float32)
    weights = dict(theirs.named_parameters())
    assert all(torch.equal(weights[name], p.to(theirs.dtype)) for name, p in canonical(model))


def test_what_no_gradient_reaches_is_not_rounded(tmp_path):
    """A router's bias moves by 0.001 a step, and near 1 the numbers of bf16 are 0.008 apart."""
    run = run_of(tmp_path / "run", experts.DEEPSEEK)
    model = load(run)
    huggingface.export(model.options, canonical(model), tmp_path / "one", tokenizer=run, dtype=torch.bfloat16)
    convert.export_hf(contents.find(run), tmp_path / "other", dtype="BF16")
    for folder in (tmp_path / "one", tmp_path / "other"):
        read = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        for name, tensor in canonical(model):
            kind = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            assert read[name].dtype == kind
            assert torch.equal(read[name], tensor.to(kind))
    assert any(not spec.learned for spec in parameters(model.options).values())


def test_import_and_export_are_inverse(tmp_path):
    """From several files of transformers' in bf16, through a run that can be loaded, to the same tensors."""
    twin = tiny.transformers_twin(tiny.decoder(tiny.CASES["tied"])).bfloat16()
    twin.generation_config.eos_token_id = [2, 5]
    twin.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    convert.import_hf(tmp_path / "theirs", tmp_path / "run", file_bytes=20_000)
    saved = contents.find(tmp_path / "run")
    assert saved.name == "step-00000000"
    assert len(manifest.read(saved).files) > 2
    assert checkpoint.verify(saved) == []
    model = load(tmp_path / "run")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)(tiny.tokens(2, 9)).logits
    assert (model(tiny.tokens(2, 9)) - expected).abs().max() < 1e-5 * expected.abs().max()
    convert.export_hf(saved, tmp_path / "back")
    theirs = {k: v for file in (tmp_path / "theirs").glob("*.safetensors") for k, v in load_file(file).items()}
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(theirs) - {"lm_head.weight"}
    for name, tensor in back.items():
        assert (tensor.dtype, bits(tensor)) == (torch.bfloat16, bits(theirs[name]))


def test_an_imported_tokenizer_and_what_ends_a_text_come_along(tmp_path):
    tiny.transformers_twin(tiny.decoder(replace(tiny.BASE, vocab_size=260))).save_pretrained(tmp_path / "theirs")
    tokenizers.single_bytes().save(tmp_path / "theirs")
    words = hf_folder.config.read_json(tmp_path / "theirs" / "config.json")
    hf_folder.write_json(tmp_path / "theirs" / "config.json", words | {"eos_token_id": [256, 258]})
    (tmp_path / "theirs" / "generation_config.json").unlink()
    convert.import_hf(tmp_path / "theirs", tmp_path / "run")
    shutil.rmtree(tmp_path / "theirs")
    convert.export_hf(contents.find(tmp_path / "run"), tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert hf_folder.config.read_json(tmp_path / "back" / name)["eos_token_id"] == [256, 258]
    assert tokenizers.load(tmp_path / "back").end == 256


def convert_all(run: Path, folder: Path, out: Path) -> list[Callable[[], None]]:
    saved = contents.find(run)
    return [
        lambda: convert.reshard(saved, out),
        lambda: convert.export_hf(saved, out),
        lambda: convert.import_hf(folder, out),
    ]


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    convert.export_hf(saved, folder, file_bytes=20_000)
    return folder


def test_what_exists_is_left_alone(run, exported, tmp_path):
    (tmp_path / "out").mkdir()
    for work in convert_all(run, exported, tmp_path / "out"):
        with pytest.raises(CheckpointError, match="is there already") as error:
            work()
        assert error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing(run, exported, tmp_path, monkeypatch):
    """The n-th wait for the disk fails, for every n."""
    real, left, failures = os.fsync, 0, 0

    def fsync(file: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    for number in range(3):
        for at in range(1, 100):
            left, out = at, tmp_path / f"out-{number}-{at}"
            try:
                convert_all(run, exported, out)[number]()
                break
            except CheckpointError as error:
                said = error.what
            assert "No space left on device" in said
            assert not list(tmp_path.glob(".*"))
            failures += 1
    assert failures > 20


def test_a_checkpoint_without_its_run_has_no_model(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a" / "b" / "alone")
    with pytest.raises(CheckpointError, match="in no run's folder") as error:
        convert.export_hf(tmp_path / "a" / "b" / "alone", tmp_path / "out")
    assert "step-00000100-1" in error.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4}])
def test_a_checkpoint_of_another_model_is_refused(run, tmp_path, change):
    shutil.copytree(run, tmp_path / "run")
    job = Job(layout=Layout(), model=replace(tiny.BASE, **change))
    (tmp_path / "run" / "job.toml").write_text(jobs.write(job))
    with pytest.raises(CheckpointError, match=r"tensor.*(layers\.2|layers\.3|embed_tokens)"):
        convert.export_hf(contents.find(tmp_path / "run"), tmp_path / "out")


def damaged(folder: Path, kind: str) -> str:
    """Harms a Hugging Face folder of several files; returns what the message must name."""
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / hf_folder.files(folder)[name]
    content, tensors = file.read_bytes(), load_file(file)
    if kind == "missing":
        file.unlink()
    elif kind in ("torn", "header torn", "empty", "longer"):
        ends = {"torn": content[:-100], "header torn": content[:20], "empty": b"", "longer": content + b"\0"}
        file.write_bytes(ends[kind])
    elif kind == "header":
        file.write_bytes(content[:8] + content[8:].replace(b'"dtype"', b'"dtypo"', 1))
    elif kind == "offsets":
        file.write_bytes(content.replace(b'"data_offsets":[0', b'"data_offsets":[4', 1))
    elif kind == "tensor":
        del tensors[name]
        save_file(tensors, file)
        return name
    elif kind in ("shape", "type"):
        tensors[name] = tensors[name].T.contiguous() if kind == "shape" else tensors[name].to(torch.int8)
        save_file(tensors, file)
        return name
    return file.name


@pytest.mark.parametrize(
    "kind", ["missing", "torn", "header torn", "empty", "longer", "header", "offsets", "tensor", "shape", "type"]
)
def test_a_damaged_folder_is_named_and_nothing_made(exported, tmp_path, kind):
    folder = shutil.copytree(exported, tmp_path / "damaged")
    named = damaged(folder, kind)
    with pytest.raises(ModelError) as error:
        convert.import_hf(folder, tmp_path / "out")
    assert named in str(error.value)
    assert error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_two_at_once_are_refused(saved, tmp_path):
    with staged(tmp_path / "out") as draft:
        (draft / "file").touch()
        with pytest.raises(CheckpointError, match="another process is writing it"):
            convert.reshard(saved, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


KILLED = """
import os, signal, sys
from shoal.checkpoint import convert
from pathlib import Path
left = int(sys.argv[1])
def watch(event, args):
    global left
    if event in ("open", "os.mkdir", "os.rename", "fsync"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
real = os.fsync
def fsync(file):
    sys.audit("fsync")
    real(file)
os.fsync = fsync
sys.addaudithook(watch)
source, out = map(Path, sys.argv[3:])
getattr(convert, sys.argv[2])(source, out, file_bytes=60_000)
"""


@pytest.mark.parametrize("verb", ["reshard", "export_hf", "import_hf"])
def test_killed_at_any_operation_on_files(saved, exported, tmp_path, verb):
    """Under its name there is all or nothing, and the next try needs no cleaning up. In leaps, to be short."""
    source, out = exported if verb == "import_hf" else saved, tmp_path / "out"
    point, outcomes = 1, []
    while True:
        ended = subprocess.run([sys.executable, "-c", KILLED, str(point), verb, str(source), str(out)], timeout=60)
        assert ended.returncode in (0, -signal.SIGKILL)
        outcomes.append(out.exists())
        if out.exists():
            if verb == "export_hf":
                huggingface.load(out, [])
            else:
                assert checkpoint.verify(contents.find(out)) == []
            shutil.rmtree(out)
        if ended.returncode == 0:
            break
        point = point + 1 if point < 4 else point + point // 3
    assert outcomes.count(False) >= 5
    assert outcomes[-1]
    assert list(tmp_path.iterdir()) == []


# The largest tensor has 8 MiB, weights and optimizer state 348 MiB, the weights alone 116 MiB.
LARGE = ModelOptions(
    vocab_size=2048, hidden_size=1024, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
LARGEST = 8 << 20
# Allocators grow in steps, and threads come and go: peaks of equal runs differ by up to 1 MiB (measured).
STEPS = 1 << 20
ALLOWED = LARGEST * 11 // 10 + STEPS

LIMITED = """
import resource, sys
limit, planted, *args = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
exec(planted)
from shoal.cli.main import main
code = main(args)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmPeak")), file=sys.stderr)
sys.exit(code)
"""

# Ways to read everything.
KEEPS = """
from shoal.checkpoint import safetensors
held, stream = [], safetensors.stream
def keeping(*args):
    for box, block in stream(*args):
        held.append(bytes(block))
        yield box, block
safetensors.stream = keeping
"""
MAPS = """
import mmap
from shoal.checkpoint import blocks
held, read = {}, blocks.read
def mapping(folder, piece, *args):
    if piece.file not in held:
        with open(folder / piece.file, "rb") as file:
            held[piece.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    read(folder, piece, *args)
blocks.read = mapping
"""
DIGESTS = """
import hashlib
hashlib.file_digest = lambda file, name: hashlib.new(name, file.read())
"""
OPENS = """
from shoal.checkpoint import manifest
read = manifest.read
def reading(folder):
    held.extend(path.read_bytes() for path in folder.iterdir())
    return read(folder)
held, manifest.read = [], reading
"""


def limited(args: list[str], limit: int = 0, planted: str = "") -> tuple[int, int]:
    """Exit code, and largest address space in bytes (0 after a failure), of a `shoal ckpt`.

    Stacks of threads are address space, used or not: they are kept small, and in one arena.
    """
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(limit), planted, "ckpt", *args]
    ended = subprocess.run(
        ["sh", "-c", 'ulimit -s 512; exec "$@"', "sh", *command],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if ended.returncode:
        assert limit, ended.stderr
        assert "MemoryError" in ended.stderr or "Cannot allocate memory" in ended.stderr, ended.stderr
        return ended.returncode, 0
    return 0, int(ended.stderr.split()[-1]) * 1024


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A large run and a small one with as many tensors and files; and their models as Hugging Face folders."""
    root = tmp_path_factory.mktemp("sizes")
    small = replace(LARGE, vocab_size=8, hidden_size=8, intermediate_size=8)
    for name, options in (("large", LARGE), ("small", small)):
        convert.export_hf(contents.find(run_of(root / name, options)), root / f"{name}-hf", file_bytes=1 << 30)
    yield root
    shutil.rmtree(root)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("verb", "options", "planted"),
    [
        ("show", [], [OPENS]),
        ("verify", [], [DIGESTS]),
        ("reshard", ["--pieces", "3"], [KEEPS, MAPS]),
        pytest.param("export-hf", [], [KEEPS, MAPS], marks=pytest.mark.nightly),
        ("export-hf", ["--dtype", "bf16"], [KEEPS]),
        ("import-hf", [], [KEEPS, MAPS]),
    ],
)
def test_memory_is_that_of_an_empty_checkpoint_and_the_largest_tensor(sizes, tmp_path, verb, options, planted):
    """The checkpoint is ten times larger than what is allowed beyond the command's own needs, which are measured on a
    checkpoint of a few bytes. What reads everything fails under the same limit."""
    out = tmp_path / "out"

    def command(name: str) -> list[str]:
        shutil.rmtree(out, ignore_errors=True)
        source = sizes / (f"{name}-hf" if verb == "import-hf" else name)
        return [verb, str(source), *([] if verb in ("show", "verify") else [str(out)]), *options]

    whole = sum(path.stat().st_size for path in (sizes / "large-hf").iterdir())
    assert whole >= 10 * ALLOWED
    limit = limited(command("small"))[1] + ALLOWED
    assert limited(command("large"), limit)[0] == 0
    if verb == "reshard":
        pairs = zip(checkpoint.tensors(contents.find(sizes / "large")), checkpoint.tensors(out), strict=True)
        assert all(torch.equal(old, new) for (_, old), (_, new) in pairs)
    for bug in planted:
        assert limited(command("large"), limit, bug)[0] != 0
        assert not out.exists()


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_checkpoint_ten_times_as_large_as_the_limit_of_memory(tmp_path):
    """Of all memory: Python's own is in it."""
    run = run_of(tmp_path / "large", replace(LARGE, num_hidden_layers=15))
    limit = 54 << 20
    assert sum(path.stat().st_size for path in contents.find(run).iterdir()) >= 10 * limit
    assert limited(["show", str(run)], limit)[0] == 0
    assert limited(["verify", str(run)], limit)[0] == 0
    assert limited(["reshard", str(run), str(tmp_path / "pieces"), "--pieces", "3"], limit)[0] == 0
    shutil.rmtree(tmp_path / "pieces")
    assert limited(["export-hf", str(run), str(tmp_path / "hf")], limit)[0] == 0
    assert sum(path.stat().st_size for path in (tmp_path / "hf").iterdir()) >= 10 * limit
    assert limited(["import-hf", str(tmp_path / "hf"), str(tmp_path / "out")], limit)[0] == 0
    for bug in (KEEPS, MAPS):
        assert limited(["reshard", str(run), str(tmp_path / "pieces")], limit, bug)[0] != 0


LOADING = """
import sys, torch
from pathlib import Path
from shoal import checkpoint
from shoal.checkpoint import manifest, reader
from shoal.shard import Shard
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
folder = Path(sys.argv[1])
wanted = [
    Shard(name, tensor.shape, (0,) * len(tensor.shape), torch.ones(tensor.shape))
    for name, tensor in manifest.read(folder).tensors.items()
]
exec(sys.argv[2])
before = peak()
checkpoint.load(folder, wanted)
print(peak() - before)
"""
MAPPED = """
import mmap
held, read = {}, reader.read
def mapping(folder, piece, box, item, into, block):
    if piece.file not in held:
        with open(folder / piece.file, "rb") as file:
            held[piece.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sum(held[piece.file][::4096])
    read(folder, piece, box, item, into, block)
reader.read = mapping
"""


# As many bytes at a time as a piece has.
BY_PIECES = "reader.BLOCK = 1 << 27"


@pytest.fixture(scope="module")
def in_one_piece(tmp_path_factory):
    """A checkpoint of one tensor of 64 MiB."""
    folder = tmp_path_factory.mktemp("one")
    tensor = torch.ones(1 << 12, 1 << 12)
    with Fleet(folder / "checkpoints", 1) as fleet:
        (saved,) = fleet.save([State([Shard("one", tuple(tensor.shape), (0, 0), tensor)], VALUES)], 1)
    assert saved.error is None
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("which", ["many", "one piece"])
def test_loading_needs_no_memory_beyond_what_it_fills(sizes, in_one_piece, which):
    """A run that goes on holds at its start what it held at its first step, and 8 MiB for checksums and a buffer."""
    folder = sizes / "large" if which == "many" else in_one_piece

    def more(planted: str) -> int:
        command = [sys.executable, "-c", LOADING, str(contents.find(folder)), planted]
        return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout)

    assert more("") < 8 << 20
    assert more(MAPPED if which == "many" else BY_PIECES) > 8 << 20


def streamed(folder: Path, tensor: Tensor, box: Box, limit: int) -> bytes:
    """The bytes of a box; the blocks that they come in are those of `split`."""
    made = [(block, bytes(view)) for block, view in blocks.stream(folder, tensor, box, memoryview(bytearray(limit)))]
    assert [block for block, _ in made] == list(blocks.split(box, limit // blocks.ITEM_BYTES[tensor.dtype]))
    return b"".join(view for _, view in made)


def test_pieces_are_found_among_many(tmp_path):
    """A tensor cut into a grid, whose pieces reach into the rows asked for from above and from the side."""
    whole = torch.arange(12 * 10, dtype=torch.int16).view(12, 10)
    grid = [((r, c), (n, m)) for r, n in ((0, 5), (5, 1), (6, 6)) for c, m in ((0, 3), (3, 7))]
    pieces, content = [], b""
    for (row, column), (rows, columns) in grid:
        part = bits(whole[row : row + rows, column : column + columns])
        pieces.append(Piece("file", (row, column), (rows, columns), (len(content), len(content) + len(part))))
        content += part
    (tmp_path / "file").write_bytes(content)
    tensor = Tensor("I16", (12, 10), pieces[::-1])
    for box in [Box((0, 0), (12, 10)), *(Box((r, c), (12 - r, 4)) for r in range(12) for c in range(7))]:
        for limit in (2, 10, 20, 64, 240):
            got = streamed(tmp_path, tensor, box, limit)
            assert got == bits(whole[box.offsets[0] :, box.offsets[1] : box.offsets[1] + box.shape[1]])


@settings(max_examples=30, deadline=None)
@given(cells((7, 5)))
def test_any_grid_of_pieces_gives_the_whole(tmp_path_factory, grid):
    folder = tmp_path_factory.mktemp("grid")
    whole = torch.arange(35, dtype=torch.float64).view(7, 5)
    boxes = [box for box in dict.fromkeys(grid) if prod(box[1])]
    pieces = []
    with open(folder / "file", "wb") as file:
        for offsets, shape in boxes:
            begin = file.tell()
            file.write(bits(whole[offsets[0] : offsets[0] + shape[0], offsets[1] : offsets[1] + shape[1]]))
            pieces.append(Piece("file", offsets, shape, (begin, file.tell())))
    tensor = Tensor("F64", (7, 5), pieces)
    for limit in (8, 40, 100, 280):
        assert streamed(folder, tensor, blocks.whole(tensor), limit) == bits(whole)
