"""The board: what readers may conclude from cells that other processes write at the same time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.board import SERVICES, SLOTS, Board, BoardError, Totals

ROOT = Path(__file__).parents[2]


def _cells_of(board: Board, worker: int) -> list[int]:
    """Every cell that the worker may write."""
    row = board.worker(worker)
    slots = [base + i for base in (row.started, row.finished, row.chunks) for i in range(SLOTS)]
    bases = (row.arrived, row.ended, row.waiting, row.waiting_bytes, row.oldest)
    return [row.pid, *slots, *(base + i for base in bases for i in range(SERVICES))]


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with Board.create(tmp_path / "load.board", workers=3) as board:
        yield board


def _write(board: Board, base: int, offset: int, value: int) -> None:
    board.cells[base + offset] = value


def test_a_new_board_is_all_zeroes_and_private(board: Board) -> None:
    assert [board.in_flight(slot) for slot in range(SLOTS)] == [0] * SLOTS
    assert [board.totals(s) for s in range(SERVICES)] == [Totals(0, 0, 0, 0, 0)] * SERVICES
    assert board.pids() == (0, 0, 0)
    assert board.path.stat().st_mode & 0o777 == 0o600


def test_what_one_process_writes_another_view_of_the_file_reads(board: Board) -> None:
    with Board.open(board.path) as other:
        assert other.workers == 3
        row = other.worker(1)
        other.cells[row.started + 5] += 1
        other.cells[row.chunks + 5] += 7
        other.cells[row.pid] = 4711
        other.cells[other.foreign + 5] = 3
        assert (board.in_flight(5), board.in_flight(4)) == (1, 0)
        assert board.chunks(5) == 7
        assert board.pids() == (0, 4711, 0)
        assert board.cells[board.foreign + 5] == 3


def test_no_two_cells_of_the_board_are_the_same_and_rows_share_no_cache_line(board: Board) -> None:
    controllers = [base + i for base in (board.foreign, board.window, board.polled) for i in range(SLOTS)]
    writers = [controllers, *(_cells_of(board, i) for i in range(3))]
    cells = [cell for writer in writers for cell in writer]
    assert len(cells) == len(set(cells))
    lines = [{cell * 8 // 64 for cell in writer} for writer in writers]
    assert sum(map(len, lines)) == len(set().union(*lines))
    assert min(cells) * 8 >= 64, "the header has a line of its own"
    assert max(cells) < len(board.cells)


def test_creating_a_board_leaves_those_who_still_hold_the_old_one_alone(board: Board) -> None:
    row = board.worker(0)
    board.cells[row.started] = 9
    with Board.create(board.path, workers=1) as new:
        assert (new.workers, new.in_flight(0)) == (1, 0)
        assert board.in_flight(0) == 9
    assert sorted(p.name for p in board.path.parent.iterdir()) == ["load.board"]


def test_a_board_that_cannot_be_put_in_place_leaves_no_rubbish(tmp_path: Path) -> None:
    (tmp_path / "load.board").mkdir()
    with pytest.raises(OSError, match=r"load\.board"):
        Board.create(tmp_path / "load.board", workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["load.board"]


@pytest.mark.parametrize("workers", [0, -1, 257])
def test_a_board_needs_a_sensible_number_of_workers(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.256"):
        Board.create(tmp_path / "load.board", workers)


def test_a_missing_board_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BoardError, match=r"no board at .*load\.board; stop the gateway and start it again"):
        Board.open(tmp_path / "load.board")


def test_a_file_that_is_no_board_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "load.board"
    path.write_bytes(b"hello")
    with pytest.raises(BoardError, match="is not a board: 5 bytes"):
        Board.open(path)
    path.write_bytes(b"x" * 4096)
    with pytest.raises(BoardError, match=r"is not a board \(it begins"):
        Board.open(path)


def test_a_board_of_another_version_is_refused_naming_both(board: Board) -> None:
    board.cells[1] = 2
    with pytest.raises(BoardError, match=r"board version 2 with 64 slots.*this program 1 with 64"):
        Board.open(board.path)


def test_a_board_cut_short_is_refused(board: Board) -> None:
    os.truncate(board.path, board.path.stat().st_size - 8)
    with pytest.raises(BoardError, match="damaged"):
        Board.open(board.path)


def test_a_worker_outside_the_board_is_an_index_error(board: Board) -> None:
    for index in (-1, 3):
        with pytest.raises(IndexError, match=r"0\.\.2"):
            board.worker(index)


def test_totals_sum_over_workers_and_name_the_oldest_waiter(board: Board) -> None:
    rows = [(5, 2, 3, 300, 900), (4, 4, 0, 0, 0), (1, 0, 1, 7, 800)]
    for i, (arrived, ended, waiting, size, oldest) in enumerate(rows):
        row = board.worker(i)
        _write(board, row.arrived, 2, arrived)
        _write(board, row.ended, 2, ended)
        _write(board, row.waiting, 2, waiting)
        _write(board, row.waiting_bytes, 2, size)
        _write(board, row.oldest, 2, oldest)
    assert board.totals(2) == (10, 6, 4, 307, 800)
    assert board.totals(1) == (0, 0, 0, 0, 0)


def test_a_finish_seen_before_its_start_counts_as_nothing_and_hides_no_other_row(board: Board) -> None:
    board.cells[board.worker(0).finished] = 1
    board.cells[board.worker(1).started] = 2
    assert board.in_flight(0) == 2
    assert not board.idle(0)


def test_a_slot_is_idle_only_when_every_row_is_balanced(board: Board) -> None:
    assert board.idle(3)
    board.cells[board.worker(0).started + 3] = 1
    board.cells[board.worker(1).finished + 3] = 1  # balanced in sum, not by row
    assert not board.idle(3)
    board.cells[board.worker(0).finished + 3] = 1
    board.cells[board.worker(1).started + 3] = 1
    assert board.idle(3)


def test_zeroing_a_dead_worker_tells_what_died_with_it_and_touches_no_other_row(board: Board) -> None:
    for i in range(3):
        row = board.worker(i)
        for cell in _cells_of(board, i):
            board.cells[cell] = 1
        _write(board, row.arrived, 0, 7)
        _write(board, row.ended, 0, 4)
    board.cells[board.window + 1] = 16
    before = board.cells.tolist()
    assert board.zero_worker(1) == {0: 3}
    own = _cells_of(board, 1)
    after = board.cells.tolist()
    assert [after[cell] for cell in own] == [0] * len(own)
    assert all(after[cell] == before[cell] for cell in range(len(after)) if cell not in own)
    assert board.zero_worker(1) == {}


def test_a_closed_board_can_be_closed_again_and_says_that_it_is_closed(board: Board) -> None:
    assert repr(board) == "<Board workers=3 in-flight=0 waiting=0>"
    board.close()
    board.close()
    assert "closed" in repr(board)


class _Watched:
    """Cells that let the world go on for a while before every single read."""

    def __init__(self, cells: memoryview[int], meanwhile: Iterator[None]) -> None:
        self._cells, self._meanwhile = cells, meanwhile

    def __getitem__(self, index: int) -> int:
        next(self._meanwhile, None)
        return self._cells[index]


@settings(max_examples=60, deadline=None)
@given(script=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 3)), max_size=60))
def test_however_writers_and_a_reader_interleave_no_open_lease_is_missed_and_none_is_negative(
    tmp_path_factory: pytest.TempPathFactory, script: list[tuple[int, bool, int]]
) -> None:
    with Board.create(tmp_path_factory.getbasetemp() / "interleaved.board", workers=3) as board:
        cells, rows = board.cells, [board.worker(i) for i in range(3)]
        open_ = [0, 0, 0]
        steady = 2  # leases that are open from before the read until after it
        cells[rows[0].started] = steady
        started = steady

        def world() -> Iterator[None]:
            nonlocal started
            for worker, starts, burst in script:
                for _ in range(burst):
                    if starts:
                        cells[rows[worker].started] += 1
                        open_[worker] += 1
                        started += 1
                    elif open_[worker]:
                        cells[rows[worker].finished] += 1
                        open_[worker] -= 1
                yield

        board.cells = _Watched(cells, world())  # type: ignore[assignment]
        try:
            seen = board.in_flight(0)
        finally:
            board.cells = cells
        assert steady <= seen <= started
        assert board.in_flight(0) == steady + sum(open_)


@pytest.mark.parametrize("moment", range(7))
def test_a_reader_that_meets_the_zeroing_of_a_dead_row_loses_no_lease_of_the_living(
    board: Board, moment: int
) -> None:
    for i, (started, finished) in enumerate([(5, 1), (12, 10), (9, 6)]):
        board.cells[board.worker(i).started] = started
        board.cells[board.worker(i).finished] = finished
    cells = board.cells

    def world() -> Iterator[None]:
        for _ in range(moment):
            yield
        board.cells = cells
        board.zero_worker(1)

    board.cells = _Watched(cells, world())  # type: ignore[assignment]
    try:
        assert board.in_flight(0) in (4 + 3, 4 + 2 + 3)
    finally:
        board.cells = cells
    board.zero_worker(1)
    assert board.in_flight(0) == 4 + 3


WRITER = """
import os, sys
from replicas.board import Board
path, index, rounds, held = sys.argv[1], *map(int, sys.argv[2:])
board = Board.open(path)
row, cells = board.worker(index), board.cells
cells[row.pid] = os.getpid()
cells[row.arrived + 1] = cells[row.waiting + 1] = held
print("ready", flush=True)
sys.stdin.readline()
n = 0
while n != rounds:
    n += 1
    cells[row.arrived + 1] += 1
    cells[row.started + 7] += 1
    cells[row.chunks + 7] += 3
    cells[row.finished + 7] += 1
    cells[row.ended + 1] += 1
