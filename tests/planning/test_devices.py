"""The catalogue: plausible figures with their sources, names in tables, and names that are none."""

from __future__ import annotations

import pytest

from shoal.errors import JobError
from shoal.planning import devices


def test_every_device_has_plausible_figures_and_says_where_they_are_from():
    assert len(devices.catalogue()) == 35
    for name, device in devices.catalogue().items():
        cpu = name.startswith(("xeon", "epyc"))
        assert (1e12 if cpu else 5e13) < device.peak_16 < 5e15, device
        assert 1.5e10 < device.memory < (1e12 if cpu else 4e11), device
        assert 2e11 < device.bandwidth < 1e13, device
        assert 1e10 < device.link < 1.1e12, device
        assert 1e9 < device.nic < 2e11, device
        assert 0.4 < device.measured["bf16"] < 1, device
        assert device.source, device


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A100-40GB", "a100-40"), ("A100 (single 8-GPU node)", "a100-80"), ("A100-80GB-SXM", "a100-80"),
        ("H100-80GB-SXM", "h100"), ("H100 PCIe", "h100-pcie"), ("H200", "h200"), ("GH200 96GB", "gh200-96"),
        ("GB200 NVL72", "gb200"), ("B200-SXM", "b200"), ("V100-SXM2-32GB", "v100-32"), ("L4", "l4"), ("L40S", "l40s"),
        ("TPU v5p", "tpu-v5p"), ("MI300X", "mi300x"), ("Gaudi 3", "gaudi3"), ("H800", "h800"), ("abacus", None),
    ],
)  # fmt: skip
def test_names_in_published_tables(text, name):
    found = devices.published(text)
    assert (found.name if found else None) == name


def test_another_name_is_refused_with_the_nearest():
    with pytest.raises(JobError, match="no device is called 'a100-8'") as refused:
        devices.device("a100-8")
    assert "a100-80" in refused.value.fix
