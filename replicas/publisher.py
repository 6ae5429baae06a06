"""What the workers are told: a generation whenever something changed that they act upon, and how far the cold
starts are in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from replicas import report
from replicas.board import Board
from replicas.messages import ColdStart, ServiceInfo, Snapshot, WorkerState
from replicas.slots import Slots
from replicas.table import Table


class Control(Protocol):
    """The controller's end of the control socket (replicas/control.py: ControlServer)."""

    workers: dict[int, WorkerState]

    def publish(self, snapshot: Snapshot) -> None: ...
    def progress(self, service: str, cold: ColdStart | None) -> None: ...


class Publisher:
    """Mutable, by the controller: the last generation, which the table remembers, and what was in it.

    `slots`: which follow from the generations that the workers have acked.
    """

    def __init__(self, table: Table, board: Board, control: Control) -> None:
        self.generation = table.generation
        self.slots = Slots(board, control, self.generation)
        self._table = table
        self._control = control
        self._published: tuple[ServiceInfo, ...] | None = None
        self._progressed: dict[str, ColdStart | None] = {}

    def __repr__(self) -> str:
        return f"<Publisher generation={self.generation} {self.slots!r}>"

    def publish(self, infos: Sequence[ServiceInfo]) -> None:
        """A new generation if anything that workers act upon has changed; the progress of cold starts if
        not."""
        still = tuple(map(report.still, infos))
        if still != self._published:
            self._table.generation = self.generation = self.generation + 1
            self._published = still
            self.slots.published(self.generation, {u.slot for i in infos for u in i.upstreams})
            self._progressed = {info.name: info.cold for info in infos}
            self._control.publish(Snapshot(self.generation, tuple(infos)))
            return
        for info in infos:
            before = self._progressed.get(info.name)
            if report.rounded(info.cold) != report.rounded(before):
                self._progressed[info.name] = info.cold
                self._control.progress(info.name, info.cold)