"""


def _writer(board: Board, index: int, rounds: int, held: int = 0) -> subprocess.Popen[bytes]:
    """A worker process: `rounds` requests one after the other (-1: for ever), `held` more kept waiting."""
    command = [sys.executable, "-c", WRITER, str(board.path), *map(str, (index, rounds, held))]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def _go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def test_of_real_processes_a_reader_sees_only_growing_counters_and_exact_sums(tmp_path: Path) -> None:
    rounds = 40_000
    with Board.create(tmp_path / "load.board", workers=2) as board:
        processes = [_writer(board, i, rounds) for i in range(2)]
        assert board.pids() == tuple(p.pid for p in processes)
        for process in processes:
            _go(process)
        seen = board.totals(1)
        chunks = 0
        while any(process.poll() is None for process in processes):
            assert 0 <= board.in_flight(7) <= 2 * rounds
            now, more = board.totals(1), board.chunks(7)
            assert now.ended <= now.arrived
            assert now.arrived >= seen.arrived
            assert now.ended >= seen.ended
            assert more >= chunks
            seen, chunks = now, more
        for process in processes:
            with process:
                assert process.wait() == 0
        assert board.totals(1) == (2 * rounds, 2 * rounds, 0, 0, 0)
        assert (board.chunks(7), board.in_flight(7), board.idle(7)) == (6 * rounds, 0, True)


def test_a_worker_killed_in_mid_write_costs_its_own_open_requests_and_nothing_else(tmp_path: Path) -> None:
    seeded = random.Random(7)
    rounds, held = 40_000, 3
    with Board.create(tmp_path / "load.board", workers=2) as board, _writer(board, 1, rounds) as other:
        _go(other)
        for _ in range(5):
            with _writer(board, 0, -1, held) as victim:
                _go(victim)
                for _ in range(seeded.randrange(2_000)):
                    board.totals(1)
                victim.send_signal(signal.SIGKILL)
                victim.wait()
            # It serves one request after the other: it died with the held ones and at most one more.
            lost = board.zero_worker(0)
            assert lost in ({1: held}, {1: held + 1})
            assert [board.cells[cell] for cell in _cells_of(board, 0)] == [0] * len(_cells_of(board, 0))
            assert board.pids() == (0, other.pid)
            assert board.totals(1).waiting == 0
        assert other.wait() == 0
        assert board.totals(1) == (rounds, rounds, 0, 0, 0)
        assert (board.chunks(7), board.in_flight(7)) == (3 * rounds, 0)
