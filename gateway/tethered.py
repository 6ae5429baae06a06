"""A gateway as a process of ours: for the demo and the self-test, which are its users.

Exactly what `gateway up` starts, with a log file of its own. It and its replicas end with us, however we end:
it watches a pipe that only we hold (`gateway up --end-replicas`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx

from gateway import processes, statedir
from gateway.settings import SETTINGS

START_SECONDS = 30.0
# Ending means: drain the open answer, end the replica, verify. Usually a second; a cloud takes minutes, so
# there `gateway down` comes first.
STOP_SECONDS = 90.0


class TetherError(Exception):
    """It cannot go on. One line; `log` is a file whose end may say more."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


class Tethered:
    """`start`, or what it calls, `launch`, sets `url` and `admin_url`; leaving the context is `stop`."""

    def __init__(self, folder: Path, say: Callable[[str], object]) -> None:
        self.folder = folder
        self.log = folder / "gateway.log"
        self.url = self.admin_url = ""
        self.say = say
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.launch([])

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def launch(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """`gateway up` with these arguments; GATEWAY_* variables only from `environment`, not from ours.

        Raises TetherError when it does not serve within START_SECONDS; nothing of it runs then.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours = {row.env for row in SETTINGS} | {"GATEWAY_FILE"}
        inherited = {k: v for k, v in os.environ.items() if k not in ours}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *processes.module_command("gateway"),
                    *("up", "--end-replicas", f"--state-dir={self.folder}", *arguments),
                ],
                env={**inherited, **(environment or {})},
                stdin=subprocess.PIPE,  # it ends when we are gone, killed even
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches us, and we end it in order
            )
        try:
            self._wait_until_ready(self._process.pid)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and its replicas. A second Ctrl-C hurries it; only one that hangs is killed."""
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + STOP_SECONDS
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.say("The gateway does not end: killing it.")
                process.kill()
                process.wait()
                self._end_leftovers()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGTERM)
        if process.stdin is not None:
            process.stdin.close()

    def _end_leftovers(self) -> None:
        from gateway.assembly import end_leftovers

        try:
            end_leftovers(self.folder)
        except Exception as error:
            self.say(f"Replicas may be left over: {error}")

    def _wait_until_ready(self, pid: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        with httpx.Client(trust_env=False, timeout=2.0) as http:
            while time.monotonic() < deadline:
                if not self.alive:
                    raise TetherError("the gateway did not start; the end of its log:", self.log)
                address = statedir.read_address(self.folder)
                if address is not None and address["pid"] == pid:
                    self.url, self.admin_url = address["url"], address["admin_url"]
                    with contextlib.suppress(httpx.HTTPError):
                        ready = http.get(f"{self.url}/ready").status_code == 200
                        if ready and http.get(f"{self.admin_url}/health").status_code == 200:
                            return
                time.sleep(0.05)
        raise TetherError(f"the gateway was not ready within {START_SECONDS:.0f} s; its log ends:", self.log)
