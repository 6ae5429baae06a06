"""Keys and limits from files: what they may say, and what a closed terminal means."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from gateway.settings import Settings, SettingsError, make, with_files

from .test_supervisor import CONTROLLER, MAIN, PRELUDE, WORKER, Start, start

__all__ = ["start"]  # the fixture


def made(folder: Path, keys: str = "", limits: str = "", **values: object) -> Settings:
    """Settings with both files."""
    (folder / "keys").write_text(keys)
    (folder / "limits").write_text(limits)
    files = {"api_keys_file": folder / "keys", "limits_file": folder / "limits"}
    return make(state_dir=folder, **{name: str(path) for name, path in files.items()}, **values)


def test_the_files_add_to_and_overrule_the_flags_and_comments_say_nothing(tmp_path: Path) -> None:
    keys = "# who may\nalice=12345678\n\n  bob=abcdefgh # new\n"
    limits = "max-waiting = 5  # few\n--beat-every=2.5\nmax_body=1000\n"
    settings = with_files(made(tmp_path, keys, limits, api_key=["root=87654321"], max_waiting=7))
    assert [name for name, _ in settings.api_key] == ["root", "alice", "bob"]
    assert (settings.max_waiting, settings.beat_every, settings.max_body) == (5, 2.5, 1000)


def test_what_a_file_no_longer_says_is_as_the_flags_say_again(tmp_path: Path) -> None:
    settings = made(tmp_path, "alice=12345678", "max-waiting=5", max_waiting=7)
    assert settings.max_waiting == 7
    (tmp_path / "limits").write_text("")
    (tmp_path / "keys").write_text("")
    assert (with_files(settings).max_waiting, with_files(settings).api_key) == (7, ())


@pytest.mark.parametrize(
    ("keys", "limits", "says"),
    [
        ("alice", "", "--api-keys-file wants NAME=KEY"),
        ("alice=short", "", "--api-keys-file, alice=...: the key has 5 characters"),
        ("alice=12345678\nalice=87654321", "", "--api-keys-file: the name 'alice' is there twice"),
        ("", "max-waiting", "limits, line 1: wants NAME=VALUE"),
        ("", "\nport=80", "limits, line 2: wants NAME=VALUE, with NAME one of max-body, "),
        ("", "max-waiting=many", "--max-waiting .* wants a whole number, not 'many'"),
        ("", "max-body=0", "--max-body must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_it(tmp_path: Path, keys: str, limits: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        made(tmp_path, keys, limits)
    assert "\n" not in str(caught.value)
    assert "12345678" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--api-keys-file /nowhere/keys: No such file"):
        make(state_dir=tmp_path, api_keys_file="/nowhere/keys")


def test_an_open_port_needs_keys_and_those_of_the_file_will_do(tmp_path: Path) -> None:
    settings = made(tmp_path, "alice=12345678", host="0.0.0.0")
    (tmp_path / "keys").write_text("# none")
    with pytest.raises(SettingsError, match="lets other machines in"):
        with_files(settings)


def test_a_hangup_is_no_stop_and_says_what_it_wants(start: Start) -> None:
    gateway = start()
    gateway.started(2)
    gateway.process.send_signal(signal.SIGHUP)
    assert gateway.ask() > 0
    code, said = gateway.end()
    assert code == 0
    assert "nothing to read again, without --api-keys-file and --limits-file" in said


# Serves once the file `go` is there; hears a SIGHUP only then.
LATE = """
note(f"worker {child.index} started")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while not (home / "go").exists():
    time.sleep(0.02)
signal.signal(signal.SIGHUP, lambda *_: note(f"{child.news().max_body} bytes"))
child.serves()
while True:
    time.sleep(60)
"""


def test_a_worker_that_still_starts_hears_of_a_hangup_when_it_serves_and_does_not_die_of_it(
    start: Start, tmp_path: Path
) -> None:
    limits = tmp_path / "limits"
    limits.write_text("max-body=1000")
    gateway = start(worker=LATE, limits_file=limits)
    gateway.started(2)
    limits.write_text("max-body=2000")
    gateway.process.send_signal(signal.SIGHUP)
    assert gateway.process.stderr is not None
    while "read again" not in gateway.process.stderr.readline():
        pass
    (gateway.home / "go").touch()
    gateway.until(lambda: "2000 bytes" in gateway.notes())
    limits.write_text("max-body=3000")
    gateway.process.send_signal(signal.SIGHUP)
    gateway.until(lambda: "3000 bytes" in gateway.notes())
    assert gateway.end()[0] == 0
    assert gateway.notes().count("worker 0 started") == 1


def test_the_hangup_of_a_terminal_that_is_closed_stops(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    code = {"worker": PRELUDE + WORKER, "controller": PRELUDE + CONTROLLER}
    given = {"home": str(tmp_path / "state"), "workers": 1, "end_replicas": False, "code": code}
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, json.dumps(given)],
        stdin=slave, stderr=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    try:
        notes = tmp_path / "state" / "notes"
        while process.poll() is None and not (notes.exists() and notes.read_text().count("started") == 2):
            time.sleep(0.02)  # between two looks at another process
        os.close(master)
        assert process.wait(timeout=20) == 0
        assert notes.read_text().splitlines()[-1] == "controller leaves"
    finally:
        process.kill()
        process.wait()
