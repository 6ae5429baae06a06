"""A proxied request never meets ASGI, and uvicorn's connection keeps its manners around it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.protocol import GatewayProtocol
from replicas.simulator import SimConfig, Simulator

from .conftest import RawAnswer, Rig, chat, eventually

Rigs = Callable[..., Awaitable[Rig]]
PATH = "/v1/chat/completions"


def post(body: Any, *, version: str = "1.1", extra: str = "", path: str = PATH) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/{version}\r\nHost: t\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n{extra}\r\n"
    )
    return head.encode() + data


async def connect(rig: Rig) -> RawAnswer:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(rig.url.rsplit(":", 1)[1]))
    return RawAnswer(reader, writer)


async def test_a_proxied_post_goes_past_the_asgi_app_and_the_rest_through_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    app = rig.servers[0].config.loaded_app
    original = type(app).__call__

    async def watched(self: Any, scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await original(self, scope, receive, send)

    monkeypatch.setattr(type(app), "__call__", watched)
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.acked()
        assert (await rig.client.post(PATH, json=chat(max_tokens=2))).status_code == 200
        assert (await rig.client.get("/health")).status_code == 200
        assert (await rig.client.post(PATH + "?a=b", json=chat(max_tokens=2))).status_code == 200
        assert (await rig.client.get("/v1/models")).status_code == 200
    assert seen == ["/health", "/v1/models"]


async def test_pipelined_requests_are_answered_in_order_proxied_or_not(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.acked()
        got = await connect(rig)
        get = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"
        got.writer.write(
            post(chat(max_tokens=1, user="a")) + get + post({}) + post(chat(max_tokens=1, stream=True)) + get
        )
        data = await got.until(b"data: [DONE]\n\n\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n")
        statuses = [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"200", b"200", b"400", b"200", b"200"]
        await got.close()
        await rig.quiet()


async def test_a_client_that_leaves_with_requests_in_its_pipeline_leaves_nothing_behind(rig: Rig) -> None:
    async with Simulator(SimConfig(profile="r1-8xh200-2026")) as sim:
        rig.publish(sim.url)
        await rig.acked()
        got = await connect(rig)
        got.writer.write(post(chat(max_tokens=500, ignore_eos=True)) + post(chat()) + post(chat()))
        await eventually(lambda: rig.board.in_flight(0) == 1)
        await got.close(reset=True)
        await rig.quiet()
        assert sim.stats.runs_total == 1


async def test_http_1_0_gets_the_bytes_without_chunks_and_the_end_of_the_connection(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.acked()
        got = await connect(rig)
        got.writer.write(post(chat(max_tokens=2, stream=True), version="1.0"))
        head, _, body = (await got.rest()).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")
        await got.close()


async def test_connection_close_is_honoured_and_keep_alive_without_it(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.acked()
        got = await connect(rig)
        for _ in range(3):
            got.data = b""
            got.writer.write(post(chat(max_tokens=1)))
            await got.until(b'"metadata"')
        got.writer.write(post(chat(max_tokens=1), extra="Connection: close\r\n"))
        data = await got.rest()
        assert b"connection: close" in data.lower()
        await got.close()


async def test_a_body_that_is_announced_is_asked_for_and_a_refused_one_is_not(rig: Rig) -> None:
    got = await connect(rig)
    request = post(chat(max_tokens=1), extra="Expect: 100-continue\r\n")
    head, _, body = request.partition(b"\r\n\r\n")
    got.writer.write(head + b"\r\n\r\n")
    await got.until(b"HTTP/1.1 100 Continue\r\n\r\n")
    got.writer.write(body)
    await rig.waiting(1)
    await got.close()
    await rig.waiting(0)

    got = await connect(rig)
    refused = head.replace(b"application/json", b"text/plain")
    got.writer.write(refused + b"\r\n\r\n")
    data = await got.rest()
    assert data.startswith(b"HTTP/1.1 415 ")
    assert b"100 Continue" not in data
    await got.close()


async def test_a_body_that_does_not_come_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatewayProtocol, "read_seconds", 0.2)
    got = await connect(rig)
    got.writer.write(post(chat())[:-5])
    data = await got.rest()
    assert data.startswith(b"HTTP/1.1 408 ")
    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    await got.close()
    await rig.quiet()


async def test_a_head_that_does_not_come_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatewayProtocol, "read_seconds", 0.2)
    got = await connect(rig)
    got.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nX-Slow")
    assert await got.rest() == b""
    await got.close()


async def test_a_proxied_post_that_wants_to_upgrade_is_not_proxied(rig: Rig) -> None:
    got = await connect(rig)
    got.writer.write(post(chat(), extra="Connection: Upgrade\r\nUpgrade: websocket\r\n"))
    data = await got.until(b"\r\n\r\n")
    assert data.startswith(b"HTTP/1.1 4")
    await got.close()
    assert rig.board.totals(0).arrived == 0
