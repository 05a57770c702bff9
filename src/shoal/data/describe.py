"""What is in a prepared corpus, in numbers and as a sample, and what plain compressors make of it."""

from __future__ import annotations

import lzma
import zlib
from dataclasses import asdict
from typing import Any

import numpy as np

from shoal.data import tokenizer
from shoal.data.order import permute
from shoal.data.pack import Plan, plan
from shoal.data.plans import packed
from shoal.data.prepared import SPLITS, Prepared
from shoal.data.store import Store
from shoal.data.tokenizer import Tokenizer
from shoal.job.data import DataOptions

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def describe(prepared: Prepared, options: DataOptions) -> dict[str, Any]:
    """Plain values: counts, document lengths, packing at `options.sequence_length`, a decoded row.

    bytes_per_token: of the clean text in UTF-8. length_percentiles: tokens of training documents.
    rows_efficiency: valid positions / all positions, as packed and, to compare, with one piece a row. sample:
    one random training row, the text of each piece of a document in it. segments: of a growing store, what each
    holds; None of another corpus.
    """
    length = options.sequence_length
    prepared.check_length("train", length)
    prefixes = prepared.prefixes("train")
    stores = [Store(prefix) for prefix in prefixes]
    plans = [packed(prefix, length, options.pack) for prefix in prefixes]
    padded = [plan(store.start_D, store.length_D, length, "pad") for store in stores]
    rows, in_padded = (sum(one.rows for one in all) for all in (plans, padded))
    predictions = sum(one.predictions for one in plans)
    percentiles = np.percentile(np.concatenate([s.length_D for s in stores]), _PERCENTILES).round().astype(int).tolist()
    appended = prepared.segments
    splits = {name: asdict(prepared.counts(name)) for name in SPLITS}
    total = {key: sum(split[key] for split in splits.values()) for key in ("bytes", "tokens", "replaced")}
    return {
        "folder": str(prepared.folder),
        "vocab_size": prepared.vocab_size,
        "start_token": prepared.start_token,
        "end_token": prepared.end_token,
        **splits,
        "bytes_per_token": total["bytes"] / total["tokens"],
        "replaced": total["replaced"],
        "binary": prepared.binary,
        "empty": prepared.empty,
        "unreadable": prepared.unreadable,
        "length_percentiles": dict(zip(map(str, _PERCENTILES), percentiles, strict=True)),
        "sequence_length": options.sequence_length,
        "rows": rows,
        "packing_efficiency": predictions / (rows * length),
        "padding_efficiency": predictions / (in_padded * length),
        "validation_files": list(prepared.validation_files),
        "segments": None if appended is None else [asdict(one.counts) for one in appended],
        "sample": _row(stores, plans, int(permute(np.array([0]), rows, 0, 0)[0]), tokenizer.load(prepared.tokenizer)),
    }


def _row(stores: list[Store], plans: list[Plan], row: int, vocabulary: Tokenizer) -> list[str]:
    """The text of each piece of a row; rows are numbered through all stores."""
    number = 0
    while row >= plans[number].rows:
        row -= plans[number].rows
        number += 1
    rows, texts = plans[number], []
    for piece in range(rows.first_R[row], rows.first_R[row + 1]):
        start = rows.start_P[piece]
        texts.append(vocabulary.decode(stores[number].tokens[start : start + rows.length_P[piece]].tolist()))
    return texts


def compressed_bits_per_byte(prepared: Prepared) -> dict[str, float]:
    """{"gzip -9": …, "xz -9": …}: bits per byte of the clean validation text; empty without one.

    Of a large corpus, the first 64 MiB of it. The documents are compressed as one stream, so the compressors
    see more context than a model does; a model in turn also says where each document ends.
    """
    gzip = zlib.compressobj(9, wbits=31)
    xz = lzma.LZMACompressor(preset=9)
    sizes, size = {"gzip -9": 0, "xz -9": 0}, 0
    for block in prepared.validation_text():
        size += len(block)
        sizes["gzip -9"] += len(gzip.compress(block))
        sizes["xz -9"] += len(xz.compress(block))
    sizes["gzip -9"] += len(gzip.flush())
    sizes["xz -9"] += len(xz.flush())
    return {name: 8 * compressed / size for name, compressed in sizes.items()} if size else {}
