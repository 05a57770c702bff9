"""`shoal ckpt show|verify|reshard|export-hf|import-hf`: checkpoints, looked at and converted on one CPU process."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.errors import JobError
from shoal.job.check import nearest, one_of, require
from shoal.observe.units import counted

_HELP = """usage: shoal ckpt show|verify|reshard|export-hf|import-hf PATH [OUT] [--OPTION VALUE ...]

  show       what is in a checkpoint: step, layout, tensors, files
  verify     read all of it and compare checksums; exit code 1 if something is damaged
  reshard    the same checkpoint in other files
  export-hf  the model as a folder that transformers reads
  import-hf  a run folder, with a checkpoint of step 0, from such a folder

PATH: a run (its newest checkpoint) or a checkpoint, RUN/checkpoints/step-00000100; for import-hf, a Hugging Face
folder. All work in little memory, whatever the size of the model. With `--format json` the result is one JSON object,
the last line on standard output. `shoal ckpt show --help` shows the options.
"""

_Path = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
_Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
_Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
# Bytes of what is called a GiB.
_GIB = 1 << 30
_DTYPES = {"saved": None, "fp32": "F32", "bf16": "BF16"}


@dataclass(frozen=True)
class ShowOptions:
    """Says what is in a checkpoint, from its manifest: step, layout, what state there is, files.

    $ shoal ckpt show runs/quickstart-...
    $ shoal ckpt show runs/quickstart-.../checkpoints/step-00000760 --tensors true
    """

    path: _Path = ""
    """Folder of a run (its newest checkpoint) or of a checkpoint."""
    tensors: bool = False
    """Every tensor too: dtype, shape, bytes, and into how many pieces it is cut."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output, tensors and checksums in it."""


@dataclass(frozen=True)
class VerifyOptions:
    """Reads all files of a checkpoint and compares them with their checksums. Exit code 1 if any is damaged.

    $ shoal ckpt verify runs/quickstart-...
    """

    path: _Path = ""
    """Folder of a run (its newest checkpoint) or of a checkpoint."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `checkpoint` and `damaged`."""


@dataclass(frozen=True)
class ReshardOptions:
    """Writes a checkpoint again, the optimizer's state too, into other files. Every bit of every tensor stays.

    $ shoal ckpt reshard runs/big checkpoint-to-copy --file-gib 2
    $ shoal ckpt reshard runs/big/checkpoints/step-00000760 runs/big/checkpoints/step-00000760-1 --pieces 8

    Under such a name in the run's own folder, the run goes on from it. Training needs none of this: any layout loads
    any other's checkpoint.
    """

    path: _Path = ""
    """Folder of a run (its newest undamaged checkpoint) or of a checkpoint."""
    out: _Out = ""
    """Folder of the new checkpoint; must not exist."""
    pieces: int = 0
    """Files, of equal size but for one row of a tensor; 0 = as many as --file-gib says."""
    file_gib: float = 5.0
    """Size of a file, about, in GiB (2**30 bytes)."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: that of `ckpt show OUT`."""


@dataclass(frozen=True)
class ExportOptions:
    """Writes the model of a checkpoint as a Hugging Face folder, such as `model` of a finished run.

    $ shoal ckpt export-hf runs/quickstart-... my-model
    $ shoal ckpt export-hf runs/big/checkpoints/step-00000100 my-model --dtype bf16
    """

    path: _Path = ""
    """Folder of a run (its newest undamaged checkpoint) or of a checkpoint in a run's folder."""
    out: _Out = ""
    """Folder to make; must not exist."""
    dtype: str = "saved"
    """Of the weights: `saved` (as they are), `fp32`, or `bf16` (half of that; rounded)."""
    file_gib: float = 5.0
    """Size of a file at most, in GiB (2**30 bytes); one with a single tensor may be larger."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: `checkpoint` and `model`."""


@dataclass(frozen=True)
class ImportOptions:
    """Makes a run folder of a Hugging Face folder: job.toml, tokenizer, and a checkpoint of step 0.

    $ shoal ckpt import-hf SmolLM2-135M runs/smol                               to generate from, or to look at
    $ shoal ckpt import-hf SmolLM2-135M runs/smol --recipe recipes/my-text.toml  to train: prepares the text, too
    $ shoal train --resume runs/smol

    The weights keep their dtype and every bit; the optimizer's state begins at zero. To fine-tune on this machine,
    `shoal train --model.weights FOLDER` needs no copy.
    """

    path: _Folder = ""
    """Hugging Face folder: config.json, safetensors, tokenizer.json."""
    out: _Out = ""
    """Run folder to make; must not exist."""
    recipe: str = ""
    """TOML file: the text, optimizer and length of the run that `shoal train --resume OUT` then is; empty = none, and
    the run can be generated from but not trained."""
    file_gib: float = 5.0
    """Size of a file, about, in GiB (2**30 bytes)."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output: that of `ckpt show OUT`."""


