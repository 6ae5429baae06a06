"""Load reports over real sockets, onto a real board."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from replicas.board import Board
from replicas.loads import Load, LoadPoller, LoadTarget, read, until_next
from replicas.polling import Answer

# GET /v1/loads?include=core of SGLang 0.5.23, as recorded, with one request running and two waiting
RECORDED = (
    '{"timestamp":"2026-11-24T05:12:31.847700+00:00","version":"0.5.23","accelerator":null,"num_accelerators":1,'
    '"loads":[{"timestamp":1795497151.84761,"dp_rank":0,"num_running_reqs":1,"num_waiting_reqs":2,'
    '"num_used_tokens":0,"max_total_num_tokens":20000,"max_running_requests":4,"token_usage":0.0}]}'
)
SLOT = 3


class Replica:
    """Answers every request with `status` and `body`, and counts."""

    def __init__(self) -> None:
        self.status, self.body = 200, RECORDED
        self.requests: list[bytes] = []
        self.url = ""

    def report(self, *, running: int, waiting: int = 0, stamp: float = 1.0) -> None:
        rank = {"num_running_reqs": running, "num_waiting_reqs": waiting, "timestamp": stamp}
        self.body = json.dumps({"loads": [{**rank, "max_running_requests": 8}]})

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                body = self.body.encode()
                writer.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (self.status, len(body)) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


class Rig:
    def __init__(self, board: Board, replica: Replica) -> None:
        self.board, self.replica = board, replica
        self.changes = 0
        self.now = 1000.0
        self.poller = LoadPoller(board, self.changed, window_max=64, clock=lambda: self.now)

    def changed(self) -> None:
        self.changes += 1

    def keep(self) -> None:
        self.poller.keep({"a": LoadTarget(self.replica.url, SLOT, "k3y")})

    async def until(self, true: Callable[[Load], bool]) -> Load:
        async with asyncio.timeout(10):
            while (found := self.poller.results.get("a")) is None or not true(found):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return found

    async def polls(self, n: int) -> None:
        """`n` more polls have been asked for and stored."""
        before = len(self.replica.requests)
        async with asyncio.timeout(10):
            while len(self.replica.requests) < before + n + 1:  # noqa: ASYNC110 (the next one is after the store)
                await asyncio.sleep(0.005)

    @property
    def foreign(self) -> int:
        return self.board.cells[self.board.foreign + SLOT]


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr("replicas.loads.EVERY", 0.01)
    replica = Replica()
    server = await asyncio.start_server(replica.serve, "127.0.0.1", 0)
    replica.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with Board.create(tmp_path / "load.board", 1) as board:
        rig = Rig(board, replica)
        yield rig
        await rig.poller.close()
    server.close()


async def test_the_depth_that_is_not_ours_and_the_window_go_to_the_board(rig: Rig) -> None:
    rig.board.cells[rig.board.worker(0).started + SLOT] = 1
    rig.keep()
    assert rig.board.cells[rig.board.window + SLOT] == 16  # until it is known
    load = await rig.until(lambda load: load.supported is True)
    assert (load.running, load.depth, load.max_running, load.foreign) == (1, 3, 4, 2)
    assert rig.foreign == 2
    assert rig.board.cells[rig.board.window + SLOT] == 4
    assert rig.board.cells[rig.board.polled + SLOT] > 0
    assert rig.changes == 1
    assert rig.replica.requests[0].startswith(b"GET /v1/loads?include=core HTTP/1.1")
    assert b"bearer k3y" in rig.replica.requests[0].lower()


async def test_our_own_requests_are_not_foreign(rig: Rig) -> None:
    rig.board.cells[rig.board.worker(0).started + SLOT] = 9
    rig.keep()
    await rig.until(lambda load: load.depth == 3)
    assert rig.foreign == 0


async def test_one_report_that_still_shows_an_ended_request_adds_no_depth(rig: Rig) -> None:
    rig.replica.report(running=0)
    rig.keep()
    await rig.polls(2)
    rig.replica.report(running=5)
    seen: list[int] = []
    async with asyncio.timeout(10):
        while rig.foreign == 0:
            seen.append(rig.poller.results["a"].depth)
            await asyncio.sleep(0)
    assert rig.foreign == 5  # two reports say so
    assert 5 in seen  # the first alone did not


async def test_the_report_of_a_frozen_scheduler_stands_still(rig: Rig) -> None:
    rig.replica.report(running=1, stamp=7.0)
    rig.keep()
    await rig.until(lambda load: load.stamp == 7.0)
    rig.now = 2000.0
    assert (await rig.until(lambda load: load.at == 2000.0)).stamp_at == 1000.0
    rig.replica.report(running=1, stamp=8.0)
    assert (await rig.until(lambda load: load.stamp == 8.0)).stamp_at == 2000.0


async def test_a_server_without_load_reports_gets_the_full_window(rig: Rig) -> None:
    rig.replica.status, rig.replica.body = 404, "{}"
    rig.keep()
    await rig.until(lambda load: load.supported is False)
    assert rig.poller.window("a") == 64
    assert rig.board.cells[rig.board.window + SLOT] == 64
    assert rig.board.cells[rig.board.polled + SLOT] == 0


async def test_an_error_or_nonsense_changes_nothing(rig: Rig) -> None:
    rig.replica.status = 503
    rig.keep()
    await rig.polls(1)
    rig.replica.status, rig.replica.body = 200, "<html>"
    await rig.polls(1)
    assert rig.poller.results == {}
    assert rig.poller.window("a") == 16
    rig.replica.body = RECORDED
    await rig.until(lambda load: load.supported is True)


async def test_a_dead_replica_is_polled_on_without_noise(rig: Rig) -> None:
    rig.replica.url = "http://127.0.0.1:1"
    rig.keep()
    await asyncio.sleep(0.1)
    assert rig.poller.results == {}


async def test_a_replica_that_is_not_kept_is_forgotten(rig: Rig) -> None:
    rig.keep()
    await rig.until(lambda load: load.supported is True)
    rig.poller.keep({})
    assert rig.poller.results == {}
    assert repr(rig.poller) == "<LoadPoller of 0>"
    assert "k3y" not in repr(LoadTarget("http://x", 1, "k3y"))


@pytest.mark.parametrize("now", [0.0, 0.2, 0.5, 0.51, 7.999, 123456.75])
def test_all_replicas_are_polled_in_the_same_moments_none_twice_at_once(now: float) -> None:
    wait = until_next(1.0, now)
    assert round(now + wait, 6) % 1.0 == 0.0
    assert 0.5 <= wait < 1.5


def response(body: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(body).encode())


def test_all_ranks_of_a_replica_are_added_up() -> None:
    rank = {"num_running_reqs": 3, "num_waiting_reqs": 1, "max_running_requests": 8, "timestamp": 5.0}
    report = read(response({"loads": [rank, {**rank, "timestamp": 9.0}]}))
    assert report == Load(running=6, depth=8, max_running=16, stamp=9.0)


@pytest.mark.parametrize(
    "body", [{}, [], {"loads": [{}]}, {"loads": None}, {"loads": [{"num_running_reqs": "x"}]}]
)
def test_what_is_no_report_is_none(body: Any) -> None:
    assert read(response(body)) is None
    assert read(response({"loads": []}, 503)) is None


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"loads": [{"num_running_reqs":1e999,"num_waiting_reqs":0}]}']
)
def test_an_answer_that_no_parser_takes_is_none(text: str) -> None:
    assert read(Answer(200, text.encode())) is None


def test_an_unknown_limit_stays_unknown() -> None:
    rank = {"num_running_reqs": 0, "num_waiting_reqs": 0}
    assert read(response({"loads": [rank]})) == Load()


def test_the_speed_is_that_of_all_ranks_while_requests_run_and_none_where_it_is_not_told() -> None:
    def speed(running: int, *speeds: float | None) -> float | None:
        ranks = [
            {"num_running_reqs": running, "num_waiting_reqs": 0, "timestamp": 1.0, "gen_throughput": speed}
            for speed in speeds
        ]
        load = read(response({"loads": ranks}))
        assert load is not None
        return load.generation

    assert speed(1, 11.5, 20.0) == 31.5
    assert speed(0, 11.5) == 0.0   # SGLang goes on to report its last batch
    assert speed(1, None) is None


@pytest.mark.parametrize("name", ["num_running_reqs", "num_waiting_reqs", "max_running_requests"])
async def test_a_count_past_all_bounds_is_no_report_and_the_next_poll_comes(rig: Rig, name: str) -> None:
    ranks = [{"num_running_reqs": 1, "num_waiting_reqs": 2, "max_running_requests": 4} | {name: 10**30}]
    rig.replica.body = json.dumps({"loads": ranks})
    rig.keep()
    await rig.polls(2)
    assert rig.poller.results == {}
    rig.replica.body = RECORDED
    await rig.until(lambda load: load.supported is True)


@pytest.mark.parametrize("name", ["gen_throughput", "timestamp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_no_report(name: str, value: float) -> None:
    assert read(response({"loads": [{"num_running_reqs": 1, "num_waiting_reqs": 0, name: value}]})) is None
