"""Everything that can go wrong on demand."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from replicas.simulator import SimConfig, Simulator
from replicas.simulator.faults import AT_RUN_TIME, KINDS, FaultError, Faults
from replicas.simulator.stats import Stats

END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


async def test_a_crash_in_mid_stream_is_a_silence_and_then_eof_without_an_end(chat, until):
    async with Simulator(SimConfig(faults=("crash-after=3",), crash_silence=0.2)) as sim:
        response = await chat(sim.port, stream=True, max_tokens=50)
        assert len(response.events) == 1 + 3
        assert END not in response.raw
        with pytest.raises(OSError, match="Connect"):
            await asyncio.open_connection("127.0.0.1", sim.port)
    assert [entry["end"] for entry in sim.stats.log] == ["crashed"]


async def test_in_the_silence_before_the_end_connections_are_accepted_and_nothing_is_answered(ask, body):
    async with Simulator() as sim:
        death = asyncio.ensure_future(sim.crash(silence=0.3))
        await asyncio.sleep(0)
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(ask("GET", "/health"))
        assert await reader.read() == b""
        await death
        writer.close()


async def test_a_crashed_server_can_be_opened_again_on_its_port(chat):
    async with Simulator() as sim:
        port = sim.port
        await sim.crash()
        await sim.open()
        assert sim.port == port
        assert (await chat(port, max_tokens=1)).status == 200


async def test_a_hang_stops_the_tokens_and_resuming_goes_on_with_them(ask, body, until, get):
    async with Simulator(SimConfig(faults=("hang-after=3",))) as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(ask("POST", "/v1/chat/completions", body(stream=True, max_tokens=5)))
        await until(lambda: sim.hung)
        assert sim.engine.running[0].generated == 3
        await get(sim.port, "POST", "/sim/fault", {"kind": "resume"})
        assert (await reader.read()).endswith(END)
        writer.close()


async def test_the_second_request_hangs(chat, until):
    async with Simulator(SimConfig(faults=("hang-after-requests=1",))) as sim:
        assert (await chat(sim.port, max_tokens=1)).status == 200
        second = asyncio.ensure_future(chat(sim.port, max_tokens=1))
        await until(lambda: sim.hung)
        sim.resume()
        assert (await second).status == 200


async def test_it_crashes_once_that_many_requests_are_answered(chat):
    async with Simulator(SimConfig(faults=("crash-after-requests=2",), crash_silence=0.0)) as sim:
        for _ in range(2):
            assert (await chat(sim.port, max_tokens=1)).status == 200
        await sim.closed.wait()


async def test_a_torn_stream_ends_within_a_chunk_and_the_next_one_is_whole(chat, get):
    async with Simulator() as sim:
        await get(sim.port, "POST", "/sim/fault", {"kind": "tear"})
        response = await chat(sim.port, stream=True, max_tokens=50)
        before, _, half = response.raw.rpartition(b"\r\n")
        assert 0 < len(half) < int(before.rpartition(b"\r\n")[2], 16)
        assert END in (await chat(sim.port, stream=True, max_tokens=5)).raw


async def test_the_journal_tells_of_each_run_and_of_its_first_byte_as_they_happen(chat, tmp_path):
    journal = tmp_path / "journal"
    async with Simulator(SimConfig(journal=str(journal), faults=("drop=1",))) as sim:
        for user in ("dropped", "plain"):
            await chat(sim.port, max_tokens=2, user=user)
        await chat(sim.port, max_tokens=2, user="stream", stream=True)
    lines = [line.split() for line in journal.read_text().splitlines()]
    assert [line[:2] for line in lines] == [
        ["run", "plain"], ["byte", "plain"], ["run", "stream"], ["byte", "stream"],
    ]  # fmt: skip
    assert [int(line[2]) for line in lines] == sorted(int(line[2]) for line in lines)


async def test_the_journal_has_no_byte_that_a_cut_threw_away(ask, body, until, tmp_path):
    journal = tmp_path / "journal"

    class CutAtOnce(Stats):
        def answering(self, answer):
            super().answering(answer)
            answer.exchange.connection.cut(reset=True)

    async with Simulator() as sim:
        sim.stats = CutAtOnce(str(journal))
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(ask("POST", "/v1/chat/completions", body(user="cut", stream=True, max_tokens=5)))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
    assert [line.split()[:2] for line in journal.read_text().splitlines()] == [["run", "cut"]]


async def test_dropped_requests_are_closed_without_a_byte_and_never_run(chat, get):
    async with Simulator() as sim:
        await get(sim.port, "POST", "/sim/fault", {"kind": "drop", "count": 2})
        assert [(await chat(sim.port)).raw for _ in range(2)] == [b"", b""]
        assert (await chat(sim.port, max_tokens=1)).status == 200
    assert sim.stats.runs_total == 1


async def test_requests_are_refused_as_if_the_queue_were_full(chat, get):
    async with Simulator() as sim:
        await get(sim.port, "POST", "/sim/fault", {"kind": "queue-full"})
        assert (await chat(sim.port)).status == 503
        assert (await chat(sim.port, max_tokens=1)).status == 200


async def test_every_other_connection_is_reset(ask, body, get, until):
    async with Simulator() as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(
            ask("POST", "/v1/chat/completions", body(stream=True, max_tokens=100_000, ignore_eos=True))
        )
        await reader.readuntil(b"data: ")
        assert (await get(sim.port, "POST", "/sim/fault", {"kind": "reset"})).json == {"ok": "reset"}
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        await until(lambda: sim.stats.running == 0)


async def test_unhealthy_is_503_while_requests_are_served(chat, get):
    async with Simulator(SimConfig(health_seconds=0.0)) as sim:
        await get(sim.port, "POST", "/sim/fault", {"kind": "unhealthy"})
        assert (await get(sim.port, "GET", "/health")).status == 503
        assert (await chat(sim.port, max_tokens=1)).status == 200
        await get(sim.port, "POST", "/sim/fault", {"kind": "healthy"})
        assert (await get(sim.port, "GET", "/health")).status == 200


async def test_slow_makes_every_step_longer(chat):
    async with Simulator(SimConfig(faults=("slow=100",))) as sim:
        await chat(sim.port, max_tokens=2)
    entry = sim.stats.log[0]
    assert entry["finished_ns"] - entry["first_ns"] >= 0.09e9


async def test_draining_says_503_on_health_serves_on_and_closes_when_nothing_is_left(ask, body, get, chat):
    async with Simulator(SimConfig(drain_tick=0.01)) as sim:
        reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
        writer.write(ask("POST", "/v1/chat/completions", body(stream=True, max_tokens=300, ignore_eos=True)))
        await reader.readuntil(b"data: ")
        drained = asyncio.ensure_future(sim.drain())
        await asyncio.sleep(0)
        assert [(await get(sim.port, "GET", path)).status for path in ("/health", "/ready")] == [503, 503]
        assert (await get(sim.port, "GET", "/v1/models")).status == 200
        assert (await chat(sim.port, max_tokens=1)).status == 200
        assert (await reader.read()).endswith(END)
        await drained
        writer.close()


@pytest.mark.parametrize(
    ("body", "words"),
    [({"kind": "meteor"}, "no fault 'meteor'"), ({"kind": "crash-after"}, "needs a number"), ({}, "wanted")],
)
async def test_an_unknown_fault_is_refused_with_what_there_is(body, words, get):
    async with Simulator() as sim:
        response = await get(sim.port, "POST", "/sim/fault", body)
    assert response.status == 400
    assert words in response.json["detail"]


@pytest.mark.parametrize("text", ["meteor", "crash-after", "crash-after=soon"])
def test_a_fault_that_cannot_be_read_is_named(text):
    with pytest.raises(FaultError, match=text.partition("=")[0]):
        Faults.parse((text,))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(AT_RUN_TIME)))
def test_a_kind_can_be_given_at_start(kind):
    Faults.parse((f"{kind}=1",))


@pytest.mark.parametrize("kind", AT_RUN_TIME)
def test_what_happens_at_once_cannot_be_given_at_start(kind):
    with pytest.raises(FaultError, match="POST /sim/fault only"):
        Faults.parse((kind,))
