"""Rows of published tables: what a field means, and why a row is skipped."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from shoal.errors import JobError
from shoal.planning import published, shapes

ROW = {
    "table": "t", "software": "NeMo / Megatron-Core", "model": "Llama 8B", "layers": "32", "hidden": "4096",
    "ffn": "14336", "heads": "32", "kv_heads": "8", "vocab": "128256", "seq_len": "8192", "gpu": "H100-80GB-SXM",
    "gpus_per_node": "8", "interconnect": "", "num_gpus": "16", "zero_stage_or_fsdp": "distributed optimizer",
    "tp": "2", "pp": "2", "vpp": "", "cp": "1", "ep": "", "sp": "", "micro_batch": "1", "global_batch": "64",
    "precision": "BF16", "activation_ckpt": "none", "tokens_per_s_per_gpu": "", "tflops_per_gpu": "",
    "iteration_s": "4", "peak_mem_gib": "", "mem_kind": "",
}  # fmt: skip


def file(tmp_path, *rows):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(ROW))
        writer.writeheader()
        writer.writerows({**ROW, **row} for row in rows)
    return path


def test_a_row_is_read(tmp_path):
    rows = published.read(file(tmp_path, {"vocab": "50257"}))
    assert not rows.skipped
    work = rows.work
    assert (work.data, work.micro_batches, work.fsdp, work.zero, work.shards) == (4, 16, 4, 1, 1)
    assert (work.gated, work.key_heads, work.head_size) == (1, 8, 128)
    assert work.vocab == 50432  # padded to a multiple of 128 × 2
    assert work.nic == 400e9 / 8
    assert (rows.work.device, rows.work.stack) == ("h100", "core")
    assert rows.known.all()


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        ({"tokens_per_s_per_gpu": "1024", "iteration_s": ""}, "seconds", 64 * 8192 / 1024 / 16),
        ({"software": "MaxText (JAX)", "zero_stage_or_fsdp": "FSDP=2+DP (JAX)"}, "fsdp", 2),
        ({"software": "PyTorch FSDP2", "zero_stage_or_fsdp": "FSDP FULL_SHARD (ZeRO-3)", "tp": ""}, "fsdp", 8),
        ({"software": "Megatron-LM 2021"}, "chunks", 2),  # 16 layers a stage: 3 does not divide them
        ({"software": "Megatron-LM 2021", "global_batch": "60"}, "chunks", 1),  # 15 micro-batches for 2 ranks
        ({"software": "Megatron-LM 2021", "vpp": "4"}, "chunks", 4),
        ({"sp": "no"}, "shards", 0),
        ({"precision": "FP8"}, "low", 1),
        ({"activation_ckpt": "full"}, "recompute", 1),
        ({"activation_ckpt": "selective"}, "selective", 1),
        ({"activation_ckpt": "selective"}, "operators", 0),
        ({"activation_ckpt": "selective layer"}, "recompute", 0.5),
        ({"activation_ckpt": "selective (op)", "software": "torchtitan, FSDP2"}, "operators", 1),
        ({"activation_ckpt": "selective (op)", "software": "torchtitan, FSDP2"}, "selective", 0),
        ({"activation_ckpt": "full", "software": "torchtitan, FSDP2"}, "operators", 0),
        ({"software": "PyTorch FSDP1"}, "flash", 1),
        ({"software": "PyTorch FSDP1, SDPA"}, "flash", 2),
        ({"software": "PyTorch FSDP1, FlashAttention-2"}, "flash", 2),
        ({"software": "Megatron-LM 2021, no FlashAttention"}, "flash", 0),
        ({"interconnect": "8x HDR 200Gbps IB"}, "nic", 200e9 / 8),
        ({"interconnect": "8×100 Gbit/s, NVLink 900 GB/s"}, "nic", 100e9 / 8),
        ({"interconnect": "NVLink 900 GB/s"}, "nic", 400e9 / 8),
        ({"interconnect": "50 GB/s InfiniBand"}, "nic", 50e9),
        ({"interconnect": "1600 Gbps per node"}, "nic", 200e9 / 8),
        ({"interconnect": "RoCE, 200 Gb/s a GPU"}, "nic", 200e9 / 8),
        ({"interconnect": "4 NICs of 200 Gbit/s"}, "nic", 100e9 / 8),
        ({"gpu": "TPU v5p", "gpus_per_node": ""}, "per_node", 8960),
        ({"gpu": "GB200", "gpus_per_node": "", "num_gpus": "128", "global_batch": "128"}, "per_node", 64),
        ({"heads": ""}, "heads", 32),
        ({"gpu": "A100-40GB"}, "nic", 50e9 / 8),
        ({"gpu": "A100-40GB", "interconnect": "8x HDR 200Gbps"}, "nic", 200e9 / 8),
        ({"vocab": "50257", "software": "MosaicML FSDP1"}, "vocab", 50257),
    ],
)  # fmt: skip
def test_what_a_field_means(tmp_path, row, column, value):
    rows = published.read(file(tmp_path, row))
    found = rows.seconds if column == "seconds" else getattr(rows.work, column)
    assert found == pytest.approx([value])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"layers": ""}, "no layers"),
        ({"micro_batch": "auto"}, "no micro_batch"),
        ({"global_batch": "0"}, "no global_batch"),
        ({"iteration_s": ""}, "no seconds, and no tokens/s"),
        ({"mem_kind": "formula"}, "memory is a formula, and there is no time"),
        ({"gpu": "Cerebras"}, "unknown device 'Cerebras'"),
        ({"precision": "NVFP4"}, "products in 4 bits are not modelled"),
        ({"global_batch": "2"}, "global batch < replicas × micro-batch"),
        ({"ep": "8"}, "experts, of a model that is not known"),
        ({"model": "Snowflake 128x3.66B MoE"}, "experts, of a model that is not known"),
        ({"model": "Mixtral 8x7B", "hidden": "2048"}, "hidden is not that of mixtral-8x7b"),
    ],
)
def test_a_row_with_too_little_is_skipped_and_says_why(tmp_path, row, reason):
    rows = published.read(file(tmp_path, row, {}))
    assert rows.skipped == {reason: 1}
    assert len(rows.seconds) == len(rows.work) == len(rows.rows) == 1


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Mixtral 8x7B", "mixtral-8x7b"), ("mixtral-8x22b-v0.1", "mixtral-8x22b"), ("DeepSeek-V3 671B", "deepseek-v3"),
        ("DeepSeek V3 (proxy)", "deepseek-v3"), ("Qwen3-30B", "qwen3-30b-a3b"), ("qwen3_235b_a22b", "qwen3-235b-a22b"),
    ],
)  # fmt: skip
def test_models_with_experts_are_known_by_name(tmp_path, said, name):
    """What a table prints is its own, cut layers too; what it does not print is the model's."""
    shape = shapes.named(name)
    row = {"model": said, "layers": "2", "hidden": str(shape.hidden), "ep": "4", "tp": "2", "ffn": "", "vocab": ""}
    work = published.read(file(tmp_path, row)).work
    expected = shape.columns | {"layers": 2.0, "dense_layers": min(shape.dense_layers, 2), "expert": 4.0}
    for column in ("experts", "chosen", "expert_feed", "shared_feed", "latent", "key_heads", *expected):
        if column != "vocab":
            assert work.columns[column] == expected[column], column
    assert work.vocab >= shape.vocab


