"""Cold starts of one service: the phases of those under way, and how long those of the past took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from replicas import plans
from replicas.health import estimate
from replicas.lifecycle import Replica
from replicas.phases import PHASES

TOTAL = "total"  # beside the phases: from the decision to READY
# s; a start that went on while no controller ran (or while this machine slept) is watched for so long before
# it is called too late: what became ready meanwhile must not be ended for it.
WATCHED_LEAST: Final = 60.0
SLEPT: Final = 120.0  # s between two ticks


class ColdStarts:
    """Mutable: the history, the finished phases of each start under way (those before a restart are lost),
    and since when somebody has watched."""

    def __init__(self, history: Iterable[tuple[str, float, str]], now: float) -> None:
        self.history = list(history)  # (phase, seconds, the plan's name), oldest first
        self.watched_since = self._watched_at = now
        self._passed: dict[str, list[tuple[str, float]]] = {}  # by replica id

    def __repr__(self) -> str:
        return f"<ColdStarts past={len(self.history)} under way={sorted(self._passed)}>"

    @property
    def last_total(self) -> float:
        """Seconds that the last cold start took; 0 without any."""
        return next((seconds for phase, seconds, _ in reversed(self.history) if phase == TOTAL), 0.0)

    def watch(self, now: float) -> None:
        """A tick looks."""
        if now - self._watched_at > SLEPT:
            self.watched_since = now
        self._watched_at = now

    def watched(self, now: float, most: float) -> bool:
        """Whether somebody has watched for long enough (`most` seconds are always enough) to call a start
        late."""
        return now - self.watched_since >= min(most, WATCHED_LEAST)

    def phase(self, r: Replica, phase: str, progress: float | None, now: float) -> Replica:
        """The replica is in this phase, so far."""
        if phase == r.phase:
            return r if progress == r.progress else replace(r, progress=progress)
        self._end(r, now)
        return replace(r, phase=phase, phase_since=now, progress=progress)

    def ready(self, r: Replica, now: float) -> dict[str, float]:
        """Seconds per phase, and `total`, of the start that has just succeeded; they join the history. None
        of one that began unwatched: the time until somebody looked again is no estimate for the next."""
        self._end(r, now)
        if r.created_at < self.watched_since:
            self._passed.pop(r.id, None)
            return {}
        times: dict[str, float] = {}
        for phase, seconds in self._passed.pop(r.id, []):
            times[phase] = times.get(phase, 0.0) + seconds
        times[TOTAL] = now - r.created_at
        self.history += [(phase, seconds, r.plan) for phase, seconds in times.items()]
        return times

    def forget(self, id: str) -> None:
        self._passed.pop(id, None)

    def eta(self, r: Replica, now: float) -> float | None:
        """Seconds until READY, from past starts on the same hardware (spot or not is the same); None without
        any."""
        elapsed = now - (r.created_at if r.phase_since is None else r.phase_since)
        ours = plans.read(r.plan).hardware
        same = [(phase, s) for phase, s, plan in self.history if plans.read(plan).hardware == ours]
        return estimate(same, PHASES, r.phase, elapsed)

    def _end(self, r: Replica, now: float) -> None:
        if r.phase is not None and r.phase_since is not None:
            self._passed.setdefault(r.id, []).append((r.phase, now - r.phase_since))
