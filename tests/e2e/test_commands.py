"""The command line against a running gateway, as an engineer uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

Gateways = Callable[..., Any]
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}


def test_status_scale_logs_retry_and_down(gateways: Gateways, eventually: Any) -> None:
    gateway = gateways(startup="load=1")
    url = gateway.url + "/v1/chat/completions"
    assert httpx.post(url, json=BODY, timeout=60).status_code == 200

    status = json.loads(gateway.cli("status", "--json").stdout)
    (replica,) = status["services"][0]["replicas"]
    assert replica["state"] == "ready"
    assert replica["id"] in gateway.cli("status").stdout

    assert "fired up and ready to roll" in gateway.cli("logs", replica["id"]).stdout

    gateway.cli("scale", "--max", "0")
    paused = httpx.post(url, json=BODY, timeout=10)
    assert (paused.status_code, paused.json()["error"]["code"]) == (503, "service_paused")
    eventually(lambda: not gateway.replica_processes())
    assert "fired up and ready to roll" in gateway.cli("logs", replica["id"]).stdout  # a dead one's, too
    gateway.cli("scale", "--reset")
    assert httpx.post(url, json=BODY, timeout=60).status_code == 200

    gateway.cli("retry")
    done = gateway.cli("down")
    assert done.returncode == 0
    assert gateway.process.wait(20) == 0
    assert gateway.replica_processes() == []


def test_sigterm_leaves_replicas_and_says_so_and_down_without_a_gateway_ends_them(
    gateways: Gateways, eventually: Any
) -> None:
    gateway = gateways("--price", "27.5", startup="load=1")
    assert httpx.post(gateway.url + "/v1/chat/completions", json=BODY, timeout=60).status_code == 200
    (replica,) = gateway.ready()
    assert gateway.stop() == 0
    assert replica["id"] in gateway.log()
    assert "27.5" in gateway.log()
    assert "gateway down" in gateway.log()
    assert gateway.replica_processes()
    done = gateway.cli("down")
    assert "1 of its replicas ended" in done.stdout
    assert gateway.replica_processes() == []
