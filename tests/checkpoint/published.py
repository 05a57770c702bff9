"""Folders as DeepSeek publishes them: matrices in fp8 with a scale for each block, and a layer that predicts further
tokens. Made by hand, and what is meant by them worked out by hand, element by element."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal import mesh as meshes
from shoal.checkpoint import huggingface
from shoal.models import build, config
from shoal.models.storage import canonical
from shoal.ops.fill import Fill
from shoal.ops.initialise import initialise_
from shoal.training.parts import assemble
from tests.equivalence import cases

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FURTHER = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.head.weight", "self_attn.q_a_proj.weight")


def number(byte: int) -> float:
    """An e4m3 number: a sign, 4 bits of exponent with bias 7, 3 bits of fraction; no infinities."""
    sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 0xF, byte & 7
    assert (exponent, fraction) != (15, 7), "not a number"
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def by_hand(stored: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """float32, one element after the other."""
    bytes_, scales = stored.view(torch.uint8).tolist(), scale.float().numpy()
    out = np.empty(stored.shape, dtype=np.float32)
    for row, line in enumerate(bytes_):
        for column, byte in enumerate(line):
            out[row, column] = np.float32(number(byte)) * scales[row // block[0], column // block[1]]
    return torch.from_numpy(out)


def quantised(whole: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The largest element of a block becomes 448, the largest number there is."""
    rows, columns = (torch.arange(n) // b for n, b in zip(whole.shape, block, strict=True))
    scale = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            scale[i, j] = whole[rows == i][:, columns == j].abs().max() / 448
    return (whole / scale[rows][:, columns]).to(torch.float8_e4m3fn), scale


def publish(options: Any, folder: Path, block: tuple[int, int], further: int = 0, scale_type: Any = None) -> Path:
    """A random model of these options as they publish it, the scales in a file of their own; and, in `folder`/plain,
    the same numbers as float32."""
    model = build(options)
    for name, tensor in canonical(model):
        initialise_(tensor, name, tuple(tensor.shape), (0,) * tensor.ndim, Fill(float("norm" in name), 0.2), 0)
    huggingface.export(options, canonical(model), folder / "plain")
    plain = load_file(folder / "plain" / "model.safetensors")
    stored, scales = {}, {}
    for name, tensor in plain.items():
        kept = tensor.ndim < 2 or name.endswith(("mlp.gate.weight", "embed_tokens.weight", "lm_head.weight"))
        if kept:
            stored[name] = tensor
            continue
        stored[name], scale = quantised(tensor, block)
        scales[f"{name}_scale_inv"] = scale.to(scale_type or torch.float32)
        plain[name] = by_hand(stored[name], scales[f"{name}_scale_inv"], block)
    save_file(plain, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    for name in FURTHER if further else ():
        stored[f"model.layers.{options.num_hidden_layers}.{name}"] = torch.ones(4, 4)
    save_file(stored, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(scales, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(stored, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(scales, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    words = config.to_hf(options) | {"quantization_config": {**FP8, "weight_block_size": list(block)}}
    if further:
        words["num_nextn_predict_layers"] = further
    (folder / "config.json").write_text(json.dumps(words))
    return folder


def train(seat: meshes.Seat, layout: str, folder: str) -> dict[str, Any]:
    """A rank's part of two steps from the weights of the folder, in float64."""
    torch.set_num_threads(1)
    what = cases.job(layout, 2, "sgd", model="deepseek", tied=False)
    found = replace(config.read(Path(folder)), weights=folder)
    what = replace(what, model=found)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        return cases.take_steps(assemble(what, mesh), 2)
    finally:
        mesh.close()
