"""What replicas printed: `<state dir>/replicas/<id>/output.log`, kept after their death."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

FOLDER = "replicas"
FILE = "output.log"
# A replica's id is a cluster name; it also names a folder here, so nothing else may pass.
_ID = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,126}[a-z0-9])?")
FOLLOW_SECONDS = 0.2
CHUNK_BYTES = 64 * 1024
# Lines are looked for in so much of the file's end; a progress bar of hours can be one line of megabytes.
TAIL_BYTES = 4 * 1024 * 1024
# What a dead replica printed is kept for two weeks after it was last written to.
KEPT_SECONDS = 14 * 86_400
TIDY_SECONDS = 3600


def log_file(state_dir: Path, replica: str) -> Path | None:
    """The output of a replica, dead or alive; None when the id is none of ours or has printed nothing."""
    path = state_dir / FOLDER / replica / FILE
    return path if _ID.fullmatch(replica) and path.is_file() else None


def known_replicas(state_dir: Path) -> list[dict[str, Any]]:
    """Replicas that left output, the newest first: id, size in bytes, time of the last output (unix
    seconds)."""
    found = []
    for path in (state_dir / FOLDER).glob(f"*/{FILE}"):
        if _ID.fullmatch(path.parent.name):
            stat = path.stat()
            found.append({"id": path.parent.name, "bytes": stat.st_size, "modified": stat.st_mtime})
    return sorted(found, key=lambda replica: replica["modified"], reverse=True)


def prune(state_dir: Path, live: Collection[str], now: float, keep: float = KEPT_SECONDS) -> list[str]:
    """Delete the folders of replicas in which nothing was written for `keep` seconds; never of one that is
    `live` or has a record of a process. Returns their ids."""
    gone = []
    for folder in sorted((state_dir / FOLDER).glob("*-gw-*")):
        if folder.name in live or not _ID.fullmatch(folder.name) or folder.is_symlink():
            continue
        if now - _written(folder) > keep and not (folder / "process.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder.name)
    return gone


def _written(folder: Path) -> float:
    """When anything in the folder was last written, unix seconds."""
    latest = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # just removed, by whoever
            latest = max(latest, path.lstat().st_mtime)
    return latest


async def tidy(state_dir: Path, live: Callable[[], Collection[str]]) -> None:
    """Prune now and each hour, until cancelled."""
    while True:
        await asyncio.to_thread(prune, state_dir, live(), time.time())
        await asyncio.sleep(TIDY_SECONDS)


def tail(path: Path, lines: int) -> tuple[str, int]:
    """The last `lines` lines, and the offset in bytes up to which was read."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - TAIL_BYTES))
        data = file.read(end - file.tell())
    kept = data.splitlines(keepends=True)[-lines:] if lines else []
    return b"".join(kept).decode(errors="replace"), end


async def follow(path: Path, text: str, offset: int, live: Callable[[], bool]) -> AsyncIterator[bytes]:
    """`text`, then what is written from `offset` on, until the replica is not `live` and all of it is
    read."""
    yield text.encode()
    with path.open("rb") as file:
        file.seek(offset)
        while True:
            more = live()  # asked before the read: what was written before its end is still sent
            while data := file.read(CHUNK_BYTES):
                yield data
            if not more:
                return
            await asyncio.sleep(FOLLOW_SECONDS)
