"""The board: numbers that the processes of one gateway share, as an mmap of aligned int64 cells.

Who writes what (one writer per cell, hence no locks):

* the supervisor writes the header once (`Board.create`) and zeroes the row of a worker that it has reaped;
* the controller writes the controller row: per slot the foreign depth, the window, the time of the last poll;
* worker i writes worker row i, on its hot path plainly by index: `cells[row.started + slot] += 1`.

A *slot* (0..63) stands for one replica id; the controller gives it out, and again only when `idle(slot)`.
A *service index* (0..15) stands for one service. In-flight = started - finished. Counters only grow, but for
a worker's death: its row starts at zero again, so whoever takes differences takes `max(0, difference)`.

Readers see each cell whole (aligned 8-byte loads and stores), but not two cells at one instant. Therefore
finished is read before started, and ended before arrived: what happens in between can only make the
difference larger, never lose a request. Machines that reorder stores (ARM) may still show a finish before its
start; a row's difference below zero is read as zero.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

SLOTS = 64
"""Replicas that can exist at one time in one gateway, all services together."""
SERVICES = 16
"""Services of one gateway."""
MAX_WORKERS = 256

_MAGIC = 0x31_64_72_61_6F_62_67_73  # "sgboard1" in little-endian bytes
_VERSION = 1
_CELL = 8  # bytes
_LINE = 128 // _CELL
"""Rows begin at multiples of this, so that no two writers share a cache line: 128 bytes, because x86 fetches
its 64-byte lines in pairs and Apple's processors have lines of 128."""


