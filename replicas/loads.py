"""What the replicas say about their own load: `/v1/loads?include=core`, each second, 1.4 ms of an SGLang's
time.

Three things come from it: the *foreign depth* (requests that are not ours) and the *window* go to the board
for the workers; the time at which the report last moved is a sign of life (it stands still when the scheduler
is frozen, while `/v1/loads` goes on answering 200).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from replicas.board import Board
from replicas.polling import Answer, Client, PollError

log = logging.getLogger(__name__)

EVERY: Final = 1.0  # s
EVERY_WITHOUT: Final = 30.0  # s between polls of a server that has no /v1/loads
TIMEOUT: Final = 3.0  # s
UNKNOWN_WINDOW: Final = 16  # requests; until the first report
MOST: Final = 1_000_000_000  # requests; a report that counts more is broken, and fits neither board nor table
SMOOTHED: Final = 2
"""Polls, the least of which counts: a request that has ended may still be in a report (up to 0.4 s old), not
in two."""


@dataclass(frozen=True, slots=True)
class LoadTarget:
    url: str
    slot: int
    key: str | None = None
    context: ssl.SSLContext | None = None  # how an https:// URL is verified (replicas/tls.py)

    def __repr__(self) -> str:  # never the key
        return f"<LoadTarget {self.url} slot={self.slot}>"


@dataclass(frozen=True, slots=True)
class Load:
    """The last report of one replica. Times are unix seconds."""

    running: int = 0
    depth: int = 0  # running + waiting, over all its ranks
    foreign: int = 0  # of `depth`, requests that this gateway did not send
    max_running: int | None = None  # over all its ranks; None = it does not say
    generation: float | None = None  # tokens per second, over all its ranks; None = it does not say
    stamp: float | None = None  # its newest loads[].timestamp, by its own clock
    stamp_at: float | None = None  # when that last moved, by ours
    at: float | None = None  # last good poll
    supported: bool | None = None  # False: no /v1/loads there (404); None: not known yet


class LoadPoller:
    """Polls whatever `keep` was last told. `results` is for reading; `on_change` follows a newly learned
    window."""

    def __init__(
        self,
        board: Board,
        on_change: Callable[[], None],
        *,
        window_max: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.results: dict[str, Load] = {}
        self._board = board
        self._on_change = on_change
        self._window_max = window_max
        self._clock = clock
        self._targets: dict[str, LoadTarget] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<LoadPoller of {len(self._tasks)}>"

    def keep(self, targets: Mapping[str, LoadTarget]) -> None:
        """Poll exactly these replicas from now on."""
        for id in [id for id, target in self._targets.items() if targets.get(id) != target]:
            self._tasks.pop(id).cancel()
            del self._targets[id]
            self.results.pop(id, None)
        for id, target in targets.items():
            if id not in self._tasks:
                self._targets[id] = target
                self._reset(id, target.slot)
                self._tasks[id] = asyncio.create_task(self._poll(id, target), name=f"loads {id}")

    def window(self, id: str) -> int:
        """How many requests the replica is given at a time.

        Its own limit, `window_max` at most; 16 until it has reported. A server without `/v1/loads` gets
        `window_max`: it is no SGLang of today, so nothing is known of its limit and it must queue by itself
        anyhow.
        """
        load = self.results.get(id, Load())
        if load.max_running is not None:
            return max(1, min(load.max_running, self._window_max))
        return self._window_max if load.supported is False else min(UNKNOWN_WINDOW, self._window_max)

    def _reset(self, id: str, slot: int) -> None:
        cells = self._board.cells
        cells[self._board.polled + slot] = cells[self._board.foreign + slot] = 0
        cells[self._board.window + slot] = self.window(id)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self.keep({})
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, id: str, target: LoadTarget) -> None:
        recent: deque[int] = deque(maxlen=SMOOTHED)
        with contextlib.closing(Client()) as client:
            while True:
                before = self._board.in_flight(target.slot)
                reply = await self._ask(client, target)
                if reply is not None:
                    self._store(id, target, reply, before, recent)
                pause = EVERY_WITHOUT if self.results.get(id, Load()).supported is False else EVERY
                await asyncio.sleep(until_next(pause, time.monotonic()))

    async def _ask(self, client: Client, target: LoadTarget) -> Answer | None:
        headers = {"authorization": f"Bearer {target.key}"} if target.key else {}
        url = target.url + "/v1/loads?include=core"
        try:
            return await client.ask(url, within=TIMEOUT, context=target.context, headers=headers)
        except PollError as error:
            log.debug("no load report from %s: %s", target.url, error)
            return None

    def _store(self, id: str, target: LoadTarget, reply: Answer, before: int, recent: deque[int]) -> None:
        old, window = self.results.get(id, Load()), self.window(id)
        if reply.status in (404, 405):
            self.results[id] = replace(old, supported=False)
        elif (report := read(reply)) is not None:
            own = max(before, self._board.in_flight(target.slot))
            recent.append(max(0, report.depth - own))
            foreign, now = min(recent), self._clock()
            moved = report.stamp != old.stamp
            stamp_at = now if moved else old.stamp_at
            self.results[id] = replace(report, foreign=foreign, stamp_at=stamp_at, at=now, supported=True)
            cells, board = self._board.cells, self._board
            cells[board.foreign + target.slot] = foreign
            cells[board.polled + target.slot] = time.monotonic_ns()
        self._board.cells[self._board.window + target.slot] = self.window(id)
        if window != self.window(id):
            self._on_change()


def until_next(pause: float, now: float) -> float:
    """Seconds to the next moment at which replicas are polled, half a pause at least.

    It is the same for all, so that the controller wakes once for them: each wake takes 0.2 ms of its CPU.
    """
    wait = pause - now % pause
    return wait if wait >= pause / 2 else wait + pause


def read(reply: Answer) -> Load | None:
    """The report in an answer; None if it holds none (an error, a warm-up, another program)."""
    if reply.status != 200:
        return None
    try:
        ranks: list[dict[str, Any]] = json.loads(reply.body)["loads"]
        running = sum(int(rank["num_running_reqs"]) for rank in ranks)
        waiting = sum(int(rank["num_waiting_reqs"]) for rank in ranks)
        limits = [int(rank["max_running_requests"]) for rank in ranks if rank.get("max_running_requests")]
        speeds = [float(rank["gen_throughput"]) for rank in ranks if rank.get("gen_throughput") is not None]
        stamps = [float(rank["timestamp"]) for rank in ranks if rank.get("timestamp") is not None]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    counted = max(map(abs, (running, waiting, sum(limits)))) <= MOST
    if not counted or not all(map(math.isfinite, (sum(speeds), *stamps))):
        return None
    return Load(
        running=running,
        depth=running + waiting,
        max_running=sum(limits) if limits and len(limits) == len(ranks) else None,
        # Of the last batches that it told of: it stays when they have ended.
        generation=(sum(speeds) if running else 0.0) if speeds else None,
        stamp=max(stamps, default=None),
    )
