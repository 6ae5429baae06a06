"""What happened to each request: the proof that nothing ran twice. Only the simulator has it (GET
/sim/stats; `--journal FILE`, which a killed process leaves behind).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, deque
from typing import Any

from .answers import Answer

LOG_ENTRIES = 20_000


class Stats:
    """Counts since the start. `requests` and `markers` tell how often a rid or a client's marker reached
    the engine.

    `journal`: a file that gets a line `WHAT MARKER NANOSECONDS` at once (CLOCK_MONOTONIC) when a request that
    has a marker goes into the engine (`run`) and its first byte was sent (`byte`).
    """

    def __init__(self, journal: str | None = None) -> None:
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if journal else None
        self.requests: Counter[str] = Counter()
        self.markers: Counter[str] = Counter()
        self.runs_total = 0
        self.refused = 0  # for a full queue
        self.aborted: list[str] = []  # rids that the engine was told to drop
        self.disconnected: list[str] = []  # rids whose client left before the end
        self.abort_calls: list[str] = []  # what POST /abort_request was asked for
        self.log: deque[dict[str, Any]] = deque(maxlen=LOG_ENTRIES)
        self.running = 0
        self.queued = 0

    def __repr__(self) -> str:
        levels = f"running={self.running} queued={self.queued} refused={self.refused}"
        return f"<Stats runs={self.runs_total} {levels}>"

    def arrived(self, answer: Answer) -> None:
        """It goes into the engine's queue."""
        self.runs_total += 1
        self.requests[answer.rid] += 1
        if answer.marker is not None:
            self.markers[answer.marker] += 1
        self._note("run", answer)

    def answering(self, answer: Answer) -> None:
        """Its first byte was written. Noted when it was sent, which uvloop does once the callbacks of this
        turn have run: by then a cut may have thrown it away.
        """
        if self._journal is not None:
            asyncio.get_running_loop().call_soon(self._sent, answer)

    def _sent(self, answer: Answer) -> None:
        if not answer.exchange.connection.was_cut:
            self._note("byte", answer)

    def _note(self, what: str, answer: Answer) -> None:
        if self._journal is not None and answer.marker is not None:
            os.write(self._journal, f"{what} {answer.marker} {time.monotonic_ns()}\n".encode())

    def ended(self, answer: Answer, end: str) -> None:
        """One line of the log, written when the request is over. Times are CLOCK_MONOTONIC, nanoseconds."""
        self.log.append(
            {
                "rid": answer.rid,
                "marker": answer.marker,
                "path": answer.ask.path,
                "stream": answer.ask.stream,
                "prompt_tokens": sum(answer.ask.prompts),
                "tokens": answer.generated,
                "end": end,
                "arrived_ns": answer.arrived_ns,
                "first_ns": answer.first_ns,
                "finished_ns": answer.finished_ns,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The body of GET /sim/stats."""
        return {
            "requests": dict(self.requests),
            "markers": dict(self.markers),
            "runs_total": self.runs_total,
            "refused": self.refused,
            "aborted": list(self.aborted),
            "disconnected": list(self.disconnected),
            "abort_calls": list(self.abort_calls),
            "running": self.running,
            "queued": self.queued,
            "log": list(self.log),
        }
