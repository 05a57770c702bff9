"""Clusters: by name, and what they are as a whole. Oracles: figures worked out by hand, and published ones."""

from __future__ import annotations

import pytest

from shoal.errors import JobError
from shoal.planning import cluster, published, work
from shoal.planning.cluster import Cluster, Link
from shoal.planning.cluster_file import parse


def test_a_name_gives_what_the_catalogue_says():
    found = cluster.named("A100-80x512")
    pool = found.pools[0]
    assert (found.name, found.count, len(found.pools), pool.nodes, pool.per_node) == ("a100-80x512", 512, 1, 64, 8)
    assert (pool.inside.kind, pool.inside.bandwidth) == ("nvlink", 300e9)
    assert (pool.between.kind, pool.between.bandwidth) == ("infiniband", 25e9)
    assert pool.inside.latency == pytest.approx(3.4e-6)
    assert (found.price, found.mtbf) == (None, None)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("h100x16384", {"h100": (16384, 8)}),
        ("mi300xx16", {"mi300x": (16, 8)}),
        ("h100x4", {"h100": (4, 4)}),
        ("tpu-v7xx8", {"tpu-v7x": (8, 8)}),
        ("tpu-v5ex512", {"tpu-v5e": (512, 256)}),
        ("gb200x72", {"gb200": (72, 72)}),
        ("gb200x10", {"gb200": (10, 10)}),
        ("gb300x144", {"gb300": (144, 72)}),
        ("gb200x128", {"gb200": (128, 64)}),
        ("gb200x100", {"gb200": (100, 20)}),
        (" h100x64 + rtx4090x3", {"h100": (64, 8), "rtx4090": (3, 1)}),
    ],
)
def test_names(text: str, counts: dict[str, tuple[int, int]]):
    assert {pool.name: (pool.count, pool.per_node) for pool in cluster.named(text).pools} == counts


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("h100", "'h100' does not say how many", "h100x8"),
        ("h100x8+RTX4090", "does not say how many", "rtx4090x8"),
        ("h 100", "is no cluster", "DEVICExCOUNT"),
        ("", "is no cluster", "DEVICExCOUNT"),
        ("h100x-8", "is no cluster", "DEVICExCOUNT"),
        ("h100x64+", "is no cluster", "DEVICExCOUNT"),
        ("h10x8", "no device is called 'h10'", "h100"),
        ("cpux8", "no memory, bandwidth, peak, link, units of a cpu", 'like = "cpu"'),
        ("h100x0", "less than 1", "1 or more"),
        ("h100x12", "h100.count=12 does not fill nodes of 8", "8 or 16"),
        ("gb200x73", "gb200.count=73 does not fill nodes of 72", "72 or 144"),
        ("h100x99999999999", "more than 10000000", "or less"),
        ("h100x8+h100x8", "h100 is twice", "add"),
    ],
)
def test_names_of_no_cluster(text: str, what: str, fix: str):
    with pytest.raises(JobError, match=what) as refused:
        cluster.named(text)
    assert fix in refused.value.fix


def test_failures_of_all_devices_add_up_to_the_published_interruptions():
    """Llama 3: 419 in 54 days on 16,384 devices."""
    mtbf = cluster.named("h100x16384").mtbf
    assert mtbf == pytest.approx(54 * 86400 / 419, rel=0.002)


def mixed(rest: str = "") -> Cluster:
    return parse(
        f"""
        [pool.new]
        device = "h100"
        count = 16
        price = 3
        mtbf = "100 h"
        between = {{ kind = "roce", bandwidth = "40 GB/s", latency = "30 us" }}
        [pool.old]
        device = "a100-80"
        count = 8
        {rest}
        """
    )


def test_what_one_pool_does_not_say_the_cluster_does_not_know():
    assert (mixed().price, mixed().mtbf) == (None, None)
    assert mixed("price = 0.5").price == 16 * 3 + 8 * 0.5
    assert mixed("price = 0").price == 48
    # A device of the first fails each 100 h, of the second each 50 h: 0.16 + 0.16 failures an hour.
    assert mixed('mtbf = "50 h"').mtbf == pytest.approx(3600 / 0.32)


def test_between_two_pools_of_a_site_the_slower_link_counts():
    new, old = mixed().pools
    assert mixed().link(new, old) == Link("infiniband", 25e9, pytest.approx(30e-6))
    assert mixed().link(old, new) == mixed().link(new, old)
    assert mixed().link(new, new) == new.between


def test_between_sites_the_line_counts_whichever_comes_first():
    found = parse(
        """
        pool.a = { device = "h100", count = 8, site = "west" }
        pool.b = { device = "h100", count = 8, site = "east" }
        across.west.east = { bandwidth = "800 Mbit/s" }
        """
    )
    a, b = found.pools
    line = Link("internet", 1e8, pytest.approx(25e-3))
    assert found.link(a, b) == found.link(b, a) == line
    assert found.link(a, a) == a.between


def test_a_link_of_which_only_the_latency_is_said_has_the_devices_bandwidth():
    text = 'pool.a = { device = "h100", count = 8, between = { latency = "1 ms" } }'
    assert parse(text).pools[0].between == Link("infiniband", 50e9, pytest.approx(1e-3))


def test_columns_are_those_of_the_same_device_in_a_published_row():
    row = {"gpu": "A100-80GB", "interconnect": "", "gpus_per_node": ""}
    for gpu, name in (("A100-80GB", "a100-80x64"), ("H100", "h100x64"), ("V100-32GB", "v100-32x64")):
        device = cluster.named(name).pools[0].device
        columns = cluster.named(name).pools[0].columns
        assert columns == published._device(row | {"gpu": gpu}, device)
        assert {*columns} == {*work.DEVICE, "per_node"}


def test_columns_have_the_links_of_the_pool():
    text = (
        'pool.a = { device = "h100", count = 8, per_node = 2, inside = {bandwidth = "9 GB/s"}, between = "infiniband" }'
    )
    columns = parse(text).pools[0].columns
    assert (columns["link"], columns["nic"], columns["per_node"]) == (9e9, 50e9, 2.0)
