"""What the supervisor takes from the operating system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import processes, statedir


def test_signals_become_bytes_and_the_former_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with processes.signals_as_bytes(signal.SIGUSR1) as fd:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert os.read(fd, 10) == bytes([signal.SIGUSR1])
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_hangup_ignored_by_nohup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.signals_as_bytes(signal.SIGHUP) as fd:
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(BlockingIOError):
                os.read(fd, 10)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_orphans_are_reaped_and_our_own_children_left_to_their_owner() -> None:
    ours = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    os.waitid(os.P_PID, ours.pid, os.WEXITED | os.WNOWAIT)
    processes.reap_orphans({ours.pid})
    assert ours.wait(timeout=5) == 3
    stray = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitid(os.P_PID, stray, os.WEXITED | os.WNOWAIT)
    processes.reap_orphans(set())
    with pytest.raises(ChildProcessError):
        os.waitpid(stray, os.WNOHANG)


@pytest.mark.parametrize(
    ("code", "words"), [(0, "exit code 0"), (64, "exit code 64"), (-9, "SIGKILL"), (-250, "signal 250")]
)
def test_an_exit_is_described_in_words(code: int, words: str) -> None:
    assert processes.describe_exit(code) == words


def test_a_process_that_waits_to_be_reaped_does_not_run_any_more() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not statedir.is_alive(child.pid) or not Path("/proc").exists()
    child.wait(timeout=5)
    assert not statedir.is_alive(child.pid)
    assert statedir.is_alive(os.getpid())


def test_the_lock_waits_for_processes_of_a_killed_gateway_and_then_says_so(tmp_path: Path) -> None:
    """The holder named in the file is dead, but a child of it still has the descriptor."""
    held = statedir.lock(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(timeout=5)
    os.ftruncate(held, 0)
    os.pwrite(held, f"{dead.pid} skygate\n".encode(), 0)
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(statedir.StateDirBusy, match=f"still held .*it was pid {dead.pid}"):
        statedir.lock(tmp_path, wait_s=10, clock=lambda: now[0], sleep=sleep)
    assert now[0] == pytest.approx(110, abs=0.2)

    def leave(seconds: float) -> None:
        os.close(held)

    os.close(statedir.lock(tmp_path, wait_s=10, clock=lambda: now[0], sleep=leave))


def test_the_lock_waits_for_a_gateway_that_has_ended_all_and_is_about_to_exit(tmp_path: Path) -> None:
    """`gateway down && gateway up`: the first is told of the end before the process is gone."""
    held = statedir.lock(tmp_path)
    statedir.write_address(tmp_path, {"pid": os.getpid()})
    with pytest.raises(statedir.StateDirBusy, match=f"pid {os.getpid()}. already runs"):
        statedir.lock(tmp_path, sleep=lambda seconds: pytest.fail("it waits for one that runs"))
    statedir.forget_address(tmp_path)

    def leave(seconds: float) -> None:
        os.close(held)

    os.close(statedir.lock(tmp_path, sleep=leave))


def test_a_state_dir_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(statedir.StateDirBusy, match=r"cannot be used .*--state-dir"):
        statedir.lock(tmp_path / "file" / "state")
