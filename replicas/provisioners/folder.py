"""What the folder of a replica tells: who runs it, how it ended, what it printed, how far its start is."""
from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replicas.masking import Mask
from replicas.phases import Phases
from replicas.provisioners.launcher import ENDED, LOCK, LOG, RECORD, SAYS

RECORD_SECONDS = 30.0      # a launcher is up in 0.03 s; a machine that needs longer has other worries

SPEED_SECONDS = 15.0       # SGLang tells it each 40 steps: 4 s at the 11 tokens/s of DeepSeek-R1

_DECODE = re.compile(
    rb"(?:\bDP(?P<rank>\d+)\b[^\]\r\n]*)?\] Decode batch"
    rb"[^\r\n]*gen throughput \(token/s\): (?P<speed>\d+\.?\d*)"
)
_READ_BYTES = 1 << 20      # of a log at a time
_LAST_BYTES = 4096         # of a log, to find the last words in
_LAST_LINES = 3
_LAST_CHARACTERS = 500


def record(directory: Path) -> dict[str, Any] | None:
    """process.json; None when nothing was launched here, or it was terminated."""
    return _read_json(directory / RECORD)


def ended(directory: Path) -> dict[str, Any] | None:
    """exit.json; None when it did not end by itself."""
    return _read_json(directory / ENDED)


def forget(directory: Path) -> None:
    """The replica is gone; its output stays."""
    for name in (RECORD, ENDED):
        (directory / name).unlink(missing_ok=True)


def private(path: str | Path, flags: int) -> int:
    """An opener for `open`: readable by us alone."""
    return os.open(path, flags, 0o600)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return value


def take_lock(directory: Path) -> int | None:
    """The lock of the folder as a file descriptor, or None: somebody runs the replica, or is about to."""
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def await_record(directory: Path) -> bool:
    """Wait for a launcher that has the lock to record itself (True) or to end without (False).

    Raises TimeoutError after RECORD_SECONDS.
    """
    deadline = time.monotonic() + RECORD_SECONDS
    while not (directory / RECORD).exists():
        lock = take_lock(directory)
        if lock is not None:
            os.close(lock)
            return (directory / RECORD).exists()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{directory.name}: its launcher has not recorded itself")
        time.sleep(0.01)
    return True


def why_ended(directory: Path) -> str:
    """How the replica ended, with its last words, for people."""
    end = ended(directory)
    if end is None:
        cause = "its processes are gone without an exit code (killed, or the machine restarted)"
    elif end["code"] < 0:
        cause = f"{end['stage']} was killed by {signal.Signals(-end['code']).name}"
    else:
        cause = f"{end['stage']} exited with code {end['code']}"
    words = last_words(directory)
    return f"{cause}: {words}" if words else cause


def last_words(directory: Path, said: Callable[[str], str] = str.strip) -> str:
    """The last lines that the replica printed, as one line, without secrets.

    `said` makes of a line what the replica itself has said with it; "" for nothing.
    """
    try:
        with open(directory / LOG, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    lines = [said(line) for line in re.split(r"[\r\n]+", text)]
    words = [line for line in lines if line and not line.startswith(SAYS)][-_LAST_LINES:]
    return Mask()(" | ".join(words))[-_LAST_CHARACTERS:]   # as of a gateway that did not mask on write


class Output:
    """One replica's output.log, read as it grows. Mutable by its one reader."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = directory / LOG
        self._offset = 0   # bytes
        self._clock = clock
        self._speeds: dict[bytes, tuple[float, float]] = {}   # by data-parallel rank: when told, tokens/s
        self.phases = Phases()

    def read(self) -> Phases:
        """Take in what came since the last call (at most 1 MiB)."""
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:   # begun anew: keeping.LOG_BYTES
                    self._offset = 0
                file.seek(self._offset)
                piece = file.read(_READ_BYTES)
        except FileNotFoundError:
            return self.phases
        self._offset += len(piece)
        if not self.phases.over:
            self.phases.feed(piece.decode(errors="replace"))
        for told in _DECODE.finditer(piece):
            self._speeds[told["rank"] or b""] = (self._clock(), float(told["speed"]))
        return self.phases

    @property
    def generation(self) -> float | None:
        """Tokens per second as of its last "Decode batch" lines; 0 when there was none for a while."""
        if not self._speeds:
            return None
        now = self._clock()
        return sum(speed for at, speed in self._speeds.values() if now - at < SPEED_SECONDS)
