"""What is in a prepared corpus, in numbers and as a sample, and what plain compressors make of it."""

from __future__ import annotations

import lzma
import zlib
from dataclasses import asdict
from typing import Any

import numpy as np

from shoal.data import tokenizer
from shoal.data.order import permute
from shoal.data.pack import plan
from shoal.data.prepared import SPLITS, Prepared
from shoal.job.data import DataOptions

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def describe(prepared: Prepared, options: DataOptions) -> dict[str, Any]:
    """Plain values: counts, document lengths, packing at `options.sequence_length`, a decoded row.

    bytes_per_token: of the clean text in UTF-8. length_percentiles: tokens of training documents.
    rows_efficiency: valid positions / all positions, as packed and, to compare, with one piece a row. sample:
    one random training row, the text of each piece of a document in it.
    """
    store = prepared.store("train")
    rows = prepared.plan("train", options.sequence_length, options.pack)
    padded = plan(store.start_D, store.length_D, options.sequence_length, "pad")
    vocabulary = tokenizer.load(prepared.tokenizer)
    row = int(permute(np.array([0]), rows.rows, 0, 0)[0])
    sample = []
    for piece in range(rows.first_R[row], rows.first_R[row + 1]):
        start = rows.start_P[piece]
        sample.append(vocabulary.decode(store.tokens[start : start + rows.length_P[piece]].tolist()))
    percentiles = np.percentile(store.length_D, _PERCENTILES).round().astype(int).tolist()
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
        "rows": rows.rows,
        "packing_efficiency": rows.predictions / (rows.rows * options.sequence_length),
        "padding_efficiency": padded.predictions / (padded.rows * options.sequence_length),
        "validation_files": list(prepared.validation_files),
        "sample": sample,
    }


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
