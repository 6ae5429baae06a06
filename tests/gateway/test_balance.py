"""Least queue depth over two worker processes, read from the log of 2,000 dispatches.

Two processes cannot choose at one instant, and no log can say in which order overlapping things happened. So
this one has the moments before and after each count: what lies outside another's moments is certain, what
overlaps may be either way. Nothing is asserted of what may be either way.
"""

from __future__ import annotations

import asyncio
import json
import random
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from replicas.simulator import SimConfig, Simulator

from .conftest import chat, eventually
from .worker_process import Gateway

WORKERS = 2
REQUESTS = 2000
CLIENTS = 32  # at one time; fewer than the windows hold
SLACK = 1000  # ns: a store may reach another processor that much after it was made

Moments = tuple[int, int]


@dataclass(frozen=True)
class Dispatch:
    """One line of the log: monotonic_ns before and after the counting, and before and after its end."""

    worker: int
    replica: str
    counted: Moments
    released: Moments


class Column:
    """What happened at one replica."""

    def __init__(self, dispatches: list[Dispatch]) -> None:
        self.started = [sorted(d.counted[edge] for d in dispatches) for edge in (0, 1)]
        self.finished = [sorted(d.released[edge] for d in dispatches) for edge in (0, 1)]

    def least(self, at: Moments) -> int:
        """The lowest depth that could be read within `at`."""
        return bisect_left(self.started[1], at[0] - SLACK) - bisect_right(self.finished[0], at[1] + SLACK)

    def most(self, at: Moments) -> int:
        """The highest."""
        return bisect_right(self.started[0], at[1] + SLACK) - bisect_left(self.finished[1], at[0] - SLACK)

    def depth(self, now: int) -> int:
        """The depth just before `now`, by the moments after each count."""
        return bisect_left(self.started[1], now) - bisect_left(self.finished[1], now)

    def changes(self, at: Moments) -> int:
        """How many counts overlap `at`."""
        began = bisect_right(self.started[0], at[1] + SLACK) + bisect_right(self.finished[0], at[1] + SLACK)
        ended = bisect_left(self.started[1], at[0] - SLACK) + bisect_left(self.finished[1], at[0] - SLACK)
        return began - ended


def judge(
    dispatches: list[Dispatch], replicas: tuple[str, ...]
) -> tuple[list[Dispatch], list[tuple[int, int]]]:
    """Those that surely went to a replica that was not the least; and of each its excess over the minimum
    when it was counted, with the number of others' counts that overlap its own."""
    columns = {r: Column([d for d in dispatches if d.replica == r]) for r in replicas}
    wrong, excesses = [], []
    for d in dispatches:
        mine = columns[d.replica].least(d.counted)
        if any(mine > columns[r].most(d.counted) for r in replicas if r != d.replica):
            wrong.append(d)
        depths = {r: column.depth(d.counted[1]) for r, column in columns.items()}
        overlaps = sum(column.changes(d.counted) for column in columns.values()) - 1  # less its own
        excesses.append((depths[d.replica] - min(depths.values()), overlaps))
    return wrong, excesses


def read(log: Path) -> list[Dispatch]:
    entries: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    assert {entry["end"] for entry in entries} == {"complete"}
    assert {entry["attempts"] for entry in entries} == {1}
    return [
        Dispatch(e["worker"], e["replica"], tuple(e["counted_ns"]), tuple(e["released_ns"])) for e in entries
    ]


class Client:
    """One keep-alive connection, one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, body: bytes) -> None:
        self.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if length:
            await self.reader.readexactly(int(length))
        else:
            await self.reader.readuntil(b"\r\n0\r\n\r\n")


async def test_every_dispatch_of_two_processes_goes_to_the_least_loaded_replica(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    rng = random.Random(20)
    bodies = iter(
        [
            json.dumps(chat(max_tokens=rng.randint(1, 40), stream=rng.random() < 0.3)).encode()
            for _ in range(REQUESTS)
        ]
    )

    async def work(url: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        client = Client(reader, writer)
        for body in bodies:
            await client.ask(body)
        writer.close()
        await writer.wait_closed()

    async with (
        Simulator(SimConfig(reply="word " * 50)) as one,
        Simulator(SimConfig(reply="word " * 50)) as two,
        Gateway(tmp_path, WORKERS, {"access_log": str(log)}) as gateway,
    ):
        await gateway.listen()
        await gateway.publish(one.url, two.url)
        urls = [gateway.processes[number % WORKERS].url for number in range(CLIENTS)]
        await asyncio.gather(*map(work, urls))
        await eventually(lambda: gateway.board.totals(0).ended == REQUESTS)
        assert one.stats.runs_total + two.stats.runs_total == REQUESTS
        for process in gateway.processes:
            process.terminate()
            assert await process.exit_code() == 0
    dispatches = read(log)
    assert len(dispatches) == REQUESTS
    assert {d.worker for d in dispatches} == set(range(WORKERS))
    wrong, excesses = judge(dispatches, ("up-0", "up-1"))
    assert wrong == []
    for excess, overlaps in excesses:
        # One count of another worker between the look and the count: one too many. (Two fit in only where the
        # operating system stops this worker between the two.)
        assert excess <= max(0, overlaps)
    undisturbed = [excess for excess, overlaps in excesses if overlaps <= WORKERS - 1]
    assert max(undisturbed) <= WORKERS - 1
    assert len(undisturbed) > REQUESTS / 2, "or the log proves little"


def spread(choice: Any) -> list[Dispatch]:
    """A made-up log: two workers that never overlap; each request takes the time of twelve arrivals."""
    ends: dict[str, list[int]] = {"a": [], "b": []}
    made = []
    for number in range(400):
        now = number * 10_000
        depths = {r: sum(end > now for end in column) for r, column in ends.items()}
        replica = choice(depths)
        end = now + 120_000 + number % 7 * 1_001
        ends[replica].append(end)
        made.append(Dispatch(number % 2, replica, (now, now + 100), (end, end + 100)))
    return made


def test_the_judge_passes_the_right_choice() -> None:
    wrong, excesses = judge(spread(lambda depths: min(depths, key=depths.__getitem__)), ("a", "b"))
    assert wrong == []
    assert {excess for excess, _ in excesses} == {0}


@pytest.mark.parametrize("pick", ["random", "always the first"])
def test_the_judge_finds_wrong_choices(pick: str) -> None:
    rng = random.Random(1)
    made = spread(lambda depths: rng.choice("ab") if pick == "random" else "a")
    wrong, excesses = judge(made, ("a", "b"))
    assert len(wrong) > 50
    assert max(excess for excess, _ in excesses) > 2
