"""What replicas printed: `<state dir>/replicas/<id>/output.log`, kept after their death."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
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
