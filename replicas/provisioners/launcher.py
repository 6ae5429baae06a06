"""The small parent of a local replica: records itself, runs `setup` and `run`, records how they ended.

Started by local.py as `python -I -S launcher.py`; standard library only, to be up in some 20 ms. Two steps
make sure that no process is ever lost, whoever dies when:

1. The gateway takes an flock on `<dir>/lock` *before* it starts us and we inherit it: from before our first
   instruction until our last, "locked" means "somebody runs this replica, or is about to".
2. `process.json` (pid **and** start time) is on disk before the first command of the YAML starts. A gateway
   that comes back finds the replica there, and never mistakes a recycled pid for it.

We fork once and let the first process end, so no gateway is our parent: it has nothing to reap, and a replica
looks the same to the gateway that launched it and to the one that adopted it. We lead a session of our own;
all that the YAML starts is in it, unless it leaves on purpose (then its REPLICA_DIR still tells).

What the YAML's commands print goes through a second process of ours, the pump, which masks secrets before
they reach the disk. It must live as long as they do, whatever becomes of the gateway, so it is a child of the
launcher: it ignores the signals that end a replica and ends when the last writer has.
"""
from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import sys
import time
from typing import Any

RECORD = "process.json"
"""{"id", "pid", "started", "port", "spec_hash", "launched_at"}; there until the replica is terminated."""

ENDED = "exit.json"
"""{"stage": "setup" | "run", "code": int}; code < 0: killed by that signal. There once it ended by itself."""

LOCK = "lock"
LOG = "output.log"
SAYS = "[replica] "   # starts each line that we add to the output ourselves

_PIECE = 65_536        # bytes: a whole pipe
_PUMP_SECONDS = 1.0


def started(pid: int) -> str | None:
    """When the process began, in words that differ for every other process with this pid; None: no such.

    Linux: boot id and clock ticks since boot (10 ms; /proc/<pid>/stat field 22). Elsewhere: ps, in seconds.
    A zombie counts as none.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None if os.path.exists("/proc/self/stat") else _started_by_ps(pid)
    return None if fields[0] in (b"Z", b"X") else f"{boot}:{int(fields[19])}"


def _started_by_ps(pid: int) -> str | None:
    import subprocess

    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    plain = {**os.environ, "LC_ALL": "C"}
    ps = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    state, _, since = ps.stdout.strip().partition(" ")
    return since.strip() if since and not state.startswith("Z") else None


def write_atomically(path: str, value: dict[str, Any]) -> None:
    """The whole file or none of it, readable by us alone, on disk when this returns."""
    part = f"{path}.{os.getpid()}.{_thread.get_ident()}"
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class _Stopping:
    """Mutable by signals alone. They are meant for the commands; we outlive those to say how they ended."""

    asked = False

    def __call__(self, number: int, frame: object) -> None:
        self.asked = True


_FATAL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _run(shell: str, script: str) -> int:
    """Run one script to its end; its exit code, or -signal."""
    # Blocked over the fork: a SIGTERM to the child before its exec waits until it is the child's to die of.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FATAL)
    child = os.fork()
    if child == 0:
        try:
            for number in (*_FATAL, signal.SIGPIPE, signal.SIGXFSZ):   # the last two Python itself ignores
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.execv(shell, [shell, "-c", script])
        except OSError as error:
            os.write(2, f"{SAYS}cannot run {shell}: {error}\n".encode())
        finally:
            os._exit(127)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _begin_pump(secrets: list[str], lock: int) -> int:
    """From here on what is written to 1 and 2 reaches output.log without secrets; the pump's pid."""
    reading, writing = os.pipe()
    pump = os.fork()
    if pump == 0:
        try:
            for number in _FATAL:
                signal.signal(number, signal.SIG_IGN)
            for descriptor in (1, writing, lock):
                os.close(descriptor)
            _pump(reading, 2, secrets)
        finally:
            os._exit(0)
    os.close(reading)
    for descriptor in (1, 2):
        os.dup2(writing, descriptor)
    os.close(writing)
    return pump


def _pump(source: int, log: int, secrets: list[str]) -> None:
    """Until the last writer is gone. What cannot be masked or written is lost: the replica goes on."""
    try:
        import codecs

        sys.path.append(os.path.abspath(f"{__file__}/../../.."))   # last: no module of ours hides another
        from replicas.masking import Mask, Masking

        masking, decoder = Masking(Mask(secrets)), codecs.getincrementaldecoder("utf-8")("replace")
    except Exception as error:
        os.write(log, f"{SAYS}nothing is kept of what it prints, for secrets in it: {error!r}\n".encode())
        while os.read(source, _PIECE):
            pass
        return
    while True:
        data = os.read(source, _PIECE)
        text = masking.feed(decoder.decode(data, final=not data)) + ("" if data else masking.end())
        left = text.encode()
        with contextlib.suppress(OSError):   # a full disk
            while left:
                left = left[os.write(log, left) :]
        if not data:
            return


def _await(pump: int) -> None:
    """Until all that was printed is on the disk; a while only, since what outlives `run` may keep it open."""
    deadline = time.monotonic() + _PUMP_SECONDS
    while os.waitpid(pump, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.005)


def _say(words: str) -> None:
    with contextlib.suppress(OSError):   # the pump was killed
        os.write(2, f"{SAYS}{words}\n".encode())


def main() -> None:
    # EOF ends the order: a gateway that dies while writing it leaves no JSON, hence no replica.
    order: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    os.set_inheritable(order["lock_fd"], False)
    stopping = _Stopping()
    for number in _FATAL:
        signal.signal(number, stopping)
    directory: str = order["dir"]
    us = {"pid": os.getpid(), "started": started(os.getpid())}
    try:
        write_atomically(f"{directory}/{RECORD}", order["record"] | us)
    except OSError as error:
        os.write(1, str(error).encode())
        os._exit(1)
    with contextlib.suppress(BrokenPipeError):   # the gateway that asked is dead; the next one finds us
        os.write(1, b"ok")
    os.dup2(2, 1)   # closes the pipe on which launch() waits; 2 is output.log
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pump = _begin_pump(order.get("secrets", ()), order["lock_fd"])
    stage, code = "run", 0
    for stage in ("setup", "run"):
        if stopping.asked or not order[stage]:
            continue
        _say(f"{stage} started")
        code = _run(order["shell"], order[stage])
        if code != 0:
            break
    _say(f"{stage} ended with code {code}")
    silent = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(silent, descriptor)
    _await(pump)
    write_atomically(f"{directory}/{ENDED}", {"stage": stage, "code": code})


if __name__ == "__main__":
    main()
