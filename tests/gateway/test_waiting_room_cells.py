"""The waiting room, whatever happens: the board is exact, and no place is free while somebody waits."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.errors import ColdStartFailed, WaitingRoomFull
from gateway.hold import BODY_OVERHEAD, Place
from replicas.board import Board

from .rooms import Clock, Window, make_room


class Rooms(RuleBasedStateMachine):
    """Two workers' rooms over one replica."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.loop = Clock()
        self.board = Board.create(Path(self.folder.name) / "load.board", 2)
        self.window = Window(2)
        self.rooms = [
            make_room(self.loop, self.board, self.window, worker=worker, max_waiting=6, max_bytes=20_000)
            for worker in (0, 1)
        ]
        self.places: list[tuple[int, Place]] = []
        self.inside = 0
        self.arrivals = 0

    def teardown(self) -> None:
        for _, place in self.places:
            place.future.cancel()
        self.board.close()
        self.loop.close()
        self.folder.cleanup()

    def collect(self) -> None:
        """What was let in or ended leaves the model."""
        for worker, place in list(self.places):
            if place.future.done():
                self.places.remove((worker, place))
                if place.future.exception() is None:
                    assert place.counted[0] <= place.counted[1]
                    self.inside += 1

    @rule(worker=st.integers(0, 1), size=st.integers(0, 6000), late=st.integers(0, 3))
    def enter(self, worker: int, size: int, late: int) -> None:
        self.arrivals += 1
        cost = sum(place.size for _, place in self.places) + size + BODY_OVERHEAD
        fits = len(self.places) < 6 and cost <= 20_000
        try:
            place = self.rooms[worker].enter(self.arrivals * 4 - late * 4, size, ())
        except WaitingRoomFull:
            assert not fits
        else:
            assert fits
            self.places.append((worker, place))
        self.collect()

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        worker, place = data.draw(st.sampled_from(self.places))
        self.places.remove((worker, place))
        self.rooms[worker].leave(place)
        place.future.cancel()

    @precondition(lambda self: self.inside)
    @rule(worker=st.integers(0, 1))
    def end(self, worker: int) -> None:
        self.inside -= 1
        self.window.free += 1
        self.rooms[worker].release()
        self.collect()

    @rule(worker=st.integers(0, 1))
    def fail(self, worker: int) -> None:
        self.rooms[worker].fail(lambda: ColdStartFailed("no"))
        self.collect()
        assert not any(w == worker for w, _ in self.places)

    @rule(seconds=st.sampled_from([0.001, 0.02, 0.3]))
    def time_goes_on(self, seconds: float) -> None:
        self.loop.now += seconds
        self.loop.settle()
        self.collect()

    @invariant()
    def the_board_is_exact(self) -> None:
        for worker, room in enumerate(self.rooms):
            mine = [place for w, place in self.places if w == worker]
            cells, row = self.board.cells, self.board.worker(worker)
            assert len(room) == len(mine) == cells[row.waiting]
            assert cells[row.waiting_bytes] == sum(place.size for place in mine)
            assert cells[row.oldest] == min((place.since for place in mine), default=0)

    @invariant()
    def never_more_than_the_window(self) -> None:
        assert self.window.free >= 0
        assert self.inside + self.window.free == 2

    @invariant()
    def nobody_waits_beside_a_free_place_for_long(self) -> None:
        if self.window.free and self.places:
            for _ in range(40):
                self.loop.now += 0.05
                self.loop.settle()
            self.collect()
            assert not (self.window.free and self.places)


TestRooms = Rooms.TestCase
TestRooms.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
