"""When the server sees that a client has left, and /abort_request."""

from __future__ import annotations

import asyncio

import pytest

from replicas.simulator import SimConfig, Simulator

LONG = {"max_tokens": 100_000, "ignore_eos": True}


async def send(sim, ask, body, **more):
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    writer.write(ask("POST", "/v1/chat/completions", body(**more)))
    return reader, writer


async def test_in_mid_stream_it_is_seen_at_once(ask, body, until):
    async with Simulator(SimConfig(disconnect_poll=1000.0)) as sim:
        reader, writer = await send(sim, ask, body, stream=True, rid="gone", **LONG)
        await reader.readuntil(b"data: ")
        writer.close()
        await until(lambda: sim.stats.running == 0)
    assert (sim.stats.disconnected, sim.stats.aborted) == (["gone"], ["gone"])
    assert [(entry["rid"], entry["end"]) for entry in sim.stats.log] == [("gone", "disconnected")]


@pytest.mark.parametrize("stream", [True, False])
async def test_while_queued_it_is_seen_at_the_next_look_only(stream, ask, body, until):
    async with Simulator(SimConfig(max_running=1, disconnect_poll=0.4)) as sim:
        _, running = await send(sim, ask, body, stream=True, rid="running", **LONG)
        await until(lambda: sim.stats.running == 1)
        _, queued = await send(sim, ask, body, stream=stream, rid="queued", max_tokens=1)
        await until(lambda: sim.stats.queued == 1)
        queued.close()
        await until(lambda: sim.stats.disconnected == ["queued"])
        assert sim.stats.queued == 1  # its place is still taken
        await until(lambda: sim.stats.queued == 0)
        running.close()
    entry = sim.stats.log[0]
    assert (entry["rid"], entry["end"], entry["tokens"]) == ("queued", "disconnected", 0)
    assert entry["finished_ns"] - entry["arrived_ns"] >= 0.4e9


async def test_a_plain_request_runs_on_until_the_next_look(ask, body, until):
    async with Simulator(SimConfig(disconnect_poll=0.4)) as sim:
        _, writer = await send(sim, ask, body, rid="plain", **LONG)
        await until(lambda: sim.stats.running == 1)
        writer.close()
        await until(lambda: sim.stats.running == 0)
    assert sim.stats.log[0]["finished_ns"] - sim.stats.log[0]["arrived_ns"] >= 0.4e9
    assert sim.stats.aborted == ["plain"]


async def test_a_stream_whose_client_left_in_the_queue_ends_at_its_first_token(ask, body, until):
    async with Simulator(SimConfig(disconnect_poll=1000.0)) as sim:
        sim.hang()
        _, writer = await send(sim, ask, body, stream=True, rid="early", **LONG)
        await until(lambda: sim.stats.queued == 1)
        writer.close()
        await until(lambda: sim.stats.disconnected == ["early"])
        sim.resume()
        await until(lambda: len(sim.stats.log) == 1)
    assert (sim.stats.log[0]["end"], sim.stats.log[0]["tokens"]) == ("disconnected", 1)


async def test_an_abort_ends_a_stream_properly(ask, body, get, until):
    async with Simulator() as sim:
        reader, writer = await send(sim, ask, body, stream=True, rid="abort-me-1", **LONG)
        await reader.readuntil(b"data: ")
        reply = await get(sim.port, "POST", "/abort_request", {"rid": "abort-me-1"})
        raw = await reader.read()
        writer.close()
    assert (reply.status, reply.rest) == (200, b"")
    final = (
        b'"delta":{"reasoning_content":null},"logprobs":null,"finish_reason":"abort","matched_stop":null}]}'
    )
    assert raw.endswith(final + b"\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    assert sim.stats.aborted == ["abort-me-1"]


async def test_an_aborted_plain_request_is_200_with_what_there_is(chat, get, until):
    async with Simulator(SimConfig(reply="ab cd ef")) as sim:
        answer = asyncio.ensure_future(chat(sim.port, rid="victim", **LONG))
        await until(lambda: sim.stats.running == 1 and sim.engine.decode_steps > 2)
        await get(sim.port, "POST", "/abort_request", {"rid": "victim"})
        response = await answer
    assert response.status == 200
    assert response.json["choices"][0]["finish_reason"] == "abort"
    assert response.json["choices"][0]["message"]["content"].startswith("ab cd")


async def test_an_abort_takes_every_rid_that_begins_so_if_one_is_just_that_queued_ones_too(chat, get, until):
    async with Simulator(SimConfig(max_running=1)) as sim:
        answers = [asyncio.ensure_future(chat(sim.port, rid=rid, **LONG)) for rid in ("a", "a2", "b1")]
        await until(lambda: sim.stats.running == 1 and sim.stats.queued == 2)
        await get(sim.port, "POST", "/abort_request", {"rid": "b"})  # nobody's: nothing ends
        await get(sim.port, "POST", "/abort_request", {"rid": "a"})
        await until(lambda: len(sim.stats.log) == 2)
        assert set(sim.serving.live) == {"b1"}
        await get(sim.port, "POST", "/abort_request", {"abort_all": True})
        responses = await asyncio.gather(*answers)
    assert {response.json["choices"][0]["finish_reason"] for response in responses} == {"abort"}
    assert sim.stats.abort_calls == ["b", "a", "*"]


async def test_flushing_the_cache_is_refused_while_something_runs(chat, get, until):
    async with Simulator() as sim:
        answer = asyncio.ensure_future(chat(sim.port, rid="x", **LONG))
        await until(lambda: sim.stats.running == 1)
        assert (await get(sim.port, "POST", "/flush_cache")).status == 400
        sim.serving.abort("x")
        await answer
        assert (await get(sim.port, "GET", "/flush_cache")).status == 200
