"""The waiting room: its bounds and its order, over all workers of one board."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.errors import ColdStartFailed, WaitingRoomFull
from gateway.hold import BODY_OVERHEAD, NEXT_POLL_SECONDS, YIELD_SECONDS, Place, WaitingRoom
from replicas.board import Board

from .conftest import Rig, chat, eventually


class Window:
    """The places of one replica, shared by all rooms; `order` is who got one."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.order: list[int] = []

    def take(self, place: Place) -> str | None:
        if self.free <= 0:
            return None
        self.order.append(place.since)
        return "the replica"

    def start(self, upstream: Any) -> None:
        self.free -= 1


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until it is told otherwise."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    resolution = 1e-6  # seconds: of sums of floats

    def settle(self) -> None:
        """Run what is due."""
        for _ in range(3):
            self.run_until_complete(asyncio.sleep(0))


class Late(Clock):
    """On a busy machine a timer is due when it is set. uvloop then gives out a handle that is no timer's."""

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_soon(callback, *args, context=context)


@pytest.fixture
def loop() -> Iterator[Clock]:
    clock = Clock()
    yield clock
    clock.close()


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with Board.create(tmp_path / "load.board", 2) as board:
        yield board


def make_room(
    loop: asyncio.AbstractEventLoop, board: Board, window: Window, *, worker: int = 0, service: int = 0,
    max_waiting: int = 10, max_bytes: int = 1_000_000, on_level: Callable[[], None] = lambda: None,
) -> WaitingRoom:  # fmt: skip
    async def make() -> WaitingRoom:
        room = WaitingRoom(
            board, worker, service, max_waiting=max_waiting, max_bytes=max_bytes,
            take=window.take,  # type: ignore[arg-type]  # a room only passes the upstream on
            start=window.start, on_level=on_level,
        )  # fmt: skip
        room.polls = True
        return room

    return loop.run_until_complete(make())


def test_a_look_that_is_due_at_once_does_not_keep_the_next_one_out(board: Board) -> None:
    late = Late()
    window = Window(0)
    room = make_room(late, board, window)
    places = [room.enter(since, 10, ()) for since in (1, 2)]
    window.free = 2
    late.settle()
    assert window.order == [1, 2]
    assert [place.future.result() for place in places] == ["the replica"] * 2
    late.close()


def test_the_count_is_bounded_over_all_workers_and_services(loop: Clock, board: Board) -> None:
    window = Window(0)
    rooms = [
        make_room(loop, board, window, worker=worker, service=service, max_waiting=4)
        for worker in (0, 1)
        for service in (0, 3)
    ]
    for since, room in enumerate(rooms, 1):
        room.enter(since, 10, ())
    for room in rooms:
        with pytest.raises(WaitingRoomFull, match="4 requests already wait") as caught:
            room.enter(9, 10, ())
        error = caught.value
        assert (error.status, error.code, error.retry_after) == (429, "cold_queue_full", 30)
    assert [len(room) for room in rooms] == [1, 1, 1, 1]


def test_the_bytes_are_bounded_over_all_workers_and_services(loop: Clock, board: Board) -> None:
    window = Window(0)
    limit = 3 * (1000 + BODY_OVERHEAD)
    here = make_room(loop, board, window, max_bytes=limit)
    there = make_room(loop, board, window, worker=1, service=7, max_bytes=limit)
    here.enter(1, 1000, ())
    there.enter(2, 1000, ())
    with pytest.raises(WaitingRoomFull, match="memory"):
        here.enter(3, 1001, ())
    here.enter(3, 1000, ())
    with pytest.raises(WaitingRoomFull):
        there.enter(4, 0, ())


def test_a_place_that_was_left_can_be_taken(loop: Clock, board: Board) -> None:
    room = make_room(loop, board, Window(0), max_waiting=1)
    place = room.enter(1, 10, ())
    room.leave(place)
    room.leave(place)
    room.enter(2, 10, ())
    assert board.totals(0)[2:] == (1, 10 + BODY_OVERHEAD, 2)


def test_the_oldest_is_let_in_first_and_never_more_than_there_is_room_for(loop: Clock, board: Board) -> None:
    window = Window(0)
    room = make_room(loop, board, window)
    places = {since: room.enter(since, 0, ()) for since in (5, 3, 9, 1, 7)}
    window.free = 3
    room.release()
    assert window.order == [1, 3, 5]
    assert [places[s].future.done() for s in (1, 3, 5, 7, 9)] == [True, True, True, False, False]
    assert board.totals(0).oldest_ns == 7


def test_one_that_comes_back_takes_its_old_turn(loop: Clock, board: Board) -> None:
    window = Window(0)
    room = make_room(loop, board, window)
    for since in (10, 20, 5):
        room.enter(since, 0, ())
    window.free = 1
    room.release()
    assert window.order == [5]


def test_the_oldest_goes_first_over_two_workers(loop: Clock, board: Board) -> None:
    window = Window(0)
    rooms = [make_room(loop, board, window, worker=w) for w in (0, 1)]
    turns = ((1, 0), (2, 1), (3, 1), (4, 0), (5, 1), (6, 0))
    places = {since: rooms[worker].enter(since, 0, ()) for since, worker in turns}
    for free in (1, 0, 2, 0, 0, 2):
        window.free += free
        for room in (rooms[1], rooms[0], rooms[1], rooms[0]):
            room.release()
            let_in = [since for since, place in places.items() if place.future.done()]
            assert let_in == list(range(1, len(let_in) + 1))
    assert (window.free, [len(room) for room in rooms]) == (0, [1, 0])


