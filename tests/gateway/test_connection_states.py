"""A client's connection in every state it can be brought into: each request ends once, as what it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from gateway.protocol import GatewayProtocol
from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually, on_task
from .scripted import ANSWER, LAST, STREAM, Peer, Scripted, chunk, event, sample, says, whole
from .test_fast_path import PATH, connect, post

Rigs = Callable[..., Awaitable[Rig]]
GET = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"


def ended(end: str, code: int) -> float:
    return sample("gateway_requests_total", endpoint=PATH, code=str(code), end=end)


def only_connection(rig: Rig) -> GatewayProtocol:
    (connection,) = rig.servers[0].server_state.connections
    assert isinstance(connection, GatewayProtocol)
    return connection


# --- timers


async def test_a_held_request_outlives_the_idle_time_of_a_refused_one_before_it(rig: Rig) -> None:
    rig.servers[0].config.timeout_keep_alive = 0.1
    got = await connect(rig)
    got.writer.write(post({}) + post(chat(max_tokens=1)))
    await rig.waiting(1)
    await asyncio.sleep(0.3)
    async with Scripted(says(ANSWER)) as replica:
        rig.publish(replica.url)
        assert (await got.until(ANSWER[-20:])).startswith(b"HTTP/1.1 400 ")
        await got.close()
        await rig.quiet()


async def test_the_idle_time_counts_from_the_last_answer(rig: Rig) -> None:
    rig.servers[0].config.timeout_keep_alive = 0.4  # type: ignore[assignment]
    loop = asyncio.get_running_loop()
    got = await connect(rig)
    for _ in range(4):  # 0.6 s in all
        asked = loop.time()
        got.writer.write(GET)
        await got.until(b"HTTP/1.1 200 OK")
        await asyncio.sleep(0.2)
    await got.rest(3)
    assert 0.35 < loop.time() - asked < 2
    await got.close()


@pytest.mark.parametrize("first", [GET, post({}), b"POST /no HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"])
async def test_a_second_head_that_does_not_come_is_given_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    monkeypatch.setattr(GatewayProtocol, "read_seconds", 0.2)
    got = await connect(rig)
    got.writer.write(first)
    await got.until(b"\r\n\r\n")
    got.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nX-Slow: ")
    await got.rest(3)
    await got.close()


async def test_the_rest_of_a_refused_body_that_does_not_come_is_given_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatewayProtocol, "read_seconds", 0.2)
    got = await connect(rig)
    got.writer.write(b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Length: 50\r\n\r\n{" % PATH.encode())
    await got.until(b"\r\n\r\n")
    got.writer.write(b" ")
    assert (await got.rest(3)).startswith(b"HTTP/1.1 415 ")
    await got.close()


async def test_a_connection_is_kept_after_the_rest_of_a_refused_body(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatewayProtocol, "read_seconds", 0.2)
    got = await connect(rig)
    got.writer.write(b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\n{" % PATH.encode())
    await got.until(b"\r\n\r\n")
    got.writer.write(b"}")
    await asyncio.sleep(0.4)
    got.writer.write(GET)
    await got.until(b"HTTP/1.1 200 OK")
    await got.close()


# --- ends


async def test_a_body_that_is_no_http_is_refused_as_such(rig: Rig) -> None:
    before = ended("rejected", 400)
    got = await connect(rig)
    head = b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n" % PATH.encode()
    got.writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n")
    answer = await got.rest()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_request"
    await got.close()
    await eventually(lambda: ended("rejected", 400) == before + 1)


@pytest.mark.parametrize("path", [PATH, "/no"])
async def test_a_refused_request_whose_body_turns_out_to_be_no_http_has_one_answer(
    rig: Rig, path: str
) -> None:
    got = await connect(rig)
    got.writer.write(b"POST %b HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n" % path.encode())
    await got.until(b"}}")
    got.writer.write(b"zz\r\n")
    assert (await got.rest()).count(b"HTTP/1.1 ") == 1
    await got.close()


async def test_a_client_that_leaves_what_it_was_sent_unread_did_not_get_it(rig: Rig) -> None:
    before, complete = ended("client_gone", 200), ended("complete", 200)
    body = b'{"x":"%b"}' % (b"x" * (24 << 20))

    async def large(peer: Peer) -> None:
        await peer.send(whole(body))

    async with Scripted(large) as replica:
        rig.publish(replica.url)
        await rig.acked()
        got = await connect(rig)
        got.writer.write(post(chat()))
        await got.reader.readexactly(1)
        await eventually(lambda: only_connection(rig).flow.write_paused)
        await got.close(reset=True)
        await eventually(lambda: ended("client_gone", 200) == before + 1)
        assert ended("complete", 200) == complete
        await rig.quiet()


async def test_a_task_that_is_cancelled_before_its_first_step_still_ends_its_request(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ended("shutdown", 503)
    on_task(monkeypatch, lambda name, task: task.cancel())
    got = await rig.client.post(PATH, json=chat())
    assert got.json()["error"]["code"] == "gateway_stopping"
    assert ended("shutdown", 503) == before + 1
    await rig.quiet()


async def test_http_1_0_whose_replica_dies_is_reset_for_a_close_would_be_a_good_end(rig: Rig) -> None:
    async def dies(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("a") + b"data: {"))
        await asyncio.sleep(0.05)
        peer.close()

    async with Scripted(dies) as replica:
        rig.publish(replica.url)
        await rig.acked()
        got = await connect(rig)
        got.writer.write(post(chat(stream=True), version="1.0"))
        await got.until(b"data: {")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(got.reader.read(), 5)
        await got.close()
        await rig.quiet()


async def test_a_stopping_gateway_does_not_wait_for_a_body_to_come(rig: Rig) -> None:
    got = await connect(rig)
    request = post(chat())
    got.writer.write(request[:-5])
    await eventually(lambda: only_connection(rig).active)
    rig.servers[0].stop()
    assert b"gateway_stopping" in await got.until(b"}}")
    got.writer.write(request[-5:])
    assert (await got.rest(3)).startswith(b"HTTP/1.1 503 ")
    await got.close()


# --- what crosses


async def test_trailers_reach_no_replica(rig: Rig) -> None:
    async with Scripted(says(ANSWER)) as replica:
        rig.publish(replica.url)
        await rig.acked()
        got = await connect(rig)
        body = json.dumps(chat()).encode()
        head = b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n" % PATH.encode()
        got.writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(body))
        got.writer.write(b"0\r\nX-Evil: 1\r\nConnection: content-type\r\n\r\n")
        await got.until(ANSWER[-20:])
        await got.close()
        assert replica.requests[0].values(b"x-evil") == []
        assert replica.requests[0].values(b"content-type") == [b"application/json"]


async def test_a_body_behind_an_upgrade_is_not_read_as_a_request(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async with Scripted(says(ANSWER)) as replica:
        rig.publish(replica.url)
        await rig.acked()
        for path in (PATH, "/health", "/no"):
            got = await connect(rig)
            inner = post(chat())
            got.writer.write(
                b"POST %b HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(inner))
            )
            await asyncio.sleep(0.05)
            got.writer.write(inner)
            data = await got.rest()
            assert data.count(b"HTTP/1.1 ") <= 1
            await got.close()
        await rig.quiet()
        assert replica.requests == []
        assert "pip install" not in caplog.text


@pytest.mark.parametrize("extra", [b"", b"content-length: 5\r\n", b"content-length: 0\r\n"])
async def test_an_answer_without_a_body_ends_with_its_head(rig: Rig, extra: bytes) -> None:
    async def nothing(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 204 No Content\r\n" + extra + b"\r\n")

    async with Scripted(nothing) as replica:
        rig.publish(replica.url)
        await rig.acked()
        got = await connect(rig)
        got.writer.write(post(chat()))
        head = await got.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 204 ")
        assert b"content-length" not in head
        assert b"transfer-encoding" not in head
        got.writer.write(GET)
        assert (await got.until(b"HTTP/1.1 200 OK")).startswith(head + b"HTTP/1.1 200 OK")
        await got.close()
        await rig.quiet()


async def test_a_replica_whose_trailer_has_no_end_is_given_up(rig: Rig) -> None:
    async def endless(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("a")) + LAST[:3] + b"x-trailer: ")
        for _ in range(64):
            await peer.send(b"y" * 65536)

    async with Scripted(endless) as replica:
        rig.publish(replica.url)
        await rig.acked()
        got = await rig.raw(chat(stream=True))
        assert b'"code": "replica_bad_response"' in await got.rest()
        await got.close()
        await eventually(lambda: replica.peers[0].gone.is_set())
        await rig.quiet()


async def test_a_simulated_replica_serves_over_a_connection_that_had_everything(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.acked()
        got = await connect(rig)
        for part in (post({}), GET, post(chat(max_tokens=1)), b"\r\n", post(chat(max_tokens=1, stream=True))):
            got.writer.write(part)
        await got.until(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        await got.close()
        await rig.quiet()
