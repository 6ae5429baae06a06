"""From zero on a real SkyPilot, to an answer, to two replicas, and back to zero."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.sky

STREAMS = 4  # at two each: two replicas


def test_the_first_request_launches_load_launches_another_scale_drains_one_and_idleness_ends_all(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any
) -> None:
    options = ("--idle-timeout", "40", "--target-in-flight", "2", "--upscale-delay", "2", "--downscale-delay")
    gateway = gateways("scale", *options, "900")
    lap("gateway up")
    assert site.clusters("scale") == []
    text, phases = ask(gateway)
    lap(f"the first request: sky launch, held, streamed {text!r}")
    assert text.startswith("There are")
    assert {"provision", "setup"} <= set(phases)
    (first,) = gateway.ready()
    (node,) = site.jobs("scale").values()
    # The node's own address, not the login host's; with the certificate that the gateway made for it.
    assert first["url"] == f"https://10.77.0.1{node.removeprefix('n')}:30000"
    assert site.clusters("scale") == [first["id"]]

    ended = threading.Event()

    def streams() -> int:
        """One after the other, ten seconds or more each; how many. `ask` fails if one is cut."""
        asked = 0
        while not ended.is_set():
            ask(gateway, tokens=1500)
            asked += 1
        return asked

    with ThreadPoolExecutor(STREAMS) as pool:
        try:
            asking = [pool.submit(streams) for _ in range(STREAMS)]
            eventually(lambda: len(gateway.ready()) == 2, 300)
            lap(f"{STREAMS} streams at a time: a second replica is ready")
            assert sorted(site.clusters("scale")) == sorted(r["id"] for r in gateway.ready())
            assert len(site.jobs("scale")) == 2
            eventually(lambda: all(r["in_flight"] for r in gateway.ready()))
            assert gateway.cli("scale", "--max", "1").returncode == 0
            (drained,) = eventually(lambda: [r for r in gateway.replicas() if r["state"] == "draining"])
            lap(f"scale --max 1: {drained['id']} drains {drained['in_flight']} streams")
            assert drained["in_flight"] > 0
            assert drained["id"] in site.clusters("scale")
            eventually(lambda: len(gateway.replicas()) == 1, 180)
            lap("... and is gone")
        finally:
            ended.set()
        answered = sum(one.result() for one in asking)   # none was cut
    lap(f"{answered} streams, each with its end")
    (left,) = gateway.ready()
    assert left["id"] != drained["id"]
    assert site.clusters("scale") == [left["id"]]
    eventually(lambda: not gateway.replicas(), 180)
    lap("idle, then terminated and verified")
    assert site.clusters("scale") == []
    assert site.jobs("scale") == {}
    for replica in (first["id"], left["id"], drained["id"]):
        assert "POST /v1/chat/completions" in gateway.logs(replica)


def test_a_replica_of_two_nodes_serves_at_its_first_and_is_replaced_when_that_one_loses_its_power(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any
) -> None:
    gateway = gateways("two", nodes=2)
    text, _ = ask(gateway)
    lap("the first request, on two nodes")
    assert text.startswith("There are")
    (first,) = gateway.ready()
    assert list(site.jobs("two")) == [first["id"]]
    head = "n" + first["url"].removeprefix("https://10.77.0.1").removesuffix(":30000")
    assert site.nodes("two")[0] == head
    assert len(site.nodes("two")) == 2
    try:
        site.do("kill", head)
        eventually(lambda: first["id"] not in [r["id"] for r in gateway.ready()], 90)
        lap(f"{head} has no power: out of rotation")
        text, _ = ask(gateway, seconds=500)
        lap("a request after that, on a replacement")
    finally:
        site.do("up", head)
    assert text.startswith("There are")
    (second,) = gateway.ready()
    assert second["id"] != first["id"]
    eventually(lambda: site.clusters("two") == [second["id"]], 180)
    eventually(lambda: list(site.jobs("two")) == [second["id"]])
    lap("the remains are gone")
    output = gateway.logs(first["id"])
    for words in ("rank 0 of 2", "rank 1 of 2", "rank 1 joined from 10.77.0.1", "joined rank 0 at 10.77.0.1"):
        assert words in output
    down = gateway.cli("down")
    lap("gateway down")
    assert down.returncode == 0, down.stderr
    assert gateway.process.wait(30) == 0
    assert site.clusters("two") == []


def test_a_run_that_fails_ends_the_hold_with_its_last_words_and_its_log_has_no_secret(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any
) -> None:
    says = """\
echo "server_args=ServerArgs(api_key='$REPLICA_API_KEY', token='$HF_TOKEN')"
cat "$TLS/key.pem"
echo 'CUDA error: no kernel image is available'
exit 1"""
    gateway = gateways("fails", before=says)
    with ThreadPoolExecutor() as pool, pytest.raises(AssertionError, match="no kernel image is available"):
        pool.submit(ask, gateway).result()
    lap("the request that was held, failed with the reason")
    (id,) = (path.name for path in (gateway.state / "replicas").iterdir())
    eventually(lambda: site.clusters("fails") == [], 180)
    lap("nothing is left")
    output = gateway.logs(id)
    assert "CUDA error: no kernel image is available" in output
    assert "server_args=ServerArgs(api_key=" in output
