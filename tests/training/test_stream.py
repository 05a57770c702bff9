"""The ranks of a run read the same samples in the same order, however many they are."""

from __future__ import annotations

STEPS = 12


def test_ledger_of_samples(train, tiny, tmp_path):
    ledgers = []
    uneven = "replicas=2,fsdp=2,replica_share=1+2"
    for layout in ("replicas=1,micro_batch=4", "replicas=2", "replicas=3", "replicas=2,fsdp=2", uneven):
        job = tiny(tmp_path / layout, layout, train={"steps": STEPS}, data={"validation": 0.0})
        seen = train(job, entry="tests.training.cases:ledger")
        # A rank's part is a consecutive part of the global batch.
        ledgers.append([[sample for rank in seen for sample in rank[step]] for step in range(STEPS)])
    assert all(len(step) == 12 for step in ledgers[0])
    assert ledgers[1:] == ledgers[:1] * 4
