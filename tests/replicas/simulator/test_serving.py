"""What a gateway meets on the wire: no byte before the first token, full queue, idle close, health, load."""

from __future__ import annotations

import asyncio
import time

import pytest

from replicas.simulator import SimConfig, Simulator


def test_the_defaults_are_what_was_measured():
    config = SimConfig()
    assert (config.keep_alive, config.health_seconds, config.health_timeout) == (5.0, 1.0, 20.0)
    assert (config.disconnect_poll, config.crash_silence) == (4.0, 5.7)
    assert (config.publish_interval, config.decode_log_interval, config.max_queued) == (15, 40, None)


@pytest.mark.parametrize("stream", [True, False])
async def test_no_byte_comes_before_the_first_token(stream, ask, body, until):
    async with Simulator() as sim:
        sim.hang()
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(ask("POST", "/v1/chat/completions", body(stream=stream, max_tokens=2)))
        await until(lambda: sim.stats.queued == 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        sim.resume()
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()


async def test_max_tokens_is_how_many_come_and_the_whole_reply_without(chat):
    async with Simulator(SimConfig(reply="one two three four five")) as sim:
        cut = await chat(sim.port, max_tokens=3)
        whole = await chat(sim.port)
        longer = await chat(sim.port, max_tokens=50)
        forced = await chat(sim.port, max_tokens=50, ignore_eos=True)
    answers = [response.json for response in (cut, whole, longer, forced)]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [3, 5, 5, 50]
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == [
        "length",
        "stop",
        "stop",
        "length",
    ]
    assert [answer["choices"][0]["matched_stop"] for answer in answers] == [None, 1, 1, None]
    assert answers[1]["choices"][0]["message"]["content"] == "one two three four five"


async def test_a_full_queue_is_503_for_a_plain_request_and_an_error_event_for_a_stream(chat, recorded, until):
    async with Simulator(SimConfig(max_running=1, max_queued=2)) as sim:
        sim.hang()
        accepted = [asyncio.ensure_future(chat(sim.port, max_tokens=1)) for _ in range(2)]
        await until(lambda: sim.stats.queued == 2)
        plain = await chat(sim.port)
        stream = await chat(sim.port, stream=True)
        sim.resume()
        assert [(await answer).status for answer in accepted] == [200, 200]
        again = await chat(sim.port, max_tokens=1)
    for ours, name in ((plain, "queue-full-nonstream.raw"), (stream, "queue-full-stream.raw")):
        real = recorded(name)
        assert (ours.status, ours.header_names, ours.rest) == (real.status, real.header_names, real.rest)
    assert again.status == 200
    assert (sim.stats.refused, sim.stats.runs_total) == (2, 3)


async def test_an_idle_connection_is_closed_without_a_word_and_one_in_use_is_kept(ask, body):
    async with Simulator(SimConfig(keep_alive=0.4)) as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        for _ in range(3):
            writer.write(ask("POST", "/v1/chat/completions", body(stream=True, max_tokens=2), close=False))
            await reader.readuntil(b"0\r\n\r\n")
            await asyncio.sleep(0.05)
        since = time.monotonic()
        assert await reader.read() == b""
        assert time.monotonic() - since >= 0.3
        writer.close()


async def test_a_connection_that_was_never_used_is_not_closed(until):
    async with Simulator(SimConfig(keep_alive=0.05)) as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        await until(lambda: len(sim.connections) == 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        writer.close()


async def test_requests_sent_one_after_the_other_without_waiting_are_answered_in_order(ask):
    async with Simulator() as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        first = ask("GET", "/ping", close=False)
        writer.write(first + first + ask("GET", "/nope"))
        raw = await reader.read()
        writer.close()
    assert [line for line in raw.split(b"\r\n") if line.startswith(b"HTTP/1.1")] == [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 404 Not Found",
    ]


async def test_what_is_no_http_gets_400():
    async with Simulator() as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(b"nonsense\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        writer.close()


async def test_health_takes_its_time_and_stays_well_when_the_queue_is_full(get, chat, until):
    async with Simulator(SimConfig(max_running=1, max_queued=1, health_seconds=0.3, reply="x" * 3000)) as sim:
        running = asyncio.ensure_future(chat(sim.port, max_tokens=5000, ignore_eos=True, rid="long"))
        await until(lambda: sim.stats.running == 1)
        queued = asyncio.ensure_future(chat(sim.port, max_tokens=1))
        await until(lambda: sim.stats.queued == 1)
        since = time.monotonic()
        assert (await get(sim.port, "GET", "/health")).status == 200
        assert time.monotonic() - since >= 0.3
        assert (await chat(sim.port)).status == 503
        sim.serving.abort("long")
        await asyncio.gather(running, queued)


async def test_a_hung_scheduler_makes_health_503_after_its_timeout_while_all_else_answers(get, chat, until):
    config = SimConfig(health_seconds=0.05, health_timeout=0.4, enable_metrics=True, max_running=1)
    async with Simulator(config) as sim:
        answer = asyncio.ensure_future(chat(sim.port, max_tokens=100))
        await until(lambda: sim.stats.running == 1)
        sim.hang()
        before = (await get(sim.port, "GET", "/v1/loads?include=core")).json
        since = time.monotonic()
        assert (await get(sim.port, "GET", "/health")).status == 503
        assert time.monotonic() - since >= 0.4
        after = (await get(sim.port, "GET", "/v1/loads?include=core")).json
        assert (await get(sim.port, "GET", "/v1/models")).status == 200
        assert (await get(sim.port, "GET", "/metrics")).status == 200
        sim.resume()
        assert (await get(sim.port, "GET", "/health")).status == 200
        assert (await answer).json["usage"]["completion_tokens"] == 100
    assert before["loads"][0]["timestamp"] == after["loads"][0]["timestamp"]
    assert before["timestamp"] < after["timestamp"]
    assert after["loads"][0]["num_running_reqs"] == 1


async def test_an_idle_scheduler_writes_its_load_all_the_time(get):
    async with Simulator() as sim:
        first = (await get(sim.port, "GET", "/v1/loads")).json["loads"][0]["timestamp"]
        assert (await get(sim.port, "GET", "/v1/loads")).json["loads"][0]["timestamp"] > first


async def test_load_figures_change_by_tick(get, chat, until):
    """A request that waits behind a running one shows at the next tick only: 15 steps for /v1/loads."""
    async with Simulator(SimConfig(max_running=1, publish_interval=1_000_000)) as sim:
        running = asyncio.ensure_future(chat(sim.port, max_tokens=200))
        await until(lambda: sim.stats.running == 1 and sim.engine.kind == "decode")
        queued = asyncio.ensure_future(chat(sim.port, max_tokens=1))
        await until(lambda: sim.stats.queued == 1)
        stale = (await get(sim.port, "GET", "/v1/loads")).json["loads"][0]
        await asyncio.gather(running, queued)
        fresh = (await get(sim.port, "GET", "/v1/loads")).json["loads"][0]
    assert (stale["num_running_reqs"], stale["num_waiting_reqs"], stale["queues"]["waiting"]) == (1, 0, 0)
    assert (fresh["num_running_reqs"], fresh["num_waiting_reqs"]) == (0, 0)


async def test_metrics_carry_sglangs_names_and_are_there_only_when_enabled(get, chat):
    async with Simulator(SimConfig(enable_metrics=True, served_model_name="tiny")) as sim:
        assert b"sglang:num_requests_total" not in (await get(sim.port, "GET", "/metrics")).rest
        await chat(sim.port, max_tokens=3)
        text = (await get(sim.port, "GET", "/metrics")).rest.decode()
    async with Simulator() as sim:
        assert (await get(sim.port, "GET", "/metrics")).json == {"detail": "Not Found"}
    ranks = 'engine_type="unified",model_name="tiny",moe_ep_rank="0",pp_rank="0",tp_rank="0"'
    for gauge in ("num_running_reqs", "num_queue_reqs", "token_usage", "gen_throughput", "num_used_tokens"):
        assert f"\nsglang:{gauge}{{{ranks}}} 0.0\n" in text
    assert (
        'sglang:num_requests_total{engine_type="unified",is_streaming="false",model_name="tiny"} 1.0' in text
    )
    assert (
        'sglang:generation_tokens_total{engine_type="unified",is_streaming="false",model_name="tiny"} 3.0'
        in text
    )


async def test_two_hundred_streams_at_once_all_end(ask, body):
    async with Simulator(SimConfig(speedup=1000.0, max_running=64)) as sim:

        async def one(number: int) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
            writer.write(
                ask("POST", "/v1/chat/completions", body(stream=True, max_tokens=20, user=f"u{number}"))
            )
            raw = await reader.read()
            writer.close()
            return raw

        answers = await asyncio.gather(*(one(number) for number in range(200)))
    assert all(raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for raw in answers)
    assert sim.stats.markers == {f"u{number}": 1 for number in range(200)}
    assert {entry["end"] for entry in sim.stats.log} == {"complete"}


async def test_a_client_that_does_not_read_gets_everything_later_in_larger_events(ask, body, until):
    async with Simulator(SimConfig(speedup=1e6, reply=" ".join(["word"] * 500))) as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port, limit=2**16)
        request = body(stream=True, max_tokens=20_000, ignore_eos=True, rid="slow")
        writer.write(ask("POST", "/v1/chat/completions", request))
        await until(lambda: len(sim.stats.log) == 1)
        raw = await reader.read()
        writer.close()
    assert raw.count(b"word") == 20_000
    assert raw.count(b"data: ") < 20_000
