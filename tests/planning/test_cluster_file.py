"""Cluster files: those that come along, what they say in whatever units, and the line of each mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.planning import cluster, devices
from shoal.planning.cluster import Link
from shoal.planning.cluster_file import parse, read

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "pools"),
    [
        ("h100-64", {"h100": ("h100", 64, 8, 50e9)}),
        ("a100-80-256", {"a100": ("a100-80", 256, 8, 6.25e9)}),
        ("h100-a100", {"new": ("h100", 64, 8, 50e9), "old": ("a100-80", 128, 8, 25e9)}),
        ("two-sites", {"north": ("h100", 128, 8, 50e9), "south": ("h200", 64, 8, 50e9)}),
        ("laptops", {"laptops": ("laptop", 4, 1, 1.25e8)}),
    ],
)
def test_a_file_that_comes_along(name: str, pools: dict[str, tuple[str, int, int, float]]):
    found = read(ROOT / "clusters" / f"{name}.toml")
    assert found.name == name
    assert {p.name: (p.device.name, p.count, p.per_node, p.between.bandwidth) for p in found.pools} == pools


def test_all_files_that_come_along_are_tested():
    mark = next(mark for mark in test_a_file_that_comes_along.pytestmark if mark.name == "parametrize")
    assert {path.stem for path in (ROOT / "clusters").iterdir()} == {name for name, _ in mark.args[1]}


def test_laptops_have_the_figures_of_the_file_alone():
    device = read(ROOT / "clusters" / "laptops.toml").pools[0].device
    assert (device.peak_16, device.measured["bf16"], device.is_measured) == (0.4e12, 1.0, True)
    assert (device.memory, device.bandwidth, device.units) == (16 * 2**30, 40e9, 8)


def test_two_sites():
    line = read(ROOT / "clusters" / "two-sites.toml").across
    assert line == {("north", "south"): Link("internet", 5e9 / 8, pytest.approx(0.015))}


def test_the_page_s_example():
    example = re.findall(r"```toml\n(.*?)```", PAGE, re.S)[0]
    found = parse(example)
    assert (found.name, [pool.name for pool in found.pools]) == ("two halls and a friend", ["new", "old", "friend"])
    shed, usual = found.pools[2].device, devices.device("rtx4090")
    assert (shed.memory, shed.link, shed.nic) == (48 * 2**30, 25e9, 2.5e9 / 8)
    assert (shed.peak, shed.units, shed.bandwidth) == (usual.peak, usual.units, usual.bandwidth)
    old = found.pools[1]
    assert (old.per_node, old.price, old.mtbf) == (4, 1.8, 1500 * 86400)
    assert old.between == Link("roce", 12.5e9, pytest.approx(8e-6))


def test_a_rack_without_all_its_trays_or_as_the_file_says():
    racks = "[pool.a]\ndevice = 'gb200'\ncount = 128\n"
    assert [parse(racks + more).pools[0].per_node for more in ("", "per_node = 32\n")] == [64, 32]


def test_the_page_s_latencies():
    told = {kind: float(us) for kind, us in re.findall(r"^\| `(\w+)` \| ([\d.]+) µs \|", PAGE, re.M)}
    assert {kind: us * 1e-6 for kind, us in told.items()} == pytest.approx(dict(cluster.latencies()))


ASKED_FOR = [
    "v100-16", "v100-32", "a100-40", "a100-80", "h100", "h100-pcie", "h200", "h800", "b200", "gb200", "l4", "l40s",
    "a10g", "rtx4090", "mi250x", "mi300x", "tpu-v4", "tpu-v5e", "tpu-v5p", "ascend-910b", "gaudi2", "gaudi3",
]  # fmt: skip


@pytest.mark.parametrize("name", ASKED_FOR)
def test_the_catalogue_has_what_people_have(name: str):
    pool = cluster.named(f"{name}x8").pools[0]
    assert pool.inside.latency < pool.between.latency
    assert pool.inside.bandwidth > pool.between.bandwidth


GOOD = """
[pool.new]
device = "h100"
count = 64
"""


# Each mistake stands on the line that ends in `# !`; what is said of it; what its fix names.
@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("[pool.a]\ndevice = h100  # !", "not valid TOML", "key = value"),
        ("pool = 8  # !", "'pool' is a table, not 8", "[pool.NAME]"),
        ("[[pool]]  # !\ndevice = 'h100'", "'pool' is a table", "[pool.NAME]"),
        ("[pool]\ndevice = 'h100'  # !", "'pool.device' is a table", "[pool.NAME]"),
        ("name = 'x'  # !", "the cluster has no pool", "[pool.NAME]"),
        (f"{GOOD}\nname = 8  # !", "unknown key 'pool.new.name'", ""),
        ("nam = 'x'  # !\n" + GOOD, "unknown key 'nam'", "'name'"),
        (f"{GOOD}per_nod = 8  # !", "unknown key 'pool.new.per_nod'", "'pool.new.per_node'"),
        ("[pool.a]  # !\ncount = 8", "pool.a has no device", "h100"),
        ("[pool.a]  # !\ndevice = 'h100'", "pool.a has no count", "64"),
        ("[pool.a]\ndevice = 'h10'  # !\ncount = 8", "no device is called 'h10'", "h100"),
        ("[pool.a]\ndevice = 'cpu'  # !\ncount = 8", "of a cpu", 'like = "cpu"'),
        ("[pool.a]\ndevice = 8  # !\ncount = 8", "pool.a.device=8 is not text", ""),
        ("[pool.a]\ndevice = 'h100'\ncount = 0  # !", "pool.a.count=0 is less than 1", "1 or more"),
        ("[pool.a]\ndevice = 'h100'\ncount = -8  # !", "pool.a.count=-8 is less than 1", "1 or more"),
        ("[pool.a]\ndevice = 'h100'\ncount = 8.5  # !", "pool.a.count=8.5 is not a whole number", ""),
        ("[pool.a]\ndevice = 'h100'\ncount = true  # !", "pool.a.count=True is not a whole number", ""),
        (f"[pool.a]\ndevice = 'h100'\ncount = 1{'0' * 400}  # !", "pool.a.count is more than 10000000", "smaller"),
        ("[pool.a]\ndevice = 'h100'\ncount = 12  # !", "does not fill nodes of 8", "8 or 16"),
        (f"{GOOD}per_node = 128  # !", "pool.new.per_node=128 is more than its 64", "per_node = 64"),
        (f"{GOOD}per_node = 0  # !", "pool.new.per_node=0 is less than 1", "1 or more"),
        (f"{GOOD}price = -1  # !", "pool.new.price=-1.0 is less than 0", "0 or more"),
        (f"{GOOD}price = nan  # !", "pool.new.price=nan is not a finite number", ""),
        (f"{GOOD}price = '2 dollars'  # !", "pool.new.price='2 dollars' is not a number", ""),
        (f"{GOOD}mtbf = 500  # !", "pool.new.mtbf=500 is no number with a unit", "100 h"),
        (f"{GOOD}mtbf = '0 h'  # !", "pool.new.mtbf=0.0 is not positive", ""),
        (f"{GOOD}inside = 'nvlnk'  # !", "pool.new.inside='nvlnk' is no kind of link", "'nvlink'"),
        (f"{GOOD}inside = 'pcie'  # !", "pool.new.inside has no bandwidth, and none of pcie", "100 Gbit/s"),
        (f"{GOOD}inside = 8  # !", "'pool.new.inside' is a table, not 8", "[pool.new.inside]"),
        (f"{GOOD}between = {{ bandwidth = '-5 GB/s' }}  # !", "between.bandwidth=-5000000000.0 is not positive", ""),
        (f"{GOOD}between = {{ bandwidth = 'nan GB/s' }}  # !", "'nan GB/s' is no number with a unit", "Gbit/s"),
        (f"{GOOD}between = {{ bandwidth = nan }}  # !", "=nan is no number with a unit", "Gbit/s"),
        (f"{GOOD}between = {{ bandwidth = '1e999 GB/s' }}  # !", "=inf is not a finite number", ""),
        (f"{GOOD}between = {{ bandwidth = '5 GiB/s' }}  # !", "'5 GiB/s' is no number with a unit", "GB/s"),
        (f"{GOOD}[pool.new.between]\nlatency = '1 us'\nkind = 'token ring'  # !", "'token ring' is no kind", ""),
        (f"{GOOD}[pool.new.between]\nlatency = '-1 us'  # !\nkind = 'roce'", "latency=-1e-06 is not positive", ""),
        (f"{GOOD}[pool.new.between]\nlatenc = '1 us'  # !", "unknown key 'pool.new.between.latenc'", "latency'"),
        (f"{GOOD}[device.h100]  # !\nlike = 'h200'", "h100 is in the catalogue", "another name"),
        (f"{GOOD}[device.mine]\nlike = 'h10'  # !", "device.mine.like='h10': no device", "'h100'"),
        (f"{GOOD}[device.mine]  # !\nmemory = 8", "device.mine has no bandwidth, peak, link, nic", "doctor"),
        (f"{GOOD}[device.mine]  # !\nlike = 'cpu'", "device.mine has no memory, bandwidth, peak", "doctor"),
        (f"{GOOD}[device.mine]\nlike = 'h100'\nmemory = -80  # !", "device.mine.memory=-80.0 is not positive", ""),
        (f"{GOOD}[device.mine]\nlike = 'h100'\nunits = 1.5  # !", "device.mine.units=1.5 is not a whole", ""),
        (f"{GOOD}[device.mine]\nlike = 'h100'\ninside = 'x'  # !", "device.mine.inside='x' is no kind", "known"),
        (f"{GOOD}[device.mine]\nlike = 'h100'\npeak = {{ fp8 = 9 }}  # !", "peak has neither bf16", "TFLOP/s"),
        (f"{GOOD}[device.mine]\nlike = 'h100'\npeak = {{ int8 = 9 }}  # !", "unknown key 'device.mine.peak.int8'", ""),
        (f"{GOOD}[device.mine]\nlike = 'h100'\npeak = {{ bf16 = nan }}  # !", "bf16=nan is not a finite number", ""),
        (f"{GOOD}[device.mine]\nlike = 'h100'\nmeasured = {{ bf16 = 80 }}  # !", "more than all of the peak", "0.8"),
        (f"{GOOD}site = 'x'\n[pool.b]  # !\ndevice = 'h100'\ncount = 8", "pool.b has no site", "NAME"),
        (f"{GOOD}site = 'x'\n[pool.b]\ndevice = 'h100'\ncount = 8\nsite='y'", "'x' and 'y' have no link", "x.y"),
        (f"{GOOD}[across.x.y]  # !\nbandwidth = '1 GB/s'", "no pool is at 'x'", "site ="),
        (f"{GOOD}site = 'x'\n[across.x]\ny = {{}}  # !", "no pool is at 'y'", "known: x"),
        ("machine = 'mine'  # !\nranks = 2", "what `shoal calibrate` wrote of one machine", "shoal plan JOB"),
        (f"{GOOD}site = 'x'\n[across.x.x]  # !\nbandwidth = '1 GB/s'", "a link of a site to itself", ""),
    ],
)  # fmt: skip
def test_mistakes(text: str, what: str, fix: str):
    with pytest.raises(JobError, match=re.escape(what)) as refused:
        parse(text, "mine.toml")
    marked = [i for i, line in enumerate(text.split("\n"), 1) if line.endswith("# !")] or [1]
    assert (refused.value.where, fix in refused.value.fix) == (f"mine.toml:{marked[0]}", True), refused.value


SITES = f"{GOOD}site = 'x'\n[pool.b]\ndevice = 'h100'\ncount = 8\nsite = 'y'\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[across.x.y]  # !\nkind = 'internet'", "across.x.y has no bandwidth"),
        ("[across.x.y]\nbandwidth = '0 GB/s'  # !", "across.x.y.bandwidth=0.0 is not positive"),
        ("[across.x.y]\nbandwidth = '1 GB/s'\n[across.y.x]  # !\nbandwidth = '1 GB/s'", "this link is there twice"),
        ("[across.x.y]\nbandwidth = '1 GB/s'\n[across.y.z]  # !\nbandwidth = '1 GB/s'", "no pool is at 'z'"),
    ],
)
def test_mistakes_of_lines_between_sites(text: str, what: str):
    with pytest.raises(JobError, match=re.escape(what)) as refused:
        parse(SITES + text, "mine.toml")
    marked = [i for i, line in enumerate((SITES + text).split("\n"), 1) if line.endswith("# !")]
    assert refused.value.where == f"mine.toml:{marked[0]}"


def test_a_file_that_is_none(tmp_path: Path):
    with pytest.raises(JobError, match="cannot read the cluster") as refused:
        read(tmp_path / "none.toml")
    assert refused.value.where.endswith("none.toml")


# Numbers with a finite decimal in each unit: what is written is what is meant.
RATES = {"GB/s": 1e9, "MB/s": 1e6, "Gbit/s": 125e6, "Mbit/s": 125e3}
TIMES = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
amounts = st.integers(1, 10**6).map(lambda n: n / 64)


@st.composite
def links(draw: st.DrawFn, name: str) -> tuple[str, Link]:
    """A table's text, and what it says."""
    kind = draw(st.sampled_from(sorted(cluster.latencies())))
    rate, unit = draw(amounts), draw(st.sampled_from(sorted(RATES)))
    lines, latency = [f'bandwidth = "{rate} {unit}"', f"kind = '{kind}'"], cluster.latencies()[kind]
    if draw(st.booleans()):
        time, of = draw(amounts), draw(st.sampled_from(sorted(TIMES)))
        lines.append(f"latency = '{time}{of}'")
        latency = time * TIMES[of]
    link = Link(kind, pytest.approx(rate * RATES[unit]), pytest.approx(latency))
    return f"{name} = {{ {', '.join(draw(st.permutations(lines)))} }}", link


