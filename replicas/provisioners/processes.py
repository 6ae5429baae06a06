"""Which processes belong to a local replica, and how to end them all and nothing else."""
from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from replicas.provisioners.launcher import started

_KILL_SECONDS = 5.0    # from SIGKILL to gone; more means a process in uninterruptible sleep
_FIRST_LOOK_SECONDS = 0.02
_LAST_LOOK_SECONDS = 0.25   # a look reads every process's environment: 5 ms of CPU for 200 processes


@dataclass(frozen=True, slots=True)
class Process:
    """One process; `started` makes the pid unmistakable."""

    pid: int
    started: str


def is_running(pid: int, since: str) -> bool:
    """Whether this very process still runs: a recycled pid has another start time."""
    return started(pid) == since


def members(leader: int, since: str, directory: Path) -> set[Process]:
    """All that runs for the replica: the leader's session, and what left it but has its REPLICA_DIR.

    A session is only trusted by its number while its leader is the recorded one; with the leader gone the
    number may mean somebody else's, and REPLICA_DIR must agree. (Not found: what left the session *and*
    cleared its environment; and, where there is no /proc, what left the process group.)
    """
    trusted = is_running(leader, since)
    found = set()
    for pid, session in _sessions():
        ours = trusted and session == leader
        if (ours or _runs_in(pid, directory)) and (begun := started(pid)) is not None:
            found.add(Process(pid, begun))
    return found


def end(leader: int, since: str, directory: Path, *, grace: float) -> set[Process]:
    """SIGTERM to all, SIGKILL after `grace` seconds to the rest; returns those that live nevertheless."""
    number, deadline = signal.SIGTERM, time.monotonic() + grace
    known: set[Process] = set()
    told: set[Process] = set()
    pause = _FIRST_LOOK_SECONDS
    while True:
        # Once a member, always one: also after its leader is gone, also with its environment cleared.
        known = {p for p in known if is_running(p.pid, p.started)} | members(leader, since, directory)
        if not known:
            return set()
        if time.monotonic() >= deadline:
            if number == signal.SIGKILL:
                return known
            number, deadline = signal.SIGKILL, time.monotonic() + _KILL_SECONDS
            told, pause = set(), _FIRST_LOOK_SECONDS
        _signal(known - told, Process(leader, since), number)
        told |= known
        time.sleep(pause)
        pause = min(pause * 2, _LAST_LOOK_SECONDS)


def _signal(processes: set[Process], leader: Process, number: signal.Signals) -> None:
    """The leader first: were `setup` to end before the leader hears of it, `run` would be started.

    Then its group in one call: a shell whose child ends before it hears of it goes on to its next line.
    What cannot be told is gone meanwhile, or another user's (sudo); that shows as "still there" at the end.
    """
    group: set[Process] = set()
    if leader in processes and is_running(leader.pid, leader.started):
        group = {process for process in processes if _group(process.pid) == leader.pid}
        for tell in (os.kill, os.killpg):
            with suppress(ProcessLookupError, PermissionError):
                tell(leader.pid, number)
    for process in processes - group:
        with suppress(ProcessLookupError, PermissionError):
            if is_running(process.pid, process.started):
                os.kill(process.pid, number)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _sessions() -> Iterator[tuple[int, int]]:
    """(pid, session) of every process that we can see; the process group where there is no /proc."""
    if not os.path.exists("/proc/self/stat"):
        ps = subprocess.run(["ps", "-axo", "pid=,pgid="], capture_output=True, text=True, check=True)
        for line in ps.stdout.splitlines():
            pid, group = line.split()
            yield int(pid), int(group)
        return
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                yield int(name), os.getsid(int(name))
            except (ProcessLookupError, PermissionError):
                continue


def _runs_in(pid: int, directory: Path) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False   # another user's, a zombie, or no /proc here
    return b"REPLICA_DIR=" + os.fsencode(directory) in environment.split(b"\0")
