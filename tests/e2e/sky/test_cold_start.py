"""From zero on a real SkyPilot, to an answer, and back to zero."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.sky


def test_the_first_request_launches_a_cluster_and_is_answered_then_nothing_is_left(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any
) -> None:
    gateway = gateways("--idle-timeout", "15")
    lap("gateway up")
    assert site.clusters() == []
    text, phases = ask(gateway)
    lap(f"the first request: launched, held, streamed {text!r}")
    assert text.startswith("There are")
    assert {"provision", "setup"} <= set(phases)
    (replica,) = gateway.ready()
    assert site.clusters() == [replica["id"]]
    (node,) = site.jobs().values()
    assert replica["url"] == f"http://10.77.0.1{node.removeprefix('n')}:30000"   # the node's, not the login's
    eventually(lambda: "POST /v1/chat/completions" in gateway.output(replica["id"]))
    eventually(lambda: not gateway.replicas(), 120)
    lap("idle, then terminated and verified")
    assert site.clusters() == []
    assert site.jobs() == {}
    assert "POST /v1/chat/completions" in gateway.output(replica["id"])   # kept


def test_a_replica_of_two_nodes_is_dialled_at_its_first(
    gateways: Callable[..., Any], site: Any, ask: Any, lap: Any
) -> None:
    gateway = gateways(nodes=2, before='[ "$SKYPILOT_NODE_RANK" = 0 ] || exec sleep 100000')
    text, _ = ask(gateway)
    lap("the first request, on two nodes")
    assert text.startswith("There are")
    (replica,) = gateway.ready()
    assert site.jobs() == {replica["id"]: "n[1-2]"}
    output = gateway.output(replica["id"])
    assert "rank 0 of 2" in output
    assert "rank 1 of 2" in output
    down = gateway.cli("down")
    lap("gateway down")
    assert down.returncode == 0, down.stderr
    assert gateway.process.wait(30) == 0
    assert site.clusters() == []


def test_a_run_that_fails_ends_the_hold_with_its_last_words(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any
) -> None:
    gateway = gateways(before="echo 'CUDA error: no kernel image is available'; exit 1")
    with ThreadPoolExecutor() as pool, pytest.raises(AssertionError, match="no kernel image is available"):
        pool.submit(ask, gateway).result()
    lap("the request that was held, failed")
    eventually(lambda: site.clusters() == [], 120)
    lap("nothing is left")
