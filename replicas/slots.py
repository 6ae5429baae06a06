"""Which board slots are free, and which replicas no worker can choose any more: both follow from acks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from replicas.board import SLOTS, Board
from replicas.lifecycle import Replica
from replicas.messages import WorkerState


class Acks(Protocol):
    workers: dict[int, WorkerState]


class Slots:
    """Mutable: for each slot, the first generation without it. `generation`: the last one of an earlier run,
    which may have held any slot."""

    def __init__(self, board: Board, control: Acks, generation: int) -> None:
        self._board = board
        self._control = control
        # slot -> the first generation without it
        self._without = dict.fromkeys(range(SLOTS), generation + 1 if generation else 0)
        self._in_use: frozenset[int] = frozenset()
        self._next = 0

    def __repr__(self) -> str:
        return f"<Slots in use={sorted(self._in_use)}>"

    def published(self, generation: int, in_use: Collection[int]) -> None:
        """A generation with these slots goes out."""
        for slot in self._in_use - frozenset(in_use):
            self._without[slot] = generation
        self._in_use = frozenset(in_use)

    def acked(self) -> int | None:
        """The lowest generation that a live worker may still use; None = no worker lives."""
        lowest: int | None = None
        for index, pid in enumerate(self._board.pids()):
            if pid:
                worker = self._control.workers.get(index)
                generation = worker.generation if worker is not None and worker.pid == pid else 0
                lowest = generation if lowest is None else min(lowest, generation)
        return lowest

    def released(self, replica: Replica) -> bool:
        """No worker can choose it any more, and nothing is in flight there.

        After the acks `started` cannot grow, so a column that reads zero now stays at zero.
        """
        if replica.slot in self._in_use:
            return False
        acked = self.acked()
        if acked is not None and acked < self._without[replica.slot]:
            return False
        return self._board.in_flight(replica.slot) == 0

    def free(self, held: Collection[int]) -> int | None:
        """A slot that no row in `held` has, no worker can still choose, and whose counters are even."""
        acked = self.acked()
        for i in range(SLOTS):
            slot = (self._next + i) % SLOTS
            if slot in held or slot in self._in_use or not self._board.idle(slot):
                continue
            # A slot that this run has never published was last held by a row that is gone, if by any.
            if acked is not None and acked < self._without[slot]:
                continue
            self._next = slot + 1
            return slot
        return None
