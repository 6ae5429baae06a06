"""Starting, watching and ending the measured processes. Linux: /proc, CPU affinity, autogroups."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

TICKS = os.sysconf("SC_CLK_TCK")


class Started:
    """Remembers in a file what was started, so that the next run can end what a killed one left behind.

    A process is known by its id and its start time: ids are used again.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[int, int] = {}
        for pid, began in json.loads(file.read_text()) if file.exists() else []:
            if start_time(pid) == began:
                print(f"ending process {pid} that an earlier run left behind")
                end(family(pid))
        self._save()

    def add(self, pids: Iterable[int]) -> None:
        for pid in pids:
            if (began := start_time(pid)) is not None:
                self._known[pid] = began
        self._save()

    def end(self, pid: int) -> None:
        """End the process and all it started, those too whose parents are gone."""
        self.add(family(pid))
        end(member for member, began in self._known.items() if start_time(member) == began)
        self._known.clear()
        self._save()

    def _save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(list(self._known.items())))


def spawn(
    command: list[str],
    *,
    cpu: int | None,
    log: IO[bytes],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """A process on one CPU (with all it will start), leader of a session of its own."""

    def pin() -> None:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})

    return subprocess.Popen(
        command, env={**os.environ, **(env or {})}, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True, preexec_fn=pin,
    )  # fmt: skip


def family(pid: int) -> list[int]:
    """The process and its living descendants."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))) and fields[0] != "Z":
            parents[int(entry)] = int(fields[1])
    members = [pid] if pid in parents else []
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members


def end(pids: Iterable[int], *, polite_s: float = 5.0) -> None:
    """SIGTERM, and after `polite_s` SIGKILL, until all are gone."""
    left = {pid: start_time(pid) for pid in pids}
    for number, wait in ((signal.SIGTERM, polite_s), (signal.SIGKILL, 5.0)):
        left = {pid: began for pid, began in left.items() if began is not None and start_time(pid) == began}
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        deadline = time.monotonic() + wait
        while any(start_time(pid) == began for pid, began in left.items()) and time.monotonic() < deadline:
            time.sleep(0.05)


def start_time(pid: int) -> int | None:
    """In clock ticks since boot; None when there is no such process, or it only waits to be reaped."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def memory_kib(pids: Iterable[int], key: str = "VmRSS") -> int:
    """Sum of VmRSS (now) or VmHWM (the most since `forget_peak`)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(key + ":"):
                    total += int(line.split()[1])
    return total


def forget_peak(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def set_priority(pids: Iterable[int], nice: int) -> bool:
    """Niceness of the processes and of their autogroups (which is what counts between sessions)."""
    done = True
    for pid in pids:
        try:
            os.setpriority(os.PRIO_PROCESS, pid, nice)
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))
        except OSError as error:
            done = isinstance(error, ProcessLookupError | FileNotFoundError) and done
    return done


def busy_seconds(cpus: Iterable[int]) -> dict[int, float]:
    """CPU time used since boot by everything, time stolen by the host included."""
    found = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cpus:
            ticks = list(map(int, values[:8]))
            found[int(name[3:])] = (sum(ticks) - ticks[3] - ticks[4]) / TICKS
    return found


def connections_by_process(pids: Iterable[int], port: int) -> dict[int, int]:
    """How many established connections to `port` each process holds."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "01" and int(fields[1].rpartition(":")[2], 16) == port:
            inodes.add(fields[9])
    counts = {}
    for pid in pids:
        links = []
        with contextlib.suppress(OSError):
            links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
        if held := sum(link[8:-1] in inodes for link in links if link.startswith("socket:")):
            counts[pid] = held
    return counts


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return []
