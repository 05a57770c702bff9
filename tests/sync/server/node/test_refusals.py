"""What is said of those who are not let in."""

from __future__ import annotations

from shoal.sync.server.node.refusals import Refusals

HERE, TOKEN = "192.0.2.1", "wrong token"
TLS = "give both sides TLS files, or none"


def test_the_same_of_the_same_machine_is_said_once_a_minute():
    news = Refusals(print).news
    first = news(HERE, TOKEN, "192.0.2.1:5 does not know the job token", "take it", 0.0)
    assert first == "refused: 192.0.2.1:5 does not know the job token; take it"
    assert news(HERE, TOKEN, "192.0.2.1:6 does not know the job token", "take it", 59.9) == ""
    assert news("192.0.2.2", TOKEN, "...", "take it", 59.9) != "", "another machine"
    assert news(HERE, "TLS", "TLS failed", "take it", 59.9) != "", "another reason"
    assert news(HERE, TOKEN, "192.0.2.1:7 does not know the job token", "take it", 60.0) != ""


def test_what_to_do_follows_from_why_a_listener_refuses():
    said: list[str] = []
    refusals = Refusals(said.append)
    for reason in (TOKEN, "TLS", TOKEN):
        refusals(HERE, reason, "192.0.2.1:5 …")
    assert [text.rpartition("; ")[0] for text in said] == ["refused: 192.0.2.1:5 …", f"refused: 192.0.2.1:5 …; {TLS}"]
    assert said[0].endswith("; give both sides the same token")


def test_many_strangers_do_not_fill_the_log_nor_the_memory():
    refusals = Refusals(print)
    said = [refusals.news(f"192.0.2.{i}", TOKEN, "...", "", 1.0) for i in range(100)]
    assert len([text for text in said if text]) == 16
    assert len(refusals._said) == 16
    assert refusals.news("192.0.2.99", TOKEN, "...", "", 62.0) != ""
