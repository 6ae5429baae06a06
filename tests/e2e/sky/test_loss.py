"""What happens to replicas when a gateway dies, and to a gateway when its replicas do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.sky


def test_a_killed_gateway_adopts_its_replica_and_a_preempted_replica_is_replaced(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any
) -> None:
    gateway = gateways()
    ask(gateway)
    lap("the first request")
    (first,) = gateway.ready()
    gateway.kill()
    gateway.start()
    lap("killed and started again")
    eventually(gateway.ready)
    lap("adopted")
    assert [r["id"] for r in gateway.ready()] == [first["id"]]
    assert ask(gateway)[0].startswith("There are")
    assert site.clusters() == [first["id"]]

    lap("answered again")
    site.preempt(first["id"])
    eventually(lambda: not gateway.ready())
    lap("noticed: out of rotation")
    text, _ = ask(gateway)
    lap("a request after that, on a replacement")
    assert text.startswith("There are")
    (second,) = gateway.ready()
    assert second["id"] != first["id"]
    eventually(lambda: site.clusters() == [second["id"]], 120)
    lap("the remains are gone")
    down = gateway.cli("down")
    assert down.returncode == 0, down.stderr
    assert site.clusters() == []
    lap("gateway down")


@pytest.mark.parametrize("moment", ["pending", "allocated", "starting"])
def test_a_gateway_killed_in_the_middle_of_a_launch_ends_with_one_replica_and_one_cluster(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any, moment: str
) -> None:
    gateway = gateways()
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(ask, gateway)
        reached = {
            "pending": lambda: gateway.replicas(),
            "allocated": lambda: site.jobs(),
            "starting": lambda: [r for r in gateway.replicas() if r["state"] == "starting"],
        }
        eventually(reached[moment], 120)
        (first,) = gateway.replicas()
        gateway.kill()
        lap(f"killed when {moment} ({first['state']})")
        assert asking.exception() is not None
    gateway.start()
    text, _ = ask(gateway)
    lap("started again, asked, answered")
    assert text.startswith("There are")
    (ready,) = gateway.ready()
    assert ready["id"] == first["id"]   # adopted, not made again
    assert site.clusters() == [ready["id"]]
    assert list(site.jobs()) == [ready["id"]]
    assert gateway.cli("down").returncode == 0
