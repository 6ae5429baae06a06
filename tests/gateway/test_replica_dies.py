"""A replica dies under its requests: no client takes the rest for a whole answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat
from .scripted import LAST, STREAM, Peer, Scripted, chunk, event, sample, whole

PATH = "/v1/chat/completions"
Rigs = Callable[..., Awaitable[Rig]]


def last_event(data: bytes) -> Any:
    """The last event of a chunked answer as it came over the wire."""
    return json.loads(data.rpartition(b"data: ")[2].partition(b"\n\n")[0])


async def test_a_crash_in_the_middle_of_a_stream_is_an_error_event_and_never_done(rig: Rig) -> None:
    config = SimConfig(faults=("crash-after=5",), crash_silence=0.05)
    async with Simulator(config) as sim:
        rig.publish(sim.url)
        before = sample("gateway_requests_total", endpoint=PATH, code="200", end="upstream_died")
        got = await rig.client.post(PATH, json=chat(stream=True, max_tokens=50))
        assert got.status_code == 200
        assert b"[DONE]" not in got.content
        assert got.content.count(b"data: ") >= 4
        error = json.loads(got.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "replica_died")
        assert sim.stats.runs_total == 1
        after = sample("gateway_requests_total", endpoint=PATH, code="200", end="upstream_died")
        assert after == before + 1
        await rig.quiet()


async def test_openais_client_raises_for_it(rig: Rig) -> None:
    async with Simulator(SimConfig(faults=("crash-after=5",), crash_silence=0.0)) as sim:
        rig.publish(sim.url)
        async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="r1", messages=[{"role": "user", "content": "x"}], stream=True
            )
            with pytest.raises(openai.APIError, match="broke off its answer"):
                async for _ in stream:
                    pass


async def test_a_crash_before_the_first_byte_is_an_honest_502(rig: Rig) -> None:
    async with Simulator(SimConfig(faults=("crash-after=5",), crash_silence=0.0)) as sim:
        rig.publish(sim.url)
        got = await rig.client.post(PATH, json=chat(max_tokens=50))
        assert (got.status_code, got.json()["error"]["code"]) == (502, "replica_died")
        assert 1 <= int(got.headers["retry-after"]) <= 60
        assert sim.stats.runs_total == 1


async def test_a_crash_within_a_json_answer_aborts_the_connection(rig: Rig) -> None:
    async def dies(peer: Peer) -> None:
        await peer.send(whole(b'{"choices": []}')[:-3])
        peer.close()

    async with Scripted(dies) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat())
        data = await got.rest()
        head, _, body = data.partition(b"\r\n\r\n")
        assert b"content-length: 15" in head
        assert len(body) < 15
        await got.close()
        await rig.quiet()


async def test_a_crash_after_spaces_were_sent_aborts_the_connection_without_a_last_chunk(rigs: Rigs) -> None:
    rig = await rigs(beat_after=0.1, beat_every=0.1)
    die = asyncio.Event()

    async def dies(peer: Peer) -> None:
        await die.wait()
        peer.close()

    async with Scripted(dies) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat())
        await got.until(b"1\r\n \r\n")
        die.set()
        data = await got.rest()
        assert not data.endswith(LAST)
        assert b"error" not in data
        await got.close()


@pytest.mark.parametrize("status", [400, 500, 503])
async def test_a_refusal_after_spaces_were_sent_aborts_the_connection(rigs: Rigs, status: int) -> None:
    rig = await rigs(beat_after=0.1, beat_every=0.1)
    go = asyncio.Event()

    async def refuses(peer: Peer) -> None:
        await go.wait()
        await peer.send(whole(b'{"message":"no"}', status=status))

    async with Scripted(refuses) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat())
        await got.until(b"1\r\n \r\n")
        go.set()
        data = await got.rest()
        assert not data.endswith(LAST)
        assert b"message" not in data
        await got.close()


async def test_a_refusal_after_comments_were_sent_is_an_error_event(rigs: Rigs) -> None:
    rig = await rigs(beat_after=0.1, beat_every=0.1)
    go = asyncio.Event()

    async def refuses(peer: Peer) -> None:
        await go.wait()
        await peer.send(whole(b'{"message":"too long","code":400}', status=400))

    async with Scripted(refuses) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat(stream=True))
        await got.until(b": waiting")
        go.set()
        data = await got.rest()
        assert last_event(data)["error"]["message"] == "too long"
        assert b"[DONE]" not in data
        await got.close()


async def test_a_json_answer_to_a_stream_that_was_committed_is_an_error_event(rigs: Rigs) -> None:
    rig = await rigs(beat_after=0.1, beat_every=0.1)
    go = asyncio.Event()

    async def answers(peer: Peer) -> None:
        await go.wait()
        await peer.send(whole(b'{"choices":[]}'))

    async with Scripted(answers) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat(stream=True))
        await got.until(b": waiting")
        go.set()
        data = await got.rest()
        assert "error" in last_event(data)
        await got.close()


@pytest.mark.parametrize(
    "end",
    [LAST, b"", b"5\r\n", chunk(b"data: [DO"), chunk(b": comment\n"), b"zz\r\n"],
    ids=["well framed", "EOF", "half a chunk", "half the marker", "a comment", "bad framing"],
)
async def test_a_stream_without_its_end_marker_is_never_taken_for_whole(rig: Rig, end: bytes) -> None:
    async def dies(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("the end is [DONE], data: [DONE]")) + end)
        peer.close()

    async with Scripted(dies) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat(stream=True))
        data = await got.rest()
        assert b"\ndata: [DONE]" not in data
        if end.startswith((LAST, b"5", b"zz")) or not end:
            assert last_event(data)["error"]["type"] == "server_error"
        else:  # the bytes stop inside an event: nothing can be said any more
            assert not data.endswith(LAST)
        await got.close()
        await rig.quiet()


async def test_an_end_marker_without_the_end_of_the_framing_is_not_the_end(rig: Rig) -> None:
    async def dies(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("x")) + chunk(b"data: [DONE]\n\n"))
        peer.close()

    async with Scripted(dies) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat(stream=True))
        data = await got.rest()
        assert last_event(data)["error"]["code"] == "replica_died"
        await got.close()


async def test_a_reset_is_a_death_like_any_other(rig: Rig) -> None:
    async def dies(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("x")))
        await asyncio.sleep(0)
        peer.reset()

    async with Scripted(dies) as replica:
        rig.publish(replica.url)
        got = await rig.raw(chat(stream=True))
        data = await got.rest()
        assert b"[DONE]" not in data
        assert b"replica_died" in data
        await got.close()


async def test_a_hundred_streams_of_a_replica_that_crashes_all_end_in_an_error(rig: Rig) -> None:
    async with Simulator(SimConfig(max_running=100)) as sim:
        rig.publish(sim.url, window=100)
        body = chat(stream=True, max_tokens=100_000, ignore_eos=True)
        answers = [await rig.raw(body) for _ in range(100)]
        for got in answers:
            await got.until(b"data: ")
        sim.inject("exit")
        for got in answers:
            data = await got.rest()
            assert b"replica_died" in data
            assert b"[DONE]" not in data
            await got.close()
        await rig.quiet()
        assert sim.stats.runs_total == 100


async def test_a_replica_that_fails_five_times_in_a_row_is_left_alone_for_a_second(rig: Rig) -> None:
    async def fails(peer: Peer) -> None:
        await peer.send(whole(b"no", status=500))

    async with Scripted(fails) as sick, Simulator(SimConfig()) as sim:
        rig.publish(sick.url, sim.url)
        await rig.acked()
        before = sample("gateway_ejections_total", replica="up-0")
        for _ in range(80):
            await rig.client.post(PATH, json=chat(max_tokens=1))
        assert sample("gateway_ejections_total", replica="up-0") >= before + 1
        assert len(sick.requests) < 40


async def test_what_a_client_did_wrong_never_ejects(rig: Rig) -> None:
    async def refuses(peer: Peer) -> None:
        await peer.send(whole(b"no", status=400))

    async with Scripted(refuses) as replica:
        rig.publish(replica.url)
        before = sample("gateway_ejections_total", replica="up-0")
        for _ in range(12):
            assert (await rig.client.post(PATH, json=chat())).status_code == 400
        assert sample("gateway_ejections_total", replica="up-0") == before
