"""What clusters cost: looked up now and then, and nobody waits for a catalogue that does not come."""
from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from replicas.provisioners import prices
from replicas.provisioners.prices import Prices

from .sky_records import Cluster


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A cluster whose price comes when `comes` is set; `asked` counts."""
    monkeypatch.setattr(prices, "WAIT_SECONDS", 0.02)
    cluster: Any = Cluster("tiny-gw-0badcafe-1", SimpleNamespace(value="UP"))
    found = SimpleNamespace(cluster=cluster, comes=threading.Event(), asked=0)

    def get_cost(seconds: float) -> float:
        found.asked += 1
        found.comes.wait(10)
        return 30.0

    cluster.handle.launched_resources.get_cost = get_cost
    return found


def test_a_catalogue_that_cannot_be_fetched_holds_up_no_look(slow: Any, clock: Any) -> None:
    found = Prices(clock)
    assert [found.of(slow.cluster) for _ in range(5)] == [None] * 5
    clock.now += 3600.0
    assert (found.of(slow.cluster), slow.asked) == (None, 1)   # and one thread waits, not many
    slow.comes.set()
    while found.of(slow.cluster) is None:
        clock.now += 60.0
    assert found.of(slow.cluster) == 60.0   # two nodes


def test_the_last_price_holds_while_a_new_one_is_looked_up(slow: Any, clock: Any) -> None:
    found = Prices(clock)
    slow.comes.set()
    while found.of(slow.cluster) is None:
        clock.now += 60.0
    slow.comes.clear()
    clock.now += 61.0
    assert [found.of(slow.cluster) for _ in range(3)] == [60.0] * 3
    slow.comes.set()
