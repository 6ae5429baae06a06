"""Readiness probes: one task per replica, which asks as the YAML says and remembers what the answers were.

Success is 200 and nothing else, as for SkyServe. The interval is the YAML's, but 1 s at most while a replica
starts (a client is waiting for this very answer) and after a failed probe (so that two in a row are soon
seen).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from replicas.polling import Client, PollError
from replicas.schema import ReadinessProbe

log = logging.getLogger(__name__)

EAGER: Final = 1.0  # s between probes of a replica that starts or has just failed one
AT_ONCE: Final = 5.0  # s; SGLang's 503 of a draining or starting server comes in milliseconds
TIMEOUT_LEAST: Final = 25.0  # s; SGLang's /health takes 1.0 s when well, 20.0 s to say 503 when frozen


@dataclass(frozen=True, slots=True)
class ProbeTarget:
    """Whom to ask, and how."""

    url: str
    probe: ReadinessProbe
    interval: float  # s
    eager: bool = False  # it starts: ask each second
    key: str | None = None  # sent as `Authorization: Bearer`, unless the YAML's headers say otherwise
    context: ssl.SSLContext | None = None  # how an https:// URL is verified (replicas/tls.py)

    def __repr__(self) -> str:  # never the key
        return f"<ProbeTarget {self.url}{self.probe.path}>"


@dataclass(frozen=True, slots=True)
class Probed:
    """What the probes of one replica have said. Times are unix seconds."""

    ok_at: float | None = None  # the last 200
    failures: int = 0  # in a row
    failing_since: float | None = None  # the first of them
    error: str = ""  # what the last failed one said
    turned_away: bool = False  # the last one was answered 503 within AT_ONCE


class Prober:
    """Probes whatever `keep` was last told. `results` is for reading; only the tasks in here write it.

    `on_change` is called after each result that says something new: the first, a success after a failure, and
    the first failures in a row.
    """

    def __init__(self, on_change: Callable[[], None], *, clock: Callable[[], float] = time.time) -> None:
        self.results: dict[str, Probed] = {}
        self._on_change = on_change
        self._clock = clock
        self._targets: dict[str, ProbeTarget] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._now: dict[str, asyncio.Event] = {}

    def __repr__(self) -> str:
        return f"<Prober of {len(self._tasks)}>"

    def keep(self, targets: Mapping[str, ProbeTarget]) -> None:
        """Probe exactly these replicas from now on. One whose target changed keeps its results."""
        for id in [id for id in self._tasks if id not in targets]:
            self._tasks.pop(id).cancel()
            del self._targets[id], self._now[id]
            self.results.pop(id, None)
        for id, target in targets.items():
            if self._targets.get(id) == target:
                continue
            self._targets[id] = target
            if id in self._tasks:
                self._now[id].set()
            else:
                self._now[id] = asyncio.Event()
                self._tasks[id] = asyncio.create_task(self._probe(id), name=f"probe {id}")

    def soon(self, id: str) -> None:
        """Probe this one at once: a worker could not connect to it, or its machine is not listed any more."""
        if id in self._now:
            self._now[id].set()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self.keep({})
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _probe(self, id: str) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.closing(Client()) as client:
            while True:
                target, now = self._targets[id], self._now[id]
                now.clear()
                asked = self._clock()
                error = await self._ask(client, target)
                self._store(id, error, self._clock() - asked)
                hurry = target.eager or error is not None
                timer = loop.call_later(min(EAGER, target.interval) if hurry else target.interval, now.set)
                try:
                    await now.wait()
                finally:
                    timer.cancel()

    async def _ask(self, client: Client, target: ProbeTarget) -> str | None:
        """None = 200; else what was wrong, in a few words."""
        probe = target.probe
        headers = {"authorization": f"Bearer {target.key}"} if target.key else {}
        headers |= {name.lower(): value for name, value in probe.headers.items()}
        data = probe.post_data
        try:
            answer = await client.ask(
                target.url + probe.path,
                within=max(probe.timeout_seconds, TIMEOUT_LEAST),
                context=target.context,
                headers=headers,
                body=None if data is None else json.dumps(data, separators=(",", ":")).encode(),
            )
        except PollError as error:
            return str(error)
        return None if answer.status == 200 else f"HTTP {answer.status}"

    def _store(self, id: str, error: str | None, took: float) -> None:
        before, now = self.results.get(id), self._clock()
        old = before or Probed()
        if error is None:
            self.results[id] = Probed(ok_at=now)
        else:
            since = now if old.failing_since is None else old.failing_since
            self.results[id] = replace(
                old,
                failures=old.failures + 1,
                failing_since=since,
                error=error,
                turned_away=error == "HTTP 503" and took < AT_ONCE,
            )
        if before is None or (error is None) != (old.failures == 0) or self.results[id].failures in (1, 2):
            self._on_change()
