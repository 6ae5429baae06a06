"""What happened to each request: the proof that nothing ran twice. Only the simulator has it (GET
/sim/stats).
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from .answers import Answer

LOG_ENTRIES = 20_000


class Stats:
    """Counts since the start. `requests` and `markers` tell how often a rid or a client's marker reached
    the engine.
    """

    def __init__(self) -> None:
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
