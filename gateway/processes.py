"""Small things about processes that the supervisor needs from the operating system."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def module_command(module: str) -> list[str]:
    """`python -m module`, without the working directory on the import path: a file of the user's may be
    called like a module of the standard library. (A checkout that is not installed needs it there.)"""
    return [sys.executable, *_safe(), "-m", module]


def trial_command() -> list[str]:
    """Says `ok` where the code on disk can be imported, and can use the settings on stdin and their YAML."""
    code = "import gateway.admin, gateway.app, gateway.assembly; gateway.assembly.trial()"
    return [sys.executable, *_safe(), "-c", code]


def _safe() -> list[str]:
    return ["-P"] if Path.cwd() != Path(__file__).resolve().parent.parent else []


def raise_file_limit() -> None:
    """RLIMIT_NOFILE to its hard limit: each held request is a socket, each running one two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1_048_576
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS refuses more than kern.maxfilesperproc
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def describe_exit(code: int) -> str:
    """How a process ended, for a log line: `exit code 3`, `SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


@contextmanager
def signals_as_bytes(*numbers: signal.Signals) -> Iterator[int]:
    """A descriptor that gets one byte, the signal's number, for each of these signals. Main thread only.

    A SIGHUP that is ignored stays ignored: `nohup` asks for that.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    wanted = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in wanted}
    before_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def reap_orphans(ours: Collection[int]) -> None:
    """As process 1 of a container we inherit the orphans of our replicas, and nobody else reaps them.
    Children in `ours` are left to whoever waits for them."""
    with suppress(ChildProcessError):
        while (gone := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if gone.si_pid in ours:
                return
            os.waitpid(gone.si_pid, 0)
