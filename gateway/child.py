"""What the supervisor hands to a child process, and how a child learns that the supervisor is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from gateway.settings import Settings

VARIABLE = "GATEWAY_CHILD"
# To a worker whose successor serves: go on with what is open, accept nothing more, then leave.
RETIRE = signal.SIGUSR1
# To the supervisor: replace the controller, then each worker.
RESTART = signal.SIGUSR2
# A controller that finished `gateway down`: every replica is verified gone, and the supervisor ends all.
EXIT_DOWN = 64
# A child that can never work as configured (sysexits.h EX_CONFIG): the supervisor gives up, no retry.
EXIT_CONFIG = 78
# A child that found its supervisor dead (sysexits.h EX_OSERR).
EXIT_ORPHANED = 71


@dataclass(frozen=True, slots=True)
class Child:
    """`index`: worker number, 0 for the controller. `fd`: its listening socket. `alive_fd`: end of a pipe
    whose other end only the supervisor has. `lock_fd`: the state dir's lock, open while this process is.
    `ready_fd`: where the child says that it serves. `news_fd`: a nameless file with the settings now in
    force, to be read at a SIGHUP."""

    settings: Settings
    index: int
    fd: int | None
    alive_fd: int
    lock_fd: int
    ready_fd: int | None = None
    news_fd: int | None = None

    def news(self) -> Settings:
        """The settings now in force. Raises ValueError when they are being written: a SIGHUP follows."""
        if self.news_fd is None:
            return self.settings
        return Settings.from_json(json.loads(os.pread(self.news_fd, os.fstat(self.news_fd).st_size, 0)))

    def serves(self) -> None:
        """Tell the supervisor that this process serves now."""
        if self.ready_fd is not None:
            with contextlib.suppress(OSError):  # it is gone, or no longer waits for it
                os.write(self.ready_fd, b"1")

    def to_env(self) -> str:
        return json.dumps(
            {
                "settings": self.settings.to_json(),
                "index": self.index,
                "fd": self.fd,
                "alive_fd": self.alive_fd,
                "lock_fd": self.lock_fd,
                "ready_fd": self.ready_fd,
                "news_fd": self.news_fd,
            }
        )


def read_child() -> Child:
    """The configuration, taken out of the environment: it holds keys, and replicas inherit that."""
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        raise SystemExit("this process is started by `gateway up`, not by hand")
    values: dict[str, Any] = json.loads(text)
    child = Child(
        Settings.from_json(values["settings"]),
        int(values["index"]),
        values["fd"],
        int(values["alive_fd"]),
        int(values["lock_fd"]),
        values.get("ready_fd"),
        values.get("news_fd"),
    )
    for fd in (child.fd, child.alive_fd, child.lock_fd, child.ready_fd, child.news_fd):
        if fd is not None:
            os.set_inheritable(fd, False)  # a replica must hold neither our port nor the lock
    return child


def exit_with_supervisor(alive_fd: int) -> None:
    """End this process the moment the supervisor is gone. A thread: a blocked loop must not delay it."""

    def watch() -> None:
        while True:
            try:
                if not os.read(alive_fd, 1):
                    break
            except InterruptedError:
                continue
            except OSError:
                break
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, name="supervisor-watch", daemon=True).start()
