"""Changed clusters: what changes, what stays, what is refused."""

from __future__ import annotations

import pytest

from shoal.errors import JobError
from shoal.planning import cluster, cluster_file, devices
from shoal.planning.whatif import changed


def test_each_change_alone():
    asked = cluster.named("h100x64")
    (pool,) = asked.pools
    assert changed(asked, "devices=2x").count == 128
    assert changed(asked, "devices=512").count == 512
    (half,) = changed(asked, "network=0.5x").pools
    assert (half.between.bandwidth, half.inside) == (pool.between.bandwidth / 2, pool.inside)
    (fast,) = changed(asked, "link=3x").pools
    assert (fast.inside.bandwidth, fast.between) == (3 * pool.inside.bandwidth, pool.between)
    (full,) = changed(asked, "memory=2×").pools
    assert full.device.memory == 2 * pool.device.memory
    assert changed(asked, "price=2.5").price == 160
    assert changed(changed(asked, "price=2.5"), "price=2x").price == 320
    assert asked == cluster.named("h100x64")


def test_another_device_brings_its_own_links_and_no_price():
    asked = changed(cluster.named("a100-80x64"), "price=2")
    (pool,) = changed(asked, "device=h200").pools
    assert pool.device == devices.device("h200")
    assert pool.inside.bandwidth == devices.device("h200").link
    assert (pool.count, pool.price) == (64, None)


def test_the_order_of_changes_does_not_matter():
    asked = cluster.named("a100-80x64")
    one, other = (
        changed(asked, text) for text in ("network=0.5x,device=h100,price=3", "price=3,device=h100,network=0.5x")
    )
    assert one.pools == other.pools
    (pool,) = one.pools
    assert (pool.price, pool.between.bandwidth) == (3, devices.device("h100").nic / 2)


def test_part_of_a_node_grows_to_nodes():
    (pool,) = changed(cluster.named("h100x4"), "devices=4x").pools
    assert (pool.count, pool.per_node) == (16, 8)


def test_a_part_of_a_rack_grows_to_racks_of_which_trays_are_left():
    (pool,) = changed(cluster.named("gb200x64"), "devices=4x").pools
    assert (pool.count, pool.per_node) == (256, 64)


def test_nodes_of_a_file_stay_as_large():
    asked = cluster_file.parse('[pool.a]\ndevice = "h100"\ncount = 16\nper_node = 4\n')
    (pool,) = changed(asked, "devices=2x").pools
    assert (pool.count, pool.per_node) == (32, 4)


def test_lines_between_sites_are_network():
    text = '[pool.a]\ndevice="h100"\ncount=8\nsite="n"\n[pool.b]\ndevice="h100"\ncount=8\nsite="s"\n'
    asked = cluster_file.parse(text + '[across.n.s]\nbandwidth="8 Gbit/s"\n')
    (link,) = changed(asked, "network=2x").across.values()
    assert link.bandwidth == 2e9


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("device=h20x", "no device is called 'h20x'"),
        ("devises=2x", "what-if 'devises' is unknown"),
        ("devices", "what-if devices has no value"),
        ("devices=many", "what-if devices=many is no number"),
        ("devices=0x", "what-if devices=0.0 is not positive"),
        ("devices=-8", "what-if devices=-8.0 is not positive"),
        ("devices=0.3x", "what-if devices=0.3x of 64 is 19.2"),
        ("devices=65", "does not fill nodes of 8"),
        ("network=100", "what-if network=100 is no factor"),
        ("price=2x", "the cluster has no price"),
        ("price=1,price=2", "what-if price is given twice"),
        (" , ", "what-if says nothing"),
    ],
)
def test_refused(text: str, what: str):
    with pytest.raises(JobError) as refused:
        changed(cluster.named("h100x64"), text)
    assert what in refused.value.what
    assert refused.value.fix