def _round_up(cells: int) -> int:
    return -(-cells // _LINE) * _LINE


# The header's cells.
_H_MAGIC, _H_VERSION, _H_WORKERS, _H_SLOTS, _H_SERVICES = range(5)
_HEADER = _round_up(5)

# The controller row: three arrays of SLOTS cells.
_FOREIGN = _HEADER
_WINDOW = _FOREIGN + SLOTS
_POLLED = _WINDOW + SLOTS
_ROWS = _HEADER + _round_up(3 * SLOTS)

# A worker row, as offsets: its pid, then three arrays of SLOTS cells, then five of SERVICES cells.
_PID = 0
_STARTED = _LINE
_FINISHED = _STARTED + SLOTS
_CHUNKS = _FINISHED + SLOTS
_ARRIVED = _CHUNKS + SLOTS
_ENDED = _ARRIVED + SERVICES
_WAITING = _ENDED + SERVICES
_WAITING_BYTES = _WAITING + SERVICES
_OLDEST = _WAITING_BYTES + SERVICES
_ROW = _round_up(_OLDEST + SERVICES)


def _cells(workers: int) -> int:
    return _ROWS + workers * _ROW


class BoardError(Exception):
    """The file is not a board that this program can use; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """Where one worker's cells lie: absolute indexes into `Board.cells`.

    `pid` is one cell. `started`, `finished` (leases) and `chunks` (pieces of response bodies) are bases: add
    the slot. Bases to which the service index is added: `arrived` (valid requests accepted), `ended`
    (those that reached their typed end), `waiting` (held now), `waiting_bytes` (their bodies), `oldest`
    (`time.monotonic_ns()` of the oldest waiter, 0 = none).
    """

    index: int
    pid: int
    started: int
    finished: int
    chunks: int
    arrived: int
    ended: int
    waiting: int
    waiting_bytes: int
    oldest: int


class Totals(NamedTuple):
    """Sums over all workers; `oldest_ns` is the oldest waiter's `time.monotonic_ns()`, 0 = none."""

    arrived: int
    ended: int
    waiting: int
    waiting_bytes: int
    oldest_ns: int


class Board:
    """One process's view of the board. Mutable: the cells, each by its one writer (see the module).

    `foreign`, `window` and `polled` are the controller row's bases: add the slot. `polled` holds the
    `time.monotonic_ns()` of the last good poll; a foreign depth polled more than 3 s ago means nothing.
    """

    foreign: ClassVar[int] = _FOREIGN
    window: ClassVar[int] = _WINDOW
    polled: ClassVar[int] = _POLLED

    def __init__(self, path: Path, mapped: mmap.mmap, workers: int) -> None:
        self.path = path
        self.workers = workers
        self._mmap = mapped
        self.cells: memoryview[int] = memoryview(mapped).cast("q")
        self._rows = tuple(_row(i) for i in range(workers))
        self._finished_started = tuple((row.finished, row.started) for row in self._rows)

    def __repr__(self) -> str:
        if self._mmap.closed:
            return f"<Board {self.path} closed>"
        flight = sum(self.in_flight(slot) for slot in range(SLOTS))
        waiting = sum(self.totals(s).waiting for s in range(SERVICES))
        return f"<Board workers={self.workers} in-flight={flight} waiting={waiting}>"

    @classmethod
    def create(cls, path: str | os.PathLike[str], workers: int) -> Board:
        """Make a board of zeroes in place of whatever is at `path`, atomically; one still open stays.

        Mode 0600. Raises ValueError for `workers` outside 1..256, OSError as the disk says.
        """
        if not 1 <= workers <= MAX_WORKERS:
            raise ValueError(f"workers must be 1..{MAX_WORKERS}, not {workers}")
        path = Path(path)
        size = _cells(workers)
        cells = memoryview(bytearray(size * _CELL)).cast("q")
        cells[_H_MAGIC], cells[_H_VERSION], cells[_H_WORKERS] = _MAGIC, _VERSION, workers
        cells[_H_SLOTS], cells[_H_SERVICES] = SLOTS, SERVICES
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(fd, "wb") as file:
                file.write(cells)  # not a hole: a full disk is an error here, not a SIGBUS at a later +=
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Board:
        """Map the board at `path`. Raises BoardError where it is missing or is not a board of this layout."""
        path = Path(path)
        try:
            with open(path, "r+b") as file:
                length = os.fstat(file.fileno()).st_size
                if length < _HEADER * _CELL:
                    raise BoardError(f"{path} is not a board: {length} bytes are too few; {_AGAIN}")
                mapped = mmap.mmap(file.fileno(), length)
        except FileNotFoundError:
            raise BoardError(f"there is no board at {path}; {_AGAIN}") from None
        try:
            return cls(path, mapped, _check(path, mapped, length))
        except BaseException:
            mapped.close()
            raise

    def close(self) -> None:
        """Unmap; `cells` cannot be used afterwards. Closing twice is fine."""
        self.cells.release()
        self._mmap.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def worker(self, index: int) -> WorkerRow:
        """Where worker `index`'s cells lie. Raises IndexError outside 0..workers-1."""
        if not 0 <= index < self.workers:
            raise IndexError(f"the board has workers 0..{self.workers - 1}, not {index}")
        return self._rows[index]

    def in_flight(self, slot: int) -> int:
        """Leases open on `slot` now, over all workers; never negative."""
        cells = self.cells
        total = 0
        for finished, started in self._finished_started:
            done = cells[finished + slot]
            open_ = cells[started + slot] - done
            if open_ > 0:
                total += open_
        return total

    def idle(self, slot: int) -> bool:
        """Whether every worker's started equals its finished on `slot`: then the slot is free to reuse."""
        cells = self.cells
        for finished, started in self._finished_started:
            done = cells[finished + slot]
            if cells[started + slot] != done:
                return False
        return True

    def chunks(self, slot: int) -> int:
        """Pieces of response bodies that came from `slot`, over all workers (a sign of life)."""
        return sum(self.cells[row.chunks + slot] for row in self._rows)

    def totals(self, service: int) -> Totals:
        """One service's sums over all workers."""
        cells = self.cells
        arrived = ended = waiting = waiting_bytes = oldest = 0
        for row in self._rows:
            done = cells[row.ended + service]
            ended += done
            arrived += max(done, cells[row.arrived + service])
            waiting += cells[row.waiting + service]
            waiting_bytes += cells[row.waiting_bytes + service]
            since = cells[row.oldest + service]
            if since and (not oldest or since < oldest):
                oldest = since
        return Totals(arrived, ended, waiting, waiting_bytes, oldest)

    def pids(self) -> tuple[int, ...]:
        """Each worker's pid, by index; 0 = it has not started or is dead and reaped."""
        return tuple(self.cells[row.pid] for row in self._rows)

    def zero_worker(self, index: int) -> dict[int, int]:
        """Zero a dead worker's row; returns, per service index, how many requests died with it (if any).

        For the supervisor alone, after it has reaped the worker: until then the row has another writer.
        """
        row, cells = self.worker(index), self.cells
        lost = {s: cells[row.arrived + s] - cells[row.ended + s] for s in range(SERVICES)}
        # In this order a reader in between sees too few in flight (the dead have none), never ghosts.
        for base, count in (
            (row.pid, 1),
            (row.started, SLOTS),
            (row.finished, SLOTS),
            (row.chunks, SLOTS),
            (row.arrived, SERVICES),
            (row.ended, SERVICES),
            (row.oldest, SERVICES),
            (row.waiting, SERVICES),
            (row.waiting_bytes, SERVICES),
        ):
            for cell in range(base, base + count):
                cells[cell] = 0
        return {s: n for s, n in lost.items() if n > 0}


_AGAIN = "stop the gateway and start it again, which makes a new one"


def _row(index: int) -> WorkerRow:
    base = _ROWS + index * _ROW
    return WorkerRow(
        index=index,
        pid=base + _PID,
        started=base + _STARTED,
        finished=base + _FINISHED,
        chunks=base + _CHUNKS,
        arrived=base + _ARRIVED,
        ended=base + _ENDED,
        waiting=base + _WAITING,
        waiting_bytes=base + _WAITING_BYTES,
        oldest=base + _OLDEST,
    )


def _check(path: Path, mapped: mmap.mmap, length: int) -> int:
    """The header's number of workers; raises BoardError with what does not match."""
    with memoryview(mapped) as raw, raw[: _HEADER * _CELL] as head, head.cast("q") as cells:
        magic, version, workers = cells[_H_MAGIC], cells[_H_VERSION], cells[_H_WORKERS]
        layout = (cells[_H_SLOTS], cells[_H_SERVICES])
    if magic != _MAGIC:
        raise BoardError(f"{path} is not a board (it begins with {magic:#x}); {_AGAIN}")
    if version != _VERSION or layout != (SLOTS, SERVICES):
        raise BoardError(
            f"{path} belongs to another gateway version: it has board version {version} with "
            f"{layout[0]} slots and {layout[1]} services, this program {_VERSION} with {SLOTS} and "
            f"{SERVICES}; {_AGAIN}"
        )
    if not 1 <= workers <= MAX_WORKERS or length != _cells(workers) * _CELL:
        raise BoardError(f"{path} is damaged: {length} bytes cannot hold its {workers} workers; {_AGAIN}")
    return workers
