"""What is said of those who are not let in."""

from __future__ import annotations

from shoal.sync.server.node.refusals import Refusals

HERE, TOKEN = "192.0.2.1", "wrong token"


def test_the_same_of_the_same_machine_is_said_once_a_minute():
    news = Refusals(print).news
    first = news(HERE, TOKEN, "192.0.2.1:5 does not know the job token", 0.0)
    assert first == "refused: 192.0.2.1:5 does not know the job token; give both sides the same token"
    assert news(HERE, TOKEN, "192.0.2.1:6 does not know the job token", 59.9) == ""
    assert news("192.0.2.2", TOKEN, "...", 59.9) != "", "another machine"
    assert "TLS files, or none" in news(HERE, "TLS", "TLS failed", 59.9), "another reason"
    assert news(HERE, TOKEN, "192.0.2.1:7 does not know the job token", 60.0) != ""


def test_many_strangers_do_not_fill_the_log_nor_the_memory():
    refusals = Refusals(print)
    said = [refusals.news(f"192.0.2.{i}", TOKEN, "...", 1.0) for i in range(100)]
    assert len([text for text in said if text]) == 16
    assert len(refusals._said) == 16
    assert refusals.news("192.0.2.99", TOKEN, "...", 62.0) != ""
