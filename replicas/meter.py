"""The demand for one service, measured from the board's counters tick by tick."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from replicas.autoscaler import QPS_WINDOW
from replicas.board import Board
from replicas.lifecycle import Replica


class Meter:
    """Mutable: written by `read`, once per tick. Times are unix seconds."""

    def __init__(self, now: float) -> None:
        self.waiting = 0
        self.in_flight: dict[str, int] = {}  # by replica id
        self.arrived = 0  # since the last tick
        self.asked_at = now  # last time anybody waited or arrived; a restart counts as such, not to be hasty
        self.active_at = now  # last completion, or last time anything waited or was in flight
        self._arrivals: deque[tuple[float, int]] = deque()
        self._seen: tuple[int, int] | None = None  # arrived, ended

    def __repr__(self) -> str:
        return f"<Meter waiting={self.waiting} in-flight={sum(self.in_flight.values())} qps={self.qps:.2f}>"

    @property
    def qps(self) -> float:
        """Arrivals per second over the last minute."""
        return sum(n for _, n in self._arrivals) / QPS_WINDOW

    def read(self, board: Board, index: int | None, replicas: Iterable[Replica], now: float) -> None:
        """`index`: the service's row on the board; None = it has none (a service that is not served any
        more)."""
        self.in_flight = {r.id: board.in_flight(r.slot) for r in replicas}
        arrived, ended, waiting = board.totals(index)[:3] if index is not None else (0, 0, 0)
        before = self._seen or (arrived, ended)
        self._seen, self.waiting = (arrived, ended), waiting
        self.arrived = max(0, arrived - before[0])  # a dead worker's row starts at zero again
        if self.arrived:
            self._arrivals.append((now, self.arrived))
        while self._arrivals and now - self._arrivals[0][0] >= QPS_WINDOW:
            self._arrivals.popleft()
        if self.arrived or waiting:
            self.asked_at = now
        if ended > before[1] or waiting or any(self.in_flight.values()):
            self.active_at = now
