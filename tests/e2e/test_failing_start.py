"""A replica that never gets ready: every client learns the cause, in the way its protocol still allows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Gateways = Callable[..., Any]
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def held_and_failed(url: str) -> tuple[str, BaseException]:
    """A stream's bytes and a JSON request's error, both held from before the failure."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        stream = client.post("/v1/chat/completions", json={**BODY, "stream": True})
        plain = client.post("/v1/chat/completions", json=BODY)
        streamed, failed = await asyncio.gather(stream, plain, return_exceptions=True)
    assert isinstance(streamed, httpx.Response), streamed
    assert isinstance(failed, BaseException), failed
    return streamed.text, failed


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"before": "sleep 2; echo out of memory; exit 1"}, "out of memory"),
        ({"startup": "load=600", "initial_delay": 3}, "initial delay"),
    ],
    ids=["its run exits", "it passes its initial delay"],
)
async def test_held_requests_end_with_the_cause_and_later_ones_are_refused(
    gateways: Gateways, eventually: Any, options: dict[str, Any], cause: str
) -> None:
    gateway = gateways("--commit-after", "0.3", **options)
    stream, failed = await held_and_failed(gateway.url)
    assert 'data: {"error":' in stream
    assert '"code": "cold_start_failed"' in stream
    assert cause in stream
    assert "[DONE]" not in stream
    assert isinstance(failed, httpx.RemoteProtocolError)  # broken off: no error body under a 200

    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
        later = await client.post("/v1/chat/completions", json=BODY)
    assert later.status_code == 503
    assert later.json()["error"]["code"] == "launch_blocked"
    assert cause in later.json()["error"]["message"]
    assert 1 <= int(later.headers["retry-after"]) <= 60
    eventually(lambda: not gateway.replica_processes())
    assert 'gateway_launches_total{outcome="failed",service="e2e"} 1.0' in gateway.metrics()
