"""What a person reads while machines are ended."""

from __future__ import annotations

from gateway.progress import Progress, machines, not_ended


class Watch:
    def __init__(self) -> None:
        self.now = 100.0
        self.said: list[str] = []
        self.progress = Progress(self.said.append, lambda: self.now)

    def shows(self, seconds: float, **machines: str) -> list[str]:
        self.now += seconds
        self.said.clear()
        self.progress.show(machines)
        return list(self.said)


def test_each_machine_is_told_when_it_changes_and_at_times_while_it_does_not() -> None:
    watch = Watch()
    assert watch.shows(0, a="draining", b="starting") == ["ending a: draining", "ending b: starting"]
    assert watch.shows(5, a="draining", b="terminating") == ["ending b: terminating, after 5 s"]
    assert watch.shows(9.9, a="draining", b="terminating") == []
    assert watch.shows(0.2, a="draining", b="terminating") == ["ending a: draining, after 15 s"]
    later = watch.shows(120, a="terminating")
    assert later == ["ending a: terminating, after 2 min", "b is gone, after 2 min"]
    assert watch.shows(1) == ["a is gone, after 2 min"]
    assert watch.shows(1) == []


def test_replicas_and_strays_of_the_status_are_told_and_why_an_end_has_failed() -> None:
    replicas = [
        {"id": "a", "state": "draining", "reason": "idle", "end_failures": 0},
        {"id": "b", "state": "terminating", "reason": "not verified gone: no answer", "end_failures": 2},
    ]
    status = {"services": [{"replicas": replicas}], "strays": [{"id": "c", "reason": "no row knows it"}]}
    assert machines(status) == {
        "a": "draining",
        "b": "terminating (not verified gone: no answer)",
        "c": "no row knows it",
    }


def test_what_is_left_is_named_with_its_words() -> None:
    error = not_ended({"b": "", "a": "terminating"}, 1800.0)
    assert str(error) == "not verified gone after 30 min, and billing on: a: terminating, b"
