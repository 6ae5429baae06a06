"""A replica that says nothing: its client is kept with beats, and given up on after --upstream-timeout."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable

import pytest

from .conftest import Rig, chat, eventually
from .scripted import ANSWER, DONE, LAST, STREAM, Peer, Scripted, chunk, event, retries, sample

PATH = "/v1/chat/completions"
Rigs = Callable[..., Awaitable[Rig]]
BEATS = {"beat_after": 0.1, "beat_every": 0.1}


def dechunked(data: bytes) -> bytes:
    """The body of a chunked answer as it came over the wire."""
    rest, body = data.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


async def hangs(peer: Peer) -> None:
    await peer.gone.wait()


async def test_a_long_json_answer_is_kept_with_spaces_before_it(rigs: Rigs) -> None:
    rig = await rigs(**BEATS)
    go = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await go.wait()
        await peer.send(ANSWER)

    async with Scripted(slow) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat())
        head = await got.until(b"1\r\n \r\n1\r\n \r\n")
        assert b"HTTP/1.1 200" in head
        assert b"x-accel-buffering: no" in head
        assert b"cache-control: no-cache, no-transform" in head
        go.set()
        data = await got.rest()
        assert data.endswith(LAST)
        body = dechunked(data)
        assert re.fullmatch(rb" {2,}", body[: -len(ANSWER.partition(b"\r\n\r\n")[2])])
        assert json.loads(body) == {"object": "chat.completion", "choices": []}
        await got.close()


async def test_a_stream_is_kept_with_comments_before_its_first_event(rigs: Rigs) -> None:
    rig = await rigs(**BEATS)
    go = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await go.wait()
        await peer.send(STREAM + chunk(event("x")) + chunk(DONE) + LAST)

    async with Scripted(slow) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat(stream=True))
        await got.until(b": waiting for the replica")
        go.set()
        data = await got.rest()
        body = dechunked(data)
        beats = body[: -len(event("x") + DONE)]
        assert re.fullmatch(rb"(?:: waiting for the replica, silent for \d+ s\n)+", beats)
        assert body.endswith(event("x") + DONE)
        await got.close()


async def test_a_stalled_stream_gets_comments_between_events_only(rigs: Rigs) -> None:
    rig = await rigs(**BEATS)
    go = asyncio.Event()
    first, second = event("x"), event("y")

    async def stalls(peer: Peer) -> None:
        await peer.send(STREAM + chunk(first))
        await go.wait()
        await peer.send(chunk(second[:20]))
        await asyncio.sleep(0.35)  # several beats are due within the event
        await peer.send(chunk(second[20:] + DONE) + LAST)

    async with Scripted(stalls) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat(stream=True))
        await got.until(b": waiting for the replica")
        go.set()
        body = dechunked(await got.rest())
        assert body.startswith(first + b": waiting")
        assert second + DONE in body
        assert re.sub(rb"(?m)^: .*\n", b"", body) == first + second + DONE
        await got.close()


async def test_beats_are_as_frequent_as_the_patience_of_the_client_asks(rigs: Rigs) -> None:
    rig = await rigs()  # 45 s and 8 s
    async with Scripted(hangs) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat(stream=True), headers=["x-stainless-read-timeout: 0.6"])
        await got.until(b": waiting")
        await got.close()
        await rig.quiet()


@pytest.mark.parametrize("mode", ["silent", "reject"])
async def test_a_client_that_wants_no_beats_gets_none_and_an_honest_504(rigs: Rigs, mode: str) -> None:
    rig = await rigs(**BEATS, upstream_timeout=0.4)
    async with Scripted(hangs) as replica:
        rig.publish(replica.url)
        got = await rig.client.post(PATH, json=chat(stream=True), headers={"x-gateway-hold": mode})
        assert (got.status_code, got.json()["error"]["code"]) == (504, "replica_timeout")


async def test_with_beat_after_0_there_are_no_beats(rigs: Rigs) -> None:
    rig = await rigs(beat_after=0, beat_every=0.1, upstream_timeout=0.4)
    async with Scripted(hangs) as replica:
        rig.publish(replica.url)
        got = await rig.client.post(PATH, json=chat())
        assert got.status_code == 504


@pytest.mark.parametrize("stream", [True, False])
async def test_after_the_upstream_timeout_it_is_504_aborted_counted_and_never_tried_elsewhere(
    rigs: Rigs, stream: bool
) -> None:
    rig = await rigs(upstream_timeout=0.2)
    async with Scripted(hangs) as one, Scripted(hangs) as two:
        rig.publish(one.url, two.url)
        before = retries("timeout")
        ended = sample("gateway_requests_total", endpoint=PATH, code="504", end="timeout")
        got = await rig.client.post(PATH, json=chat(stream=stream))
        assert (got.status_code, got.json()["error"]["code"]) == (504, "replica_timeout")
        (peer,) = one.peers + two.peers
        await asyncio.wait_for(peer.gone.wait(), 5)
        await eventually(lambda: one.aborts + two.aborts)
        assert one.aborts + two.aborts == [peer.request.json["rid"]]
        assert retries("timeout") == before
        assert sample("gateway_requests_total", endpoint=PATH, code="504", end="timeout") == ended + 1
        await rig.quiet()


async def test_after_beats_the_timeout_is_an_error_event(rigs: Rigs) -> None:
    rig = await rigs(**BEATS, upstream_timeout=0.4)
    async with Scripted(hangs) as replica:
        rig.publish(replica.url)
        data = await (got := await rig.raw(chat(stream=True))).rest()
        assert b": waiting" in data
        assert b'"code": "replica_timeout"' in data
        assert b"[DONE]" not in data
        await got.close()


async def test_after_spaces_the_timeout_aborts_the_connection(rigs: Rigs) -> None:
    rig = await rigs(**BEATS, upstream_timeout=0.4)
    async with Scripted(hangs) as replica:
        rig.publish(replica.url)
        data = await (got := await rig.raw(chat())).rest()
        assert data.endswith(b"1\r\n \r\n")
        await got.close()


async def test_the_services_own_timeout_wins_over_the_flag(rigs: Rigs) -> None:
    rig = await rigs(upstream_timeout=100.0)
    async with Scripted(hangs) as replica:
        rig.publish(replica.url, upstream_timeout=0.2)
        got = await rig.client.post(PATH, json=chat())
        assert got.status_code == 504


async def test_the_time_that_counts_is_silence_and_not_the_length_of_the_answer(rigs: Rigs) -> None:
    rig = await rigs(upstream_timeout=0.5)

    async def slow(peer: Peer) -> None:
        await peer.send(STREAM)
        for n in range(8):
            await peer.send(chunk(event(str(n))))
            await asyncio.sleep(0.1)
        await peer.send(chunk(DONE) + LAST)

    async with Scripted(slow) as replica:
        rig.publish(replica.url)
        got = await rig.client.post(PATH, json=chat(stream=True))
        assert got.content.endswith(DONE)


async def test_a_stream_that_stalls_for_good_is_an_error_event(rigs: Rigs) -> None:
    rig = await rigs(upstream_timeout=0.2)

    async def stalls(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("x")))
        await peer.gone.wait()

    async with Scripted(stalls) as replica:
        rig.publish(replica.url)
        got = await rig.client.post(PATH, json=chat(stream=True))
        assert got.content.startswith(event("x") + b"data: ")
        assert "replica_timeout" in got.text
        assert replica.aborts == []  # mid-stream, closing is enough


async def test_a_stall_that_takes_the_replica_out_of_rotation_for_a_while_loses_no_request(
    rigs: Rigs,
) -> None:
    """Two minutes without a byte, at a hundredth: its requests stay where they are, those who come meanwhile
    wait, and each runs once."""
    rig = await rigs(commit_after=0.05, beat_after=0.45, beat_every=0.08)
    go = asyncio.Event()

    async def stalls(peer: Peer) -> None:
        streams = peer.request.json.get("stream")
        if streams and peer.number % 4 < 2:  # some have begun
            await peer.send(STREAM + chunk(event("a")))
            await go.wait()
            await peer.send(chunk(event("b")) + chunk(DONE) + LAST)
            return
        await go.wait()
        await peer.send(STREAM + chunk(event("a")) + chunk(DONE) + LAST if streams else ANSWER)

    async with Scripted(stalls) as replica:
        rig.publish(replica.url)
        await rig.acked()
        before = {cause: retries(cause) for cause in ("dial", "died_silent", "stale")}
        running = [await rig.raw(chat(stream=number % 2 == 0)) for number in range(8)]
        await eventually(lambda: len(replica.requests) == 8)
        rig.publish()  # not ready
        await rig.acked()
        held = [await rig.raw(chat(stream=number % 2 == 0)) for number in range(8)]
        await rig.waiting(8)
        await asyncio.sleep(1.2)
        assert len(replica.requests) == 8
        rig.publish(replica.url)  # ready again
        go.set()
        for number, got in enumerate(running + held):
            data = await got.rest()
            assert data.endswith(LAST) or b"content-length" in data
            assert (b"data: [DONE]" in data) is (number % 2 == 0)
            assert b'"error"' not in data
            await got.close()
        assert len(replica.requests) == 16
        assert {cause: retries(cause) for cause in before} == before
        await rig.quiet()
