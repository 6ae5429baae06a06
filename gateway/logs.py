"""What replicas printed: `<state dir>/replicas/<id>/output.log` and the logs beside it, kept for two weeks.

They hold no secrets: those were masked before they reached the disk (replicas/masking.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from replicas.provisioners.keeping import PROVISION, Ranks, before, by_rank, rank_file

FOLDER = "replicas"
FILE = "output.log"
# A replica's id is a cluster name; it also names a folder here, so nothing else may pass.
_ID = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,126}[a-z0-9])?")
FOLLOW_SECONDS = 0.2
SHOWN_REPLICAS = 10  # in an error; the newest
CHUNK_BYTES = 64 * 1024
# Lines are looked for in so much of the file's end; a progress bar of hours can be one line of megabytes.
TAIL_BYTES = 4 * 1024 * 1024
# What a dead replica printed is kept for two weeks after it was last written to.
KEPT_SECONDS = 14 * 86_400
TIDY_SECONDS = 3600


class NoLog(Exception):
    """There is no such log. One line, for a person, with what there is instead."""


@dataclass(frozen=True, slots=True)
class Selected:
    path: Path
    rank: int | None = None  # only what this one printed


def select(state_dir: Path, replica: str, *, provision: bool = False, rank: int | None = None) -> Selected:
    """A log of a replica, dead or alive. Raises NoLog."""
    folder = state_dir / FOLDER / replica
    if not _ID.fullmatch(replica) or not (folder / FILE).is_file():
        known = ", ".join(one["id"] for one in known_replicas(state_dir)[:SHOWN_REPLICAS])
        there = f"there is {known}" if known else "no replica has printed anything yet"
        raise NoLog(f"no output of a replica {replica!r}: {there}")
    if provision:
        path = folder / (PROVISION if not rank else f"provision-{rank}.log")
        if not path.is_file():
            raise NoLog(
                f"{replica} has no {path.name}: SkyPilot writes one some seconds after a launch has begun,"
                " and of other nodes it is fetched at the end; what runs on this machine has none"
            )
        return Selected(path)
    if rank is not None and (folder / rank_file(rank)).is_file():
        return Selected(folder / rank_file(rank))
    return Selected(folder / FILE, rank)


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


def read(log: Selected, lines: int) -> tuple[str, int]:
    """Its last `lines` lines, and the offset in bytes up to which was read. Raises NoLog: of no such rank."""
    if log.rank is None:
        return tail(log.path, lines)
    end = log.path.stat().st_size
    found = by_rank(log.path, lines)
    if log.rank not in found:
        ranks = ", ".join(map(str, sorted(found))) or "none yet"
        raise NoLog(f"{log.path.parent.name} has printed nothing as rank {log.rank}: its ranks are {ranks}")
    return "".join(found[log.rank]), end


def tail(path: Path, lines: int) -> tuple[str, int]:
    """The last `lines` lines, and the offset in bytes up to which was read."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - TAIL_BYTES))
        data = file.read(end - file.tell())
    if len(data) < TAIL_BYTES and (older := before(path)).exists():
        with older.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (TAIL_BYTES - len(data))))
            data = file.read() + data
    kept = data.splitlines(keepends=True)[-lines:] if lines else []
    return b"".join(kept).decode(errors="replace"), end


async def follow(log: Selected, text: str, offset: int, live: Callable[[], bool]) -> AsyncIterator[bytes]:
    """`text`, then what is written from `offset` on, until the replica is not `live` and all of it is
    read."""
    ranks, rest = Ranks(), b""
    with contextlib.ExitStack() as files:
        file = files.enter_context(log.path.open("rb"))
        file.seek(offset)
        yield text.encode()
        while True:
            more = live()  # asked before the read: what was written before its end is still sent
            anew = _is_another(file, log.path)  # and so is what was written before it began anew
            while data := file.read(CHUNK_BYTES):
                if log.rank is None:
                    yield data
                    continue
                whole, end, rest = (rest + data).rpartition(b"\n")
                lines = (whole + end).splitlines(keepends=True)
                ours = [line for line in lines if ranks.of(line.decode(errors="replace")) == log.rank]
                if ours:
                    yield b"".join(ours)
            if anew:
                files.close()
                file = files.enter_context(log.path.open("rb"))
            elif not more:
                return
            else:
                await asyncio.sleep(FOLLOW_SECONDS)


def _is_another(file: BinaryIO, path: Path) -> bool:
    """Whether the log has begun anew since it was opened (keeping.LOG_BYTES)."""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:  # in between
        return False
