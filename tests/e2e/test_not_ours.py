"""Replicas of a gateway whose state.db is lost: shown as not ours, left alone, ended when a person asks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

Gateways = Callable[..., Any]
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}


def ask(gateway: Any) -> None:
    assert httpx.post(gateway.url + "/v1/chat/completions", json=BODY, timeout=60).status_code == 200


def test_a_dead_gateways_replicas_are_shown_left_alone_and_ended_on_request(
    gateways: Gateways, eventually: Any
) -> None:
    gateway = gateways("--price", "2.5", startup="load=0")
    ask(gateway)
    (lost,) = gateway.replicas()
    dead = gateway.status()["owner"]
    gateway.kill()
    for file in gateway.state.glob("state.db*"):
        file.unlink()

    gateway.start()
    with ThreadPoolExecutor() as meanwhile:
        answered = meanwhile.submit(ask, gateway)
        shown = [{"name": lost["id"], "status": "running", "hourly_cost": 2.5}]
        eventually(lambda: gateway.status()["others"] == shown)
        owner = gateway.status()["owner"]
        refusing = meanwhile.submit(gateway.cli, "down", "--orphans", owner, "--yes", check=False)
        text = gateway.cli("status").stdout
        answered.result()
        refused = refusing.result()
    assert "not ours" in text
    assert lost["id"] in text
    (ours,) = gateway.replicas()
    assert len(gateway.replica_processes()) == 2

    assert refused.returncode == 1
    assert "which runs here: `gateway down --state-dir" in refused.stderr
    ended = gateway.cli("down", "--orphans", dead, "--yes", "--provisioner", "local")
    assert f"{lost['id']} is gone" in ended.stdout
    assert "1 ended, verified" in ended.stdout
    eventually(lambda: gateway.status()["others"] == [])
    assert [r["id"] for r in gateway.ready()] == [ours["id"]]

    done = gateway.cli("down")
    assert f"ending {ours['id']}: " in done.stdout
    assert f"{ours['id']} is gone" in done.stdout
    assert gateway.replica_processes() == []
