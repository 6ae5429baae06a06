"""The waiting room: its bounds and its order, over all workers of one board."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import ColdStartFailed, WaitingRoomFull
from gateway.hold import BODY_OVERHEAD, NEXT_POLL_SECONDS, YIELD_SECONDS
from replicas.board import Board

from .conftest import Rig, chat, eventually
from .rooms import REPLICA, Clock, Window, make_room


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


def test_a_look_that_is_due_at_once_does_not_keep_the_next_one_out(board: Board) -> None:
    late = Late()
    window = Window(0)
    room = make_room(late, board, window)
    places = [room.enter(since, 10, ()) for since in (1, 2)]
    window.free = 2
    late.settle()
    assert window.order == [1, 2]
    assert [place.future.result() for place in places] == [REPLICA] * 2
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