def run(args: list[str]) -> Answer:
    """Prints what was found or made."""
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(_HELP, end="")
        sys.exit(0)
    if verb not in _VERBS:
        raise JobError(f"unknown verb 'ckpt {verb}'", fix=nearest(verb, _VERBS))
    kind, work = _VERBS[verb]
    options = flags.parse(kind, args[1:], f"shoal ckpt {verb}")
    if not options.path or not getattr(options, "out", "given"):
        missing = "path" if not options.path else "OUT folder"
        places = "FOLDER OUT" if verb == "import-hf" else "PATH OUT" if hasattr(options, "out") else "PATH"
        raise JobError(f"no {missing} is named", fix=f"shoal ckpt {verb} {places}; `shoal runs` lists the runs")
    return work(options)


def _show(options: ShowOptions) -> Answer:
    from shoal.checkpoint import contents

    facts = contents.contents(contents.find(Path(options.path)))
    _print(facts)
    if options.tensors:
        width = max(map(len, facts["tensors"]), default=0)
        for name, tensor in facts["tensors"].items():
            cut = f"  {tensor['pieces']} pieces" if tensor["pieces"] > 1 else ""
            print(f"  {name:{width}}  {tensor['dtype']:4} {list(tensor['shape'])}  {tensor['bytes']:,} bytes{cut}")
    return Answer(facts)


def _print(facts: dict[str, Any]) -> None:
    from shoal.observe.units import counted, size

    print(facts["checkpoint"])
    print(f"  step    {facts['step']:,}" + (f", saved by layout {facts['layout']}" if facts["layout"] else ""))
    width = max(10, *map(len, facts["kinds"]))
    for kind, of in facts["kinds"].items():
        told = f"{counted(of['tensors'], 'tensor')}, {of['elements']:,} elements of {', '.join(of['dtypes'])}"
        print(f"  {kind:{width}}  {told}, {size(of['bytes'])}")
    for name, file in facts["files"].items():
        print(f"  {name}  {size(file['bytes'])}")
    print(f"  {size(facts['bytes'])} in {counted(len(facts['files']), 'file')} and the manifest")


def _verify(options: VerifyOptions) -> Answer:
    from shoal.checkpoint import contents, health, manifest

    checkpoint = contents.find(Path(options.path))
    damages = health.verify(checkpoint)
    for file, reason in damages:
        print(f"{file} {reason}")
    if not damages:
        print(f"{checkpoint}: every bit of {counted(len(manifest.read(checkpoint).files), 'file')} is as it was saved")
    found = [{"file": str(file), "reason": reason} for file, reason in damages]
    return Answer({"checkpoint": str(checkpoint), "damaged": found}, exit_code=1 if damages else 0)


def _reshard(options: ReshardOptions) -> Answer:
    from shoal.checkpoint import contents, convert

    require(options.pieces >= 0, f"--pieces={options.pieces} is less than 0", "e.g. --pieces 8")
    size = _bytes(options.file_gib)
    out = Path(options.out)
    convert.reshard(contents.trusted(Path(options.path), print), out, pieces=options.pieces, file_bytes=size)
    return _made(out)


def _made(checkpoint: Path) -> Answer:
    from shoal.checkpoint import contents

    facts = contents.contents(checkpoint)
    _print(facts)
    return Answer(facts)


def _export(options: ExportOptions) -> Answer:
    from shoal.checkpoint import contents, convert

    one_of("--dtype", options.dtype, _DTYPES)
    size = _bytes(options.file_gib)
    checkpoint = contents.trusted(Path(options.path), print)
    convert.export_hf(checkpoint, Path(options.out), dtype=_DTYPES[options.dtype], file_bytes=size)
    print(f"{checkpoint} → {options.out}")
    return Answer({"checkpoint": str(checkpoint), "model": options.out})


def _import(options: ImportOptions) -> Answer:
    from shoal.checkpoint import contents, convert
    from shoal.observe import commands

    size = _bytes(options.file_gib)
    begin = (lambda folder: _begin(options, folder)) if options.recipe else None
    convert.import_hf(Path(options.path), Path(options.out), file_bytes=size, begin=begin)
    made = _made(contents.find(Path(options.out)))
    print(f"next: {commands.resume(options.out) if begin else commands.generate(options.out)}")
    return made


def _begin(options: ImportOptions, folder: Path) -> None:
    """Makes the run folder of a recipe that starts from the weights, with its text prepared."""
    from shoal.job import read
    from shoal.launch.train import ready

    job = read(options.recipe)
    job = replace(job, model=replace(job.model, weights=options.path), run=replace(job.run, dir=str(folder)))
    ready(job.validate(), None, time.time())


def _bytes(gib: float) -> int:
    require(gib > 0, f"--file-gib={gib} is not positive", "e.g. --file-gib 5")
    return max(1, int(gib * _GIB))


_VERBS: dict[str, tuple[type[Any], Any]] = {
    "show": (ShowOptions, _show),
    "verify": (VerifyOptions, _verify),
    "reshard": (ReshardOptions, _reshard),
    "export-hf": (ExportOptions, _export),
    "import-hf": (ImportOptions, _import),
}