def test_dense_models_of_a_family_that_has_experts_stay_dense(tmp_path):
    work = published.read(file(tmp_path, {"model": "Qwen3 32B"}, {"model": "Llama 3 8B"}, {"model": "Mistral 7B"})).work
    assert (work.experts == 0).all()


@pytest.mark.parametrize(
    ("row", "kind", "out"),
    [
        ({"peak_mem_gib": "60", "mem_kind": "device (nvidia-smi)"}, "device", False),
        ({"peak_mem_gib": "60", "mem_kind": "max reserved"}, "reserved", False),
        ({"peak_mem_gib": "60", "iteration_s": ""}, "allocated", False),
        ({"peak_mem_gib": "OOM", "iteration_s": ""}, "allocated", True),
        ({"iteration_s": "out of memory"}, "allocated", True),
    ],
)
def test_what_a_row_tells_of_memory(tmp_path, row, kind, out):
    """A row that tells none is not among them, whatever it says of steps."""
    filled = published.read(file(tmp_path, row, {}, {"iteration_s": "", "mem_kind": ""})).filled
    assert (filled.kind, filled.out, len(filled.work)) == (kind, out, 1)


def test_of_the_fitted_file_898_rows_are_used():
    rows = published.read(published.FIT)
    assert len(rows.seconds) == 898
    assert sum(rows.skipped.values()) == 45
    assert np.isfinite(rows.seconds).all()
    assert (rows.seconds > 0).all()
    for name, column in rows.work.columns.items():
        assert (np.isfinite(column) | (name == "older")).all(), name


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"table,software\n", "has no column gpu"), (b"", "has no column table"), (b"\xff\xfe", "cannot read it")],
)
def test_another_file_is_refused(tmp_path, content, words):
    path = tmp_path / "other.csv"
    path.write_bytes(content)
    with pytest.raises(JobError, match=words):
        published.read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(JobError, match="cannot read it"):
        published.read(tmp_path / "nothing.csv")
