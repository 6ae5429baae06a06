"""The state dir as the processes on this machine share it: its lock, and the file that says where a gateway
is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOCK_FILE = "gateway.lock"
ADDRESS_FILE = "gateway.json"
METRICS_FOLDER = "metrics"
# Children of a killed supervisor leave at once; one that is inside a system call gets this long.
LOCK_WAIT_SECONDS = 10.0


class StateDirBusy(Exception):
    """Another gateway lives in this state dir, or in the one that it is a copy of. The text is one line and
    says what to do next."""


def is_alive(pid: int) -> bool:
    """Whether a process with this id runs; one that only waits to be reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # no /proc on macOS
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
    return True


def lock(
    folder: Path,
    *,
    wait_s: float = LOCK_WAIT_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Make the state dir (0700), take it and return the descriptor that holds it: with `flock`, so it is free
    when the last process that inherited the descriptor is gone. Waits for the children of a killed gateway,
    and for one that is about to exit.

    Raises StateDirBusy naming the holder.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateDirBusy(
            f"the state dir {folder} cannot be used ({error.strerror}): give --state-dir a folder of your own"
        ) from None
    original = _copied_from(folder)
    if original is not None:
        os.close(fd)
        raise StateDirBusy(
            f"the state dir {folder} is a copy of {original}, so both would own the same replicas and end"
            f" each other's: use that one, or delete state.db and {ADDRESS_FILE} of the copy"
        )
    deadline = clock() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(fd)
            runs = read_address(folder) is not None  # else it starts, or has ended all and is about to exit
            if holder is not None and is_alive(holder) and (runs or clock() >= deadline):
                os.close(fd)
                raise StateDirBusy(
                    f"a gateway (pid {holder}) already runs with the state dir {folder}: `gateway status`"
                    " shows it, `gateway down` ends it, or give this one a --state-dir of its own"
                ) from None
            if clock() >= deadline:
                os.close(fd)
                raise StateDirBusy(
                    f"the state dir {folder} is still held by processes of a gateway that is gone (it was pid"
                    f" {holder}): end them, or give this one a --state-dir of its own"
                ) from None
            sleep(0.05)
            continue
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} skygate\n".encode(), 0)
        return fd


def _holder(fd: int) -> int | None:
    first = os.pread(fd, 64, 0).split()[:1]
    return int(first[0]) if first and first[0].isdigit() else None


def write_address(folder: Path, values: dict[str, Any]) -> None:
    """Say where the gateway of this state dir listens, for the CLI. Replaced whole: no reader sees half a
    file."""
    new = folder / (ADDRESS_FILE + ".new")
    home = {"path": str(folder.resolve()), "inode": folder.stat().st_ino}
    new.write_text(json.dumps({**values, "home": home}) + "\n")
    new.replace(folder / ADDRESS_FILE)


def _copied_from(folder: Path) -> Path | None:
    """The state dir that this one was copied from, if that still exists; one that was moved is none."""
    try:
        home = _read(folder)["home"]
        original = Path(home["path"])
        if original.stat().st_ino == home["inode"] and not original.samefile(folder):
            return original
    except (OSError, ValueError, KeyError, TypeError):  # none, of an older gateway, or gone
        pass
    return None


def _read(folder: Path) -> Any:
    return json.loads((folder / ADDRESS_FILE).read_text())


def read_address(folder: Path) -> dict[str, Any] | None:
    """What `write_address` said, when that gateway still runs."""
    try:
        values = _read(folder)
    except (OSError, ValueError):
        return None
    running = isinstance(values, dict) and values.get("pid") and is_alive(int(values["pid"]))
    return values if running else None


def running() -> set[Path]:
    """State dirs of the gateways that run on this machine, as far as we may look: by the lock that their
    processes hold. Linux; elsewhere none is found."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for fd in os.listdir(process / "fd"):
                with contextlib.suppress(OSError):
                    target = Path(os.readlink(process / "fd" / fd))
                    if target.name == LOCK_FILE:
                        found.add(target.parent)
    return found


def forget_address(folder: Path) -> None:
    """No gateway runs any more; what `last_start` tells stays."""
    write_address(folder, {"last": last_start(folder)})


def last_start(folder: Path) -> dict[str, Any]:
    """How the gateway was started last (`provisioner`, `replica`): who has to end what it left."""
    try:
        last = _read(folder).get("last", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return last if isinstance(last, dict) else {}


def empty_metrics(folder: Path) -> Path:
    """The folder of prometheus_client's mmap files, without those of an earlier run (they would be summed
    in)."""
    metrics = folder / METRICS_FOLDER
    metrics.mkdir(mode=0o700, exist_ok=True)
    for file in metrics.glob("*.db"):
        file.unlink()
    return metrics
