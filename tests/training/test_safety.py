"""While it trains, saves, resumes and writes its sample, a run unpickles nothing and listens on loopback only."""

from __future__ import annotations

import ipaddress
import shutil
from dataclasses import asdict

import pytest

from shoal.errors import RankError
from shoal.serving.source import find, home_of

GUARDED = "tests.training.cases:without_pickle"


# Each axis, and for the experts' one a model that has them; a pipeline of several stages a rank.
LAYOUTS = ["replicas=2", "fsdp=2,zero=3", "tensor=2", "context=2", "pipeline=2,micro_batch=3,schedule=interleaved"]
EXPERTS = {"family": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


@pytest.mark.parametrize("layout", [*LAYOUTS, "fsdp=2,expert=2"])
def test_nothing_is_pickled(ranks, train, tiny, tmp_path, layout):
    run = tmp_path / "run"
    model = {"num_hidden_layers": 4, **(EXPERTS if "expert" in layout else {})}
    job = tiny(run, layout, train={"steps": 4, "validate_every": 2}, checkpoint={"every": 2}, model=model)
    entry = "shoal.training.worker:main"
    figures = train(job, entry=GUARDED, entry_=entry)
    shutil.rmtree(run / "checkpoints/step-00000004")
    figures = train(job, resume=True, entry=GUARDED, entry_=entry)
    assert "goes on from" in (run / "log.txt").read_text()
    where = {"folder": str(run), "prepared": str(next((tmp_path.parent / "cache").glob("*/meta.json")).parent)}
    ranks.run(GUARDED, 1, entry_="shoal.launch.finish:main", **where, figures=figures[0])
    assert (run / "model/model.safetensors").exists()
    assert "the model writes" in (run / "log.txt").read_text()
    if "pipeline" in layout or "tensor" in layout:
        source = find(run)
        generate = {
            "folder": str(source.folder), "options": asdict(source.options), "tokenizer": str(home_of(str(run))),
            "prompt": "a", "max_tokens": 4, "seed": 0, "temperature": 0.0, "top_k": 0, "top_p": 1.0,
        }  # fmt: skip
        ranks.run(GUARDED, 2, entry_="shoal.serving.staged:main", layout=layout, **generate)


def test_a_pickled_message_would_be_seen(ranks):
    with pytest.raises(RankError, match="pickled"):
        ranks.run(GUARDED, 2, entry_="tests.training.cases:gathers_objects")


@pytest.mark.parametrize("layout", ["replicas=2", "fsdp=2", "pipeline=2,tensor=2"])
def test_everything_listens_on_loopback(train, tiny, tmp_path, layout):
    found = train(tiny(tmp_path / "run", layout, train={"steps": 3}), entry="tests.training.cases:listening")[0]
    assert len(found) >= 3  # the store, and the backend of each rank
    assert all(ipaddress.ip_address(address).is_loopback for address in found)
