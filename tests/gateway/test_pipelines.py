"""Requests behind a request on one connection: each in its turn, and none that nobody waits for."""

from __future__ import annotations

import asyncio

import pytest

from gateway.incoming import Client

from .conftest import Rig, chat, eventually
from .scripted import ANSWER, Peer, Scripted, says
from .test_connection_states import GET, Rigs, ended, only_connection
from .test_fast_path import PATH, connect, post


async def test_nothing_behind_a_request_that_closes_is_run(rig: Rig) -> None:
    async with Scripted(says(ANSWER)) as replica:
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
    async with Scripted(says(ANSWER)) as replica:
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
    async with Scripted(says(ANSWER)) as replica:
        rig.publish(replica.url)
        reading = asyncio.ensure_future(got.until(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n", 20))
        while not reading.done():
            longest = max(longest, len(connection.pipeline))
            await asyncio.sleep(0.001)
        assert (await reading).count(b"HTTP/1.1 400 ") == count
        await got.close()
        await rig.quiet()
    assert longest < 4000