@st.composite
def pools(draw: st.DrawFn, name: str) -> tuple[str, dict[str, object]]:
    device = devices.device(draw(st.sampled_from(ASKED_FOR)))
    each, nodes = draw(st.integers(1, 72)), draw(st.integers(1, 999))
    (inside, in_), (between, out) = draw(links("inside")), draw(links("between"))
    price, days = draw(st.none() | amounts), draw(st.none() | amounts)
    lines = [f'device = "{device.name}"', f"count = {each * nodes}", f"per_node = {each}", inside, between]
    lines += [f"price = {price}"] if price else []
    lines += [f'mtbf = "{days} days"'] if days else []
    text = "\n".join([f"[pool.{name}]", *draw(st.permutations(lines))])
    mtbf = days * 86400 if days else device.mtbf
    return text, {
        "device": device, "count": each * nodes, "per_node": each, "inside": in_, "between": out, "price": price,
        "mtbf": mtbf,
    }  # fmt: skip


@given(st.data())
@settings(max_examples=60)
def test_what_is_written_is_what_is_read(data: st.DataObject):
    names = [f"p{i}" for i in range(data.draw(st.integers(1, 3)))]
    drawn = {name: data.draw(pools(name)) for name in names}
    found = parse("\n".join(text for text, _ in drawn.values()))
    for pool in found.pools:
        assert {key: getattr(pool, key) for key in drawn[pool.name][1]} == drawn[pool.name][1]
    assert [pool.name for pool in found.pools] == names


