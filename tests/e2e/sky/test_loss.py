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
    gateway = gateways("loss")
    ask(gateway)
    lap("the first request")
    (first,) = gateway.ready()
    gateway.kill()
    gateway.start()
    lap("gateway: kill -9, started again")
    eventually(gateway.ready)
    lap("adopted")
    assert [r["id"] for r in gateway.ready()] == [first["id"]]
    assert ask(gateway)[0].startswith("There are")
    assert site.clusters("loss") == [first["id"]]

    # The gateway follows the log anew; what it had not read is lost with the machine.
    eventually(lambda: "POST /v1/chat/completions" in gateway.output(first["id"]), 90)
    lap("answered again, its log followed")
    site.preempt(first["id"])
    eventually(lambda: not gateway.ready())
    lap("scancel: out of rotation")
    text, _ = ask(gateway)
    lap("a request after that, on a replacement")
    assert text.startswith("There are")
    (second,) = gateway.ready()
    assert second["id"] != first["id"]
    eventually(lambda: site.clusters("loss") == [second["id"]], 180)
    lap("the remains are gone")
    assert "POST /v1/chat/completions" in gateway.logs(first["id"])
    down = gateway.cli("down")
    assert down.returncode == 0, down.stderr
    assert site.clusters("loss") == []
    lap("gateway down")


@pytest.mark.parametrize("moment", ["pending", "allocated", "starting"])
def test_a_gateway_killed_in_the_middle_of_a_launch_ends_with_one_replica_and_one_cluster(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any, moment: str
) -> None:
    gateway = gateways(moment)
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(ask, gateway)
        reached = {
            "pending": lambda: gateway.replicas(),
            "allocated": lambda: site.jobs(moment),
            "starting": lambda: [r for r in gateway.replicas() if r["state"] == "starting"],
        }
        eventually(reached[moment], 180)
        (first,) = gateway.replicas()
        gateway.kill()
        lap(f"gateway: kill -9 when {moment} ({first['state']})")
        assert asking.exception() is not None
    gateway.start()
    text, _ = ask(gateway)
    lap("started again, asked, answered")
    assert text.startswith("There are")
    (ready,) = gateway.ready()
    assert ready["id"] == first["id"]   # adopted, not made again
    lap(site.table(moment))
    assert site.clusters(moment) == [ready["id"]]
    assert list(site.jobs(moment)) == [ready["id"]]
    assert gateway.cli("down").returncode == 0


@pytest.mark.alone
def test_skypilots_server_killed_in_the_middle_of_a_launch_leaves_nothing_that_is_not_wanted(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any
) -> None:
    gateway = gateways("api")
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(ask, gateway)
        eventually(lambda: site.jobs("api"), 120)
        site.do("kill-api")
        lap("SkyPilot's API server and executors: kill -9 when allocated")
        try:
            text, _ = asking.result()
            lap("the request that was held, answered")
        except AssertionError as error:
            lap(f"the request that was held: {error}")
            text, _ = ask(gateway)
            lap("a later request")
    assert text.startswith("There are")
    wanted = [r["id"] for r in gateway.ready()]
    assert len(wanted) == 1
    eventually(lambda: site.clusters("api") == wanted, 180)
    eventually(lambda: list(site.jobs("api")) == wanted)
    lap(site.table("api"))
    assert gateway.cli("down").returncode == 0
