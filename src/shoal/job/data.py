"""Which text is trained on, and how it becomes batches."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import at_least, one_of, require


@dataclass(frozen=True)
class DataOptions:
    """Text -> tokens -> packed sequences."""

    source: tuple[str, ...] = ("python",)
    """Files or folders of text or source code, *.jsonl (one object a line), `-` for standard input (JSONL if its
    first line is), or `python`: the source of this Python's standard library (without its tests)."""
    text_field: str = "text"
    """JSONL: the key that holds the text."""
    include: tuple[str, ...] = ()
    """Folders: shell patterns of file names to take, e.g. '*.py'; empty = every text file."""
    tokenizer: str = "auto"
    """`auto` = that of model.weights, where they are given, else `bpe`. `bpe` trains a byte-level BPE on the
    text; `bytes` takes every byte as a token; else a path to a Hugging Face tokenizer.json or a folder that
    holds one."""
    vocab_size: int = 4096
    """Tokens of the BPE that is trained, the special one included. Not used otherwise."""
    sequence_length: int = 256
    """Tokens per sequence."""
    pack: str = "best_fit"
    """`best_fit` puts several documents into one sequence, each attending only to itself; `pad`: one piece
    each."""
    order: str = "random"
    """`random`: another permutation each epoch, from the seed; `sequential`: as stored."""
    grow: bool = False
    """Read a growing store, which data.source names: a folder that `shoal data append` made, and may add text to while
    a run trains on it. Every row once, in the order in which the text came; needs order=sequential."""
    validation: float = 0.02
    """Share of the files (by bytes) kept for validation; whole files, never trained on. 0 = none.
    A single file or stream is split by documents instead (JSONL lines, or blocks of lines)."""
    cache: str = ""
    """Folder of prepared token stores; empty = ~/.cache/shoal (or $XDG_CACHE_HOME/shoal)."""
    workers: int = 0
    """Threads that tokenise; 0 = one per core."""

    def validate(self) -> None:
        require(len(self.source) > 0, "data.source is empty", "name a file or folder of text, or `python`")
        at_least("data.sequence_length", self.sequence_length, 1)
        at_least("data.vocab_size", self.vocab_size, 257)
        at_least("data.workers", self.workers, 0)
        one_of("data.pack", self.pack, ("best_fit", "pad"))
        one_of("data.order", self.order, ("random", "sequential"))
        require(
            not self.grow or self.order == "sequential",
            f"data.grow needs data.order='sequential', not {self.order!r}: what is still to come cannot be shuffled",
            "data.order = 'sequential' (--data.order sequential)",
        )
        require(0 <= self.validation < 1, f"data.validation={self.validation} is not in [0, 1)", "e.g. 0.02")