WHOLE = """name = "x"
[pool.a]
device = "mine"
count = 8
per_node = 4
site = "x"
price = 2
mtbf = "9 days"
inside = "pcie"
[pool.a.between]
kind = "roce"
bandwidth = "5 GB/s"
latency = "3 us"
[pool.b]
device = "h100"
count = 8
site = "y"
[device.mine]
like = "a100-80"
peak = { bf16 = 100 }
measured = { bf16 = 0.5 }
memory = 9
units = 3
inside = "pcie"
title = "t"
[across.x.y]
bandwidth = "1 GB/s"
"""
values = st.sampled_from(
    ["nan", "-inf", "0", "-1", "1.5", "''", "'x'", "'-1 GB/s'", "'1e999 s'", "true", "[]", "[1]", "{}", "{a=1}",
     "1979-05-27", "9" * 40, "'9 h'", "'.'", "{kind=3}", "{bf16='1'}", "\"\\u0000\"", "{'x.y'={}}"]
)  # fmt: skip


@given(st.sampled_from([i for i, line in enumerate(WHOLE.split("\n")) if "=" in line]), values)
@settings(max_examples=150)
def test_whatever_one_value_is_it_is_read_or_refused_with_a_line(number: int, value: str):
    lines = WHOLE.split("\n")
    lines[number] = f"{lines[number].split('=')[0]}= {value}"
    try:
        parse("\n".join(lines), "mine.toml")
    except JobError as error:
        assert re.fullmatch(r"mine\.toml:\d+", error.where), error  # noqa: PT017
