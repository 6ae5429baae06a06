"""kill -9 of anything: what was started is found again, nothing is started twice, the rest serves on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx

Gateways = Callable[..., Any]
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}


def ask(gateway: Any, **more: Any) -> httpx.Response:
    return httpx.post(gateway.url + "/v1/chat/completions", json={**BODY, **more}, timeout=90)


async def abandoned(gateway: Any) -> None:
    """A request whose gateway is killed under it."""
    async with httpx.AsyncClient(timeout=90) as client:
        try:
            await client.post(gateway.url + "/v1/chat/completions", json=BODY)
        except httpx.HTTPError:
            return
    raise AssertionError("the gateway was killed, and yet it answered")


def rows(gateway: Any) -> set[str]:
    return {replica["id"] for replica in gateway.replicas()}


def folders(gateway: Any) -> set[str]:
    """Every replica that was ever launched."""
    return {path.name for path in (gateway.state / "replicas").iterdir()}


async def test_a_gateway_killed_during_a_cold_start_and_while_serving_adopts_its_replica(
    gateways: Gateways, eventually: Any
) -> None:
    gateway = gateways(startup="load=6")
    waiting = asyncio.create_task(abandoned(gateway))
    (pid,) = await asyncio.to_thread(eventually, gateway.replica_processes)
    gateway.kill()
    await waiting
    eventually(lambda: gateway.replica_processes() == [pid])

    await asyncio.to_thread(gateway.start)
    assert (await asyncio.to_thread(ask, gateway)).status_code == 200
    assert gateway.replica_processes() == [pid]
    assert rows(gateway) == folders(gateway)
    assert len(folders(gateway)) == 1

    gateway.kill()
    await asyncio.to_thread(gateway.start)
    answer = await asyncio.to_thread(ask, gateway)
    assert answer.status_code == 200
    assert gateway.replica_processes() == [pid]
    assert rows(gateway) == folders(gateway)
    assert len(folders(gateway)) == 1


async def test_with_the_controller_killed_the_workers_serve_on_and_the_next_one_knows_everything(
    gateways: Gateways, eventually: Any
) -> None:
    gateway = gateways(startup="load=1", flags="--profile r1-8xh200-2026")
    assert ask(gateway).status_code == 200
    before = rows(gateway)
    (controller,) = gateway.children("gateway.admin")
    stream = asyncio.create_task(
        asyncio.to_thread(ask, gateway, stream=True, max_tokens=400, ignore_eos=True)
    )
    await asyncio.to_thread(eventually, lambda: gateway.service()["demand"]["in_flight"] == 1)
    os.kill(controller, signal.SIGKILL)
    assert ask(gateway).status_code == 200
    assert (await stream).text.endswith("data: [DONE]\n\n")
    eventually(lambda: [p for p in gateway.children("gateway.admin") if p != controller])
    eventually(gateway._serves)
    assert rows(gateway) == before == folders(gateway)
    assert ask(gateway).status_code == 200


async def test_with_a_worker_killed_the_other_serves_on_and_its_requests_are_accounted(
    gateways: Gateways, eventually: Any
) -> None:
    gateway = gateways("--workers", "2", startup="load=1", flags="--profile r1-8xh200-2026")
    assert ask(gateway).status_code == 200
    body = {**BODY, "stream": True, "max_tokens": 600, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=90, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        streams = [
            asyncio.create_task(client.post(gateway.url + "/v1/chat/completions", json=body))
            for _ in range(20)
        ]
        await asyncio.to_thread(eventually, lambda: gateway.service()["demand"]["in_flight"] == 20)
        victim = gateway.children("gateway.app")[0]
        os.kill(victim, signal.SIGKILL)
        ends = await asyncio.gather(*streams, return_exceptions=True)
    died = [end for end in ends if isinstance(end, httpx.RemoteProtocolError | httpx.ReadError)]
    lived = [end for end in ends if isinstance(end, httpx.Response)]
    assert len(died) + len(lived) == 20, ends
    assert all(end.text.endswith("data: [DONE]\n\n") for end in lived)
    eventually(lambda: len(gateway.children("gateway.app")) == 2)
    eventually(lambda: gateway.service()["demand"]["in_flight"] == 0)
    counted = sum(
        float(line.rsplit(" ", 1)[1])
        for line in gateway.metrics().splitlines()
        if line.startswith("gateway_requests_total") and 'end="worker_died"' in line
    )
    assert counted == len(died)
    for _ in range(4):
        assert ask(gateway).status_code == 200
