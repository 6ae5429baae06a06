"""A client's connection in every state it can be brought into: each request ends once, as what it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.incoming import Client
from gateway.protocol import GatewayProtocol
from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually
from .scripted import ANSWER, LAST, STREAM, Peer, Scripted, chunk, event, sample, whole
from .test_fast_path import PATH, connect, post

Rigs = Callable[..., Awaitable[Rig]]
GET = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"


def ended(end: str, code: int) -> float:
    return sample("gateway_requests_total", endpoint=PATH, code=str(code), end=end)


def only_connection(rig: Rig) -> GatewayProtocol:
    (connection,) = rig.servers[0].server_state.connections
    assert isinstance(connection, GatewayProtocol)
    return connection


async def answer_all(peer: Peer) -> None:
    await peer.send(ANSWER)


# --- timers


async def test_a_held_request_outlives_the_idle_time_of_a_refused_one_before_it(rig: Rig) -> None:
    rig.servers[0].config.timeout_keep_alive = 0.1
    got = await connect(rig)
    got.writer.write(post({}) + post(chat(max_tokens=1)))
    await rig.waiting(1)
    await asyncio.sleep(0.3)
    async with Scripted(answer_all) as replica:
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


# --- pipelines


async def test_nothing_behind_a_request_that_closes_is_run(rig: Rig) -> None:
    async with Scripted(answer_all) as replica:
        rig.publish(replica.url)
        await rig.acked()
        got = await connect(rig)
        got.writer.write(post({}, extra="Connection: close\r\n") + post(chat()) + post(chat()))
        data = await got.rest()
        assert data.startswith(b"HTTP/1.1 400 ")
        assert data.count(b"HTTP/1.1 ") == 1
        await got.close()
        await rig.quiet()
        assert replica.requests == []


async def test_a_client_that_leaves_before_its_next_request_has_its_turn_runs_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Client.run_asgi

    async def late(self: Client, app: object) -> None:
        self.sever()  # the client's reset, at just this moment
        await asyncio.sleep(0.01)
        await original(self, app)

    monkeypatch.setattr(Client, "run_asgi", late)
    before = ended("client_gone", 0)
    async with Scripted(answer_all) as replica:
        rig.publish(replica.url)
        await rig.acked()
        got = await connect(rig)
        got.writer.write(post(chat()) + post(chat()) + post(chat()))
        await got.rest()
        await got.close()
        await eventually(lambda: ended("client_gone", 0) == before + 2)
        await rig.quiet()
        assert len(replica.requests) == 1


async def test_a_client_that_leaves_is_noticed_though_it_sent_more_requests(rigs: Rigs) -> None:
    rig = await rigs(hold="silent")
    got = await connect(rig)
    got.writer.write(post(chat()) + post(chat()))
    await rig.waiting(1)
    got.writer.write(post(chat()))
    await got.close()
    await rig.waiting(0)
    await rig.quiet()


async def test_what_comes_behind_a_running_request_and_is_no_http_is_not_answered_into_it(
    rigs: Rigs,
) -> None:
    rig = await rigs(commit_after=0.01, beat_every=0.1)
    got = await connect(rig)
    got.writer.write(post(chat(stream=True)))
    await got.until(b": cold-start")
    got.writer.write(b"\0\0\0\0\r\n\r\n")
    assert b"400" not in await got.rest()
    await got.close()
    await rig.quiet()


@pytest.mark.parametrize(
    ("behind", "together"),
    [
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", True),
        (b"Content-Length: 5\r\n" + b"X-Much: %b\r\n" % (b"x" * 4000) * 20 + b"\r\nhello", False),
    ],
    ids=["an upgrade", "a head without measure"],
)
async def test_what_is_refused_behind_a_running_request_is_no_second_end_of_its_body(
    rig: Rig, behind: bytes, together: bool
) -> None:
    behind = f"POST {PATH} HTTP/1.1\r\nHost: t\r\n".encode() + behind
    running = asyncio.Event()

    async def holds(peer: Peer) -> None:
        if peer.number == 0:
            await peer.send(ANSWER)
            return
        running.set()
        await peer.gone.wait()

    async with Scripted(holds) as replica:
        rig.publish(replica.url)
        await rig.acked()
        assert (await rig.client.post(PATH, json=chat())).status_code == 200  # a pooled connection
        got = await connect(rig)
        if together:
            got.writer.write(post(chat()) + behind)
        else:
            got.writer.write(post(chat()))
            await running.wait()
            got.writer.write(behind)
        assert await got.rest() == b""
        await got.close()
        await rig.quiet()
        assert len(replica.requests) == 2
        assert not rig.servers[0].server_state.tasks


async def test_requests_that_are_refused_and_not_read_take_no_memory_and_are_cut(rigs: Rigs) -> None:
    rig = await rigs(write_timeout=1)
    got = await connect(rig)
    flood = post({}) * 1000
    try:
        async with asyncio.timeout(0.5):
            for _ in range(400):
                got.writer.write(flood)
                await got.writer.drain()
    except TimeoutError:
        pass
    connection = only_connection(rig)
    assert connection.transport.get_write_buffer_size() < 2 << 20
    assert len(connection.pipeline) < 5000
    await eventually(lambda: not rig.servers[0].server_state.connections, 30)
    await got.close(reset=True)


async def test_a_long_pipeline_is_read_as_it_is_answered_and_all_of_it(rig: Rig) -> None:
    got = await connect(rig)
    count, longest = 10_000, 0
    got.writer.write(post(chat(max_tokens=1)) + post({}) * count + GET)
    await rig.waiting(1)
    connection = only_connection(rig)
    async with Scripted(answer_all) as replica:
        rig.publish(replica.url)
        reading = asyncio.ensure_future(got.until(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n", 20))
        while not reading.done():
            longest = max(longest, len(connection.pipeline))
            await asyncio.sleep(0.001)
        assert (await reading).count(b"HTTP/1.1 400 ") == count
        await got.close()
        await rig.quiet()
    assert longest < 4000


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
    original, before = Client.spawn, ended("shutdown", 503)

    def spawn(self: Client, coroutine: Any) -> asyncio.Task[None]:
        task = original(self, coroutine)
        task.cancel()
        return task

    monkeypatch.setattr(Client, "spawn", spawn)
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
    async with Scripted(answer_all) as replica:
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
    async with Scripted(answer_all) as replica:
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
