"""Options of the parameter server: what is refused, what it has no effect on, how much a worker pushes."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cli.train import SHORT
from shoal.errors import JobError
from shoal.job import Job, Layout, write
from shoal.job.layout import AXES
from shoal.job.server import ROUNDS, ServerOptions, check_optimizer, pushed_batch
from shoal.job.toml import blame, parse

SERVER = "[sync]\nname = 'server'\n[server]\n"
EXPERTS = (
    "[model]\nfamily = 'deepseek_v3'\nnum_experts = 4\nmoe_intermediate_size = 32\n"
    "shared_expert_intermediate_size = 32\nnum_key_value_heads = 4\nkv_lora_rank = 16\n"
    "qk_nope_head_dim = 8\nqk_rope_head_dim = 8\nv_head_dim = 8\n"
)


@pytest.mark.parametrize(
    ("server", "what", "fix"),
    [
        ("shards = 0", "server.shards=0 is less than 1", "1 or more"),
        ("copies = 0", "server.copies=0 is less than 1", "1 or more"),
        ("mode = 'spp'", "server.mode='spp' is unknown", "'ssp'"),
        ("staleness = -1", "server.staleness=-1 is less than 0", "0 or more"),
        ("max_staleness = -2", "server.max_staleness=-2 is less than -1", ""),
        ("mode = 'quorum'\nmax_staleness = 2", "server.max_staleness=2 with server.mode=quorum", "asp or ssp"),
        ("quorum = -1", "server.quorum=-1 is less than 0", ""),
        ("grace = -0.5", "server.grace=-0.5 is less than 0", ""),
        ("reconnect = -1", "server.reconnect=-1.0 is less than 0", ""),
        ("lease = 0", "server.lease=0.0 is not positive", ""),
        ("level = 'snap'", "server.level='snap' is unknown", "'snapshot'"),
        ("compensation = 'lookahead'", "server.compensation='lookahead' is unknown", "'look-ahead'"),
        ("compensation = 'rate'", "server.compensation=rate with server.mode=bsp", "asp or ssp"),
        ("mode = 'quorum'\ncompensation = 'age'", "server.compensation=age with server.mode=quorum", "asp or ssp"),
        (
            "mode = 'asp'\nlevel = 'shard'\ncompensation = 'dc'",
            "server.compensation=dc with server.level=shard",
            "server.level snapshot",
        ),
        (
            "mode = 'asp'\nlevel = 'hogwild'\ncompensation = 'look-ahead'",
            "server.compensation=look-ahead with server.level=hogwild",
            "snapshot or shard",
        ),
        (
            "mode = 'asp'\ncompensation = 'delayed-nesterov'",
            "delayed-nesterov is an optimizer of its own, optim.name=adamw",
            "optim.name=sgd",
        ),
        ("mode = 'asp'\ncompensation = 'rate'\nstrength = -0.5", "server.strength=-0.5 is less than 0", ""),
        ("mode = 'asp'\nstrength = 2", "server.strength=2.0 has no effect with server.compensation=none", "rate"),
        ("local_steps = 0", "server.local_steps=0", ""),
        ("mode = 'asp'\nlocal_steps = 2\ncompensation = 'dc'", "dc with server.local_steps=2", "delayed-nesterov"),
        ("copies = 2\nelsewhere = ['server 0']", "server.elsewhere=['server 0'] with server.copies=2", "copies=1"),
        ("host = ''", "server.host is empty", "127.0.0.1"),
        ("host = '0.0.0.0'", "server.host=0.0.0.0 without server.token", "server.token=FILE"),
        ("host = '0.0.0.0'\ntoken = 'a'", "server.host=0.0.0.0 is every interface", "ip -brief address"),
        ("host = '::'\ntoken = 'a'", "server.host=:: is every interface", "ip -brief address"),
        ("host = '::'", "server.host=:: without server.token", "server.token=FILE"),
        ("host = 'node7'", "server.host=node7 without server.token", "server.token=FILE"),
        ("key = 'a.key'", "server.certificate and server.authority are not given", "none of them"),
        ("key = 'a.key'\ncertificate = 'a.pem'", "TLS needs three files, and server.authority is not", "none of them"),
    ],
)
def test_what_makes_no_sense_is_refused(server: str, what: str, fix: str):
    with pytest.raises(JobError) as caught:
        parse(SERVER + server).validate()
    assert what in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "server",
    [
        "mode = 'ssp'\nstaleness = 0\nmax_staleness = 0\nshards = 2\ncopies = 3",
        "mode = 'asp'\ncompensation = 'rate'\nstrength = 0\nlevel = 'hogwild'",
        "mode = 'asp'\ncompensation = 'look-ahead'\nlevel = 'shard'",
        "mode = 'asp'\nlocal_steps = 2\ncompensation = 'delayed-nesterov'",
        "copies = 2\nelsewhere = ['worker 0']",
        "host = 'localhost'",
        "host = '127.0.0.2'",
        "host = '::1'",
        "host = '10.0.0.1'\ntoken = 'job.token'",
        "key = 'a.key'\ncertificate = 'a.pem'\nauthority = 'all.pem'",
    ],
)
def test_what_makes_sense_is_not(server: str):
    job = parse(SERVER + server).validate()
    assert parse(write(job)).validate() == job


def test_looking_ahead_needs_an_optimizer_that_goes_on_by_itself():
    for known in ("sgd", "adamw"):
        check_optimizer("look-ahead", known)
    with pytest.raises(JobError, match=r"does not know where optim.name=another goes") as caught:
        check_optimizer("look-ahead", "another")
    assert caught.value.fix.startswith("optim.name=sgd or adamw")
    check_optimizer("rate", "another")


@pytest.mark.parametrize(
    "option",
    ["every = 5", "pull = 0.1", "fragments = 2", "delay = 1", "mix = 0.5", "together = 5"],
)
def test_local_steps_are_not_for_a_server(option: str):
    name = option.split()[0]
    with pytest.raises(JobError, match=f"sync.name=server excludes sync.{name}"):
        parse(f"[sync]\nname = 'server'\n{option}").validate()


@pytest.mark.parametrize("option", ["outer_lr = 1", "outer_momentum = 0.5"])
def test_an_outer_optimizer_is_for_workers_that_take_steps_of_their_own(option: str):
    text = f"[sync]\nname = 'server'\n{option}\n[server]\nmode = 'asp'\nlocal_steps = "
    with pytest.raises(JobError, match=f"sync.{option.split()[0]} has no effect with server.local_steps=1"):
        parse(text + "1").validate()
    parse(text + "2").validate()


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        ("[server]\nelsewhere = ['worker 2']", "the job has no 'worker 2'", "'worker 1'"),
        ("[server]\nelsewhere = ['server 1']", "the job has no 'server 1'", "server 0"),
        ("[server]\nelsewhere = ['worker 1', 'worker 1']", "server.elsewhere names 'worker 1' twice", "once"),
    ],
)
def test_what_other_machines_start_is_a_part(options: str, what: str, fix: str):
    with pytest.raises(JobError) as caught:
        parse(f"layout = 'replicas=2'\n[sync]\nname = 'server'\n{options}").validate()
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_shares_of_workers_elsewhere_are_given():
    shares = (
        "layout = 'replicas=2,replica_share={}'\n[train]\nglobal_batch = 12\n"
        + SERVER
        + "elsewhere = ['worker 1', 'server 0']"
    )
    with pytest.raises(JobError, match=r"replica_share=auto with server.elsewhere=\['worker 1', 'server 0'\]"):
        parse(shares.format("auto")).validate()
    parse(shares.format("2+1")).validate()


@pytest.mark.parametrize("codec", ["none", "auto", "int8", "topk:0.05+int2"])
def test_a_server_takes_codecs(codec: str):
    """Also where some parts are on other machines."""
    for elsewhere in ("", "[server]\nelsewhere = ['server 0']"):
        parse(f"[sync]\nname = 'server'\ncodec = '{codec}'\nfeedback = false\n{elsewhere}").validate()


@pytest.mark.parametrize("codec", ["auto", "int8"])
def test_torn_reads_have_no_changes_to_encode(codec: str):
    with pytest.raises(JobError, match=f"sync.codec={codec} with server.level=hogwild"):
        parse(f"[sync]\nname = 'server'\ncodec = '{codec}'\n[server]\nmode = 'asp'\nlevel = 'hogwild'").validate()


def test_each_copy_of_a_shard_has_sent_other_weights():
    with pytest.raises(JobError, match=r"sync.codec=int8 with server.compensation=dc: each copy of a shard"):
        parse("[sync]\nname = 'server'\ncodec = 'int8'\n[server]\nmode = 'asp'\ncompensation = 'dc'").validate()


def test_what_a_pull_loses_must_not_grow():
    text = "[sync]\nname = 'server'\nfeedback = false\ncodec = 'randomk:0.1"
    with pytest.raises(JobError, match=r"sync.codec=randomk:0.1:unbiased with a server: what a pull loses") as caught:
        parse(f"{text}:unbiased'").validate()
    assert caught.value.fix == "randomk:0.1"
    parse(f"{text}'").validate()


def test_balancing_biases_move_by_use_and_not_on_servers():
    job = parse(EXPERTS + "bias_update_rate = 0.001").validate()
    with pytest.raises(JobError, match=r"model.bias_update_rate=0.001 with sync.name=server"):
        replace(job, sync=replace(job.sync, name="server")).validate()
    job = parse(EXPERTS).validate()
    replace(job, sync=replace(job.sync, name="server")).validate()


@pytest.mark.parametrize("name", ["allreduce", "local", "gossip"])
@pytest.mark.parametrize("option", ["mode = 'ssp'", "shards = 2", "staleness = 3", "lease = 6.0", "token = 'a'"])
def test_options_of_a_server_without_one_are_refused(name: str, option: str):
    with pytest.raises(JobError) as caught:
        parse(f"[sync]\nname = '{name}'\n[server]\n{option}").validate()
    said = option.replace("'", "").replace(" = ", "=")
    assert caught.value.what == f"server.{said} has no effect with sync.name={name}"
    assert "--sync server" in caught.value.fix


def test_an_idle_option_of_a_recipe_is_shown_with_its_line(tmp_path: Path):
    file = tmp_path / "recipe.toml"
    file.write_text("[server]\nshards = 1\nmode = 'ssp'\n")
    base = parse(file.read_text(), str(file))
    with pytest.raises(JobError) as caught:
        base.validate()
    assert blame(caught.value, file, base).where == f"{file}:3"


@pytest.mark.parametrize(("workers", "quorum", "closing"), [(1, 0, 1), (2, 0, 1), (4, 0, 3), (4, 4, 4), (1, 1, 1)])
def test_a_quorum_is_of_all_but_one_unless_said(workers: int, quorum: int, closing: int):
    assert ServerOptions(mode="quorum", quorum=quorum).closing(workers) == closing


def test_a_quorum_of_more_than_there_are_is_refused_as_soon_as_their_number_is_known():
    job = parse(SERVER + "mode = 'quorum'\nquorum = 5").validate()
    with pytest.raises(JobError, match=r"server.quorum=5 of 4 workers"):
        replace(job, layout=Layout(replicas=4)).validate()
    replace(job, layout=Layout(replicas=5), train=replace(job.train, global_batch=10)).validate()


def test_rounds_share_the_batch_evenly_and_others_as_much_as_they_can():
    job = parse("layout = 'replicas=3'\n" + SERVER)
    for mode in ROUNDS:
        with pytest.raises(JobError, match=r"train.global_batch=32 is not divisible by the 3 workers"):
            replace(job, server=ServerOptions(mode=mode)).validate()
    for mode in ("asp", "ssp"):
        valid = replace(job, server=ServerOptions(mode=mode)).validate()
        assert pushed_batch(valid) == 30
        with pytest.raises(JobError, match=r"train.global_batch=2 is not divisible by the 3 workers"):
            replace(valid, train=replace(valid.train, global_batch=2)).validate()
    pipeline = replace(job, layout=Layout.parse("replicas=3,pipeline=2"), server=ServerOptions(mode="asp")).validate()
    assert pipeline.layout is not None
    assert pipeline.layout.micro_batch == 2, "of the 10 sequences of a worker"
    fives = replace(pipeline, layout=Layout.parse("replicas=3,pipeline=2,micro_batch=5"))
    replace(fives, train=replace(job.train, global_batch=37)).validate()


@given(st.builds(Layout, **dict.fromkeys(AXES, st.integers(1, 4)), micro_batch=st.integers(0, 4)), st.integers(1, 100))
def test_what_is_pushed_is_as_much_as_can_be_shared(layout: Layout, batch: int):
    job = Job(layout=layout)
    job = replace(job, train=replace(job.train, global_batch=batch), sync=replace(job.sync, name="server"))
    assert pushed_batch(job) == batch, "bsp: all of it"
    found = pushed_batch(replace(job, server=ServerOptions(mode="asp")))
    unit = layout.readers * max(1, layout.micro_batch)
    assert batch - unit < found <= batch
    assert found % unit == 0 or found == batch < unit


def test_the_documentation_lists_every_option_its_default_and_its_short_name():
    text = Path("docs/parameter-server.md").read_text().partition("## Options")[2]
    rows = re.findall(r"^\| (\S+) \| (\S*) ?\| (\S*) ?\| .+ \|$", text.replace("`", ""), re.M)[1:]
    short = {long.replace("-", "_"): name for name, long in SHORT.items()}
    expected = [(f.name, f.default, short.get(f"__server.{f.name}", "")) for f in fields(ServerOptions)]
    assert [(key, value.replace("−", "-"), name) for key, value, name in rows] == [
        (key, f"{value:g}" if isinstance(value, (int, float)) else value or "", name) for key, value, name in expected
    ]