def test_a_new_request_does_not_overtake_one_that_waits_at_another_worker(loop: Clock, board: Board) -> None:
    window = Window(0)
    here, there = (make_room(loop, board, window, worker=w) for w in (0, 1))
    there.enter(1, 0, ())
    assert here.older_elsewhere(2)
    assert not here.older_elsewhere(1)
    assert not there.older_elsewhere(2)


def test_a_stuck_worker_holds_the_others_up_once_and_not_for_each_place(loop: Clock, board: Board) -> None:
    window = Window(0)
    here, stuck = (make_room(loop, board, window, worker=w) for w in (0, 1))
    stuck.polls = False
    stuck.enter(1, 0, ())
    for since in range(2, 8):
        here.enter(since, 0, ())
    window.free = 3
    here.release()
    assert len(here) == 6
    loop.now += YIELD_SECONDS
    here.release()
    assert (len(here), window.free) == (3, 0)
    window.free = 3
    here.release()
    assert (len(here), window.free) == (0, 0)
    assert not here.older_elsewhere(99), "nor does a new one queue behind it"


def test_the_time_for_another_worker_counts_only_while_a_place_is_free(loop: Clock, board: Board) -> None:
    window = Window(0)
    here, there = (make_room(loop, board, window, worker=w) for w in (0, 1))
    there.polls = False
    there.enter(1, 0, ())
    here.enter(2, 0, ())
    here.release()
    loop.now += 60
    window.free = 1
    here.release()
    assert len(here) == 1, "it has had no chance yet"
    there.release()
    assert (len(there), window.free) == (0, 0)


def test_a_worker_that_was_stuck_gets_its_turn_back_with_its_next_waiter(loop: Clock, board: Board) -> None:
    window = Window(0)
    here, there = (make_room(loop, board, window, worker=w) for w in (0, 1))
    there.polls = False
    first = there.enter(1, 0, ())
    here.enter(5, 0, ())
    window.free = 1
    here.release()
    loop.now += YIELD_SECONDS
    here.release()
    assert len(here) == 0
    there.leave(first)
    there.enter(2, 0, ())
    assert here.older_elsewhere(5)


def test_a_room_looks_again_by_itself_while_there_are_upstreams(loop: Clock, board: Board) -> None:
    window = Window(0)
    room = make_room(loop, board, window)
    place = room.enter(1, 0, ())
    window.free = 1  # another worker's request ended: nobody tells
    loop.now += 1
    loop.settle()
    assert place.future.done()


def test_who_left_a_place_to_an_older_one_looks_again_very_soon(loop: Clock, board: Board) -> None:
    window = Window(0)
    here, there = (make_room(loop, board, window, worker=w) for w in (0, 1))
    there.enter(1, 0, ())
    place = here.enter(2, 0, ())  # not its turn: the next look is in POLL_SECONDS
    window.free = 2
    here.release()
    assert not place.future.done()
    there.release()
    loop.now += NEXT_POLL_SECONDS + loop.resolution
    loop.settle()
    assert place.future.done()


def test_without_any_upstream_nobody_looks_again(loop: Clock, board: Board) -> None:
    window = Window(0)
    room = make_room(loop, board, window)
    room.polls = False
    place = room.enter(1, 0, ())
    window.free = 1
    loop.now += 3600
    loop.settle()
    assert not place.future.done()


def test_failing_ends_every_wait_and_clears_the_board(loop: Clock, board: Board) -> None:
    levels = []
    room = make_room(loop, board, Window(0), on_level=lambda: levels.append(len(room)))
    places = [room.enter(since, since, ()) for since in (1, 2, 3)]
    room.fail(lambda: ColdStartFailed("no GPUs left"))
    assert [type(place.future.exception()) for place in places] == [ColdStartFailed] * 3
    assert board.totals(0)[2:] == (0, 0, 0)
    assert levels == [1, 0], "told when it began, and when nobody waits any more"
    for place in places:
        room.leave(place)
    assert board.totals(0)[2:] == (0, 0, 0)


def test_the_controller_hears_of_the_first_and_the_last_only(loop: Clock, board: Board) -> None:
    levels = []
    room = make_room(loop, board, Window(0), on_level=lambda: levels.append(len(room)))
    places = [room.enter(since, 0, ()) for since in (1, 2, 3)]
    for place in places:
        room.leave(place)
    assert levels == [1, 0]


# --- the board's cells, whatever happens


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


# --- through the door


async def test_overflow_is_429_at_every_worker(rigs: Callable[..., Awaitable[Rig]]) -> None:
    rig = await rigs(workers=2, max_waiting=2)
    held = [await rig.raw(chat(), url=url) for url in rig.urls]
    await rig.waiting(2)
    for url in rig.urls:
        answer = await rig.client.post(f"{url}/v1/chat/completions", json=chat())
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "30"
        assert answer.json()["error"]["code"] == "cold_queue_full"
    await held[0].close()
    await rig.waiting(1)
    third = await rig.raw(chat(), url=rig.urls[1])
    await rig.waiting(2)
    for answer in (held[1], third):
        await answer.close()
    await rig.quiet()


async def test_a_held_client_that_leaves_frees_its_place_and_the_controller_hears_it(rig: Rig) -> None:
    held = await rig.raw(chat(stream=True))
    await eventually(lambda: rig.control.workers[0].waiting == {"r1": 1})
    await held.close(reset=True)
    await rig.waiting(0)
    await eventually(lambda: rig.control.workers[0].waiting == {"r1": 0})
    await rig.quiet()
    assert rig.board.totals(0)[2:] == (0, 0, 0)
