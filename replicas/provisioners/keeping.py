"""What is kept of a SkyPilot replica's output in its folder, without secrets; people read it after its end.

    output.log        what SkyPilot told of the launch, then all that `setup` and `run` printed, as it came
    output.1.log      what came before, once that has LOG_BYTES: one such file is kept
    provision.log     SkyPilot's own log of the provisioning; provision-1.log ... of the other nodes
    rank-0.log ...    of a replica of several nodes: its last 10,000 lines of each rank
    secrets.json      what to mask, 0600, until the replica is gone: it outlives flags and gateways

Ranks are told apart by what SkyPilot puts before each line of a job: `(head, rank=0, pid=9) `, `(worker1,
rank=1, pid=9, ip=10.0.0.12) `. The files of each rank that `sky logs --sync-down` brings are not fetched: on
their way they lie unmasked in the API server's and our own ~/sky_logs. (SkyPilot's logs on the API server's
machine are out of our reach, and not masked.)
"""
from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from replicas.masking import Mask, Masking
from replicas.provisioners import clusters, folder
from replicas.provisioners.launcher import LOG, write_atomically

if TYPE_CHECKING:
    from replicas.provisioners.sdk import Sky

log = logging.getLogger(__name__)

PROVISION: Final = "provision.log"
LAST_LINES: Final = 10_000       # of each rank
SAVE_SECONDS: Final = 20.0       # that a down may wait for logs: on a dead machine each second costs money
RETRY_SECONDS: Final = 2.0       # SkyPilot has a provision log some seconds after the launch has begun
RESUME_SECONDS: Final = 10.0     # the lines of a log that were kept before come at once
LOG_BYTES: Final = 256 << 20     # a server that logs each request writes as much in a day
_OVERLAP_LINES: Final = 20       # so many in a row are the same lines, not the same words
_OVERLAP_BYTES: Final = 65_536   # of a file's end, to find them in
_SECRETS: Final = "secrets.json"


def keep_secrets(directory: Path, values: Iterable[str]) -> None:
    """On disk when this returns."""
    write_atomically(str(directory / _SECRETS), {"values": sorted({value for value in values if value})})


def mask(directory: Path) -> Mask:
    """Of the replica; of what looks like a secret alone, when none are known of it."""
    try:
        return Mask(json.loads((directory / _SECRETS).read_bytes())["values"])
    except FileNotFoundError:
        return Mask()


def finish(directory: Path) -> None:
    """The replica is gone; what it printed stays, now by rank too: that takes seconds of a log of gigabytes,
    which no machine waits for."""
    try:
        split(directory)
    except OSError as error:   # a full disk
        log.warning("%s: its log could not be split by rank: %s", directory.name, error)
    folder.forget(directory)
    (directory / _SECRETS).unlink(missing_ok=True)


class MaskedText(io.TextIOBase):
    """Takes text in pieces and hands it on without secrets, a line at a time. For SkyPilot's `print`."""

    def __init__(self, mask: Mask, out: Callable[[str], object]) -> None:
        self._masking = Masking(mask)
        self._out = out

    def write(self, text: str) -> int:
        self._out(self._masking.feed(text))
        return len(text)

    def close(self) -> None:
        if not self.closed:
            self._out(self._masking.end())
        super().close()


class Resumed:
    """Drops what a log that is told again from some lines back has told before. Mutable.

    `known`: the last lines that are kept; only those count that `counts` says are the same each time. They
    are looked for in the first `LAST_LINES`, and for `RESUME_SECONDS`: rather twice than never.
    """

    def __init__(
        self,
        known: Iterable[str],
        out: Callable[[str], object],
        counts: Callable[[str], bool] = bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._known = [line for line in known if counts(line)][-_OVERLAP_LINES:]
        self._counts = counts
        self._out = out
        self._clock = clock
        self._began = clock()
        self._held: list[str] = []
        self._last: deque[str] = deque(maxlen=len(self._known))

    def __call__(self, text: str) -> None:
        if not self._known:
            self._out(text)
            return
        for line in text.splitlines(keepends=True):
            self._held.append(line)
            if self._counts(line):
                self._last.append(line)
            if self._known and list(self._last) == self._known:
                self._held.clear()
                self._known = []
        late = len(self._held) >= LAST_LINES or self._clock() - self._began > RESUME_SECONDS
        if not self._known or late:
            self.end()

    def end(self) -> None:
        """No more is looked for."""
        held, self._held, self._known = self._held, [], []
        self._out("".join(held))


def before(path: Path) -> Path:
    """Where the older part of a log is, if there is one."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


@contextlib.contextmanager
def appending(directory: Path, name: str = LOG) -> Iterator[MaskedText]:
    """A stream to the file, masked; what was written is there at once. It may repeat what is in the file."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / name
    known = _last_lines(path)
    with contextlib.ExitStack() as files:
        file = files.enter_context(open(path, "a", encoding="utf-8", opener=folder.private))

        def put(text: str) -> None:
            nonlocal file
            file.write(text)
            file.flush()
            if name == LOG and file.tell() >= LOG_BYTES and text.endswith("\n"):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):   # else another has done it
                    os.replace(path, before(path))
                files.close()
                file = files.enter_context(open(path, "a", encoding="utf-8", opener=folder.private))

        # Around a job's lines SkyPilot's own differ each time.
        resumed = Resumed(known, put, is_said if name == LOG else bool)
        try:
            with MaskedText(mask(directory), resumed) as stream:
                yield stream
        finally:
            resumed.end()


class ProvisionLog(threading.Thread):
    """A daemon thread: keeps the log of one launch, from when there is one until the machines are UP."""

    def __init__(self, sky: Sky, cluster: str, directory: Path) -> None:
        super().__init__(name=f"skypilot provision log {cluster}", daemon=True)
        self._sky = sky
        self._cluster = cluster
        self._directory = directory
        self._over = threading.Event()

    def stop(self) -> None:
        """The launch is over: there will be no log if there is none yet."""
        self._over.set()

    def run(self) -> None:
        while True:
            try:
                with appending(self._directory, PROVISION) as out:
                    self._sky.tail_provision_logs(self._cluster, None, True, 0, out)
                return
            except Exception as error:   # mostly 404: it is not recorded yet
                log.debug("%s: no provision log: %s", self._cluster, error)
            if self._over.wait(RETRY_SECONDS):
                return


# ------------------------------------------------------------ before a down


def save(sky: Sky, cluster: str, directory: Path, *, followed: bool) -> None:
    """Fetch what is not kept yet of a replica that is about to be ended; never long, never raises.

    `followed`: output.log has all that it printed.
    """
    if not directory.is_dir():
        return   # it was never launched from here
    fetched = _Fetched(sky, cluster, directory, followed)
    fetched.start()
    fetched.join(SAVE_SECONDS)
    if fetched.is_alive():
        log.warning("%s: not all its logs came in %.0f s: it is ended now", cluster, SAVE_SECONDS)
    try:
        fetched.store()
    except OSError as error:   # a full disk must not keep a machine that bills
        log.warning("%s: its logs could not be saved: %s", cluster, error)


class _Fetched(threading.Thread):
    """A daemon thread that asks SkyPilot, into memory: when it is late, nobody waits for it any more."""

    def __init__(self, sky: Sky, cluster: str, directory: Path, followed: bool) -> None:
        super().__init__(name=f"skypilot saves logs {cluster}", daemon=True)
        self._sky = sky
        self._cluster = cluster
        self._directory = directory
        self._followed = followed
        self._mask = mask(directory)
        self._files: dict[str, str] = {}   # whole ones, by name

    def run(self) -> None:
        sky, name = self._sky, self._cluster
        nodes, up = 1, False
        with self._tolerant():
            for cluster in clusters.listed(sky, name):
                nodes = int(getattr(cluster.handle, "launched_nodes", 1) or 1)
                up = cluster.status.value == "UP"
        path = self._directory / PROVISION
        if not path.exists() or not path.stat().st_size:
            self._fetch(PROVISION, self._provision)
        for worker in range(1, nodes):
            self._fetch(f"provision-{worker}.log", partial(self._provision, worker=worker))
        if up and not self._followed:
            self._fetch(LOG, lambda out: sky.tail_logs(name, None, False, LAST_LINES * nodes, out))

    def _provision(self, out: MaskedText, worker: int | None = None) -> None:
        self._sky.tail_provision_logs(self._cluster, worker, False, LAST_LINES, out)

    def _fetch(self, file: str, ask: Callable[[MaskedText], object]) -> None:
        pieces: list[str] = []
        with self._tolerant():
            with MaskedText(self._mask, pieces.append) as out:
                ask(out)
            self._files[file] = "".join(pieces)

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:   # of any kind: a dead cluster, no such log, an old API server
            log.info("%s: %s", self._cluster, self._mask(str(error)))

    def store(self) -> None:
        for file, text in [(file, text) for file, text in self._files.items() if text]:
            with appending(self._directory, file) as out:
                out.write(text)


def _last_lines(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _OVERLAP_BYTES))
            return file.read().decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []


# ------------------------------------------------------------ ranks

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SPEAKER = re.compile(r"\((?P<who>[^()]*\bpid=\d+[^()]*)\)")


class Ranks:
    """Says whose line it is. Mutable: the ranks' addresses, learnt from their lines."""

    def __init__(self) -> None:
        self._by_address: dict[str, int] = {}

    def of(self, line: str) -> int:
        """0 for what SkyPilot itself says, and for all of a single node."""
        speaker = _SPEAKER.match(_ANSI.sub("", line))
        if not speaker:
            return 0
        facts = dict(fact.split("=", 1) for fact in speaker["who"].replace(",", " ").split() if "=" in fact)
        address = facts.get("ip", "")
        if "rank" not in facts:   # `(setup pid=9, ip=10.0.0.12)`
            return self._by_address.get(address, 0) if address else 0
        rank = int(facts["rank"]) if facts["rank"].isdecimal() else 0
        if address:
            self._by_address[address] = rank
        return rank


def by_rank(path: Path, most: int = LAST_LINES) -> dict[int, deque[str]]:
    """The last lines of each rank in a log. Read twice: a worker's setup comes before its rank is told."""
    ranks, found = Ranks(), dict[int, deque[str]]()
    for again in (False, True):
        for part in filter(Path.exists, (before(path), path)):
            with open(part, encoding="utf-8", errors="replace", newline="\n") as file:
                for line in file:
                    rank = ranks.of(line)
                    if again:
                        found.setdefault(rank, deque(maxlen=most)).append(line)
    return found


def rank_file(rank: int) -> str:
    return f"rank-{rank}.log"


def split(directory: Path) -> None:
    """Write the rank files, where there are several ranks."""
    if not (directory / LOG).exists():
        return
    found = by_rank(directory / LOG)
    if len(found) < 2:
        return
    for rank, lines in found.items():
        with open(directory / rank_file(rank), "w", encoding="utf-8", opener=folder.private) as out:
            out.writelines(lines)


def is_said(line: str) -> bool:
    """Whether a process of the job printed it: SkyPilot says so before it."""
    return _SPEAKER.match(_ANSI.sub("", line)) is not None


def said(line: str) -> str:
    """What the replica itself printed, without colours; "" for what SkyPilot and Slurm say around it."""
    line = _ANSI.sub("", line)
    speaker = _SPEAKER.match(line)
    return line[speaker.end() :].strip() if speaker else ""


def has_words(directory: Path) -> bool:
    """Whether output.log ends with what a process of the job has printed."""
    path = directory / LOG
    return any(map(is_said, _last_lines(before(path)) + _last_lines(path)))


def mentions(directory: Path, words: str, *, last_bytes: int = 65_536) -> bool:
    """Whether the end of output.log has these words."""
    try:
        with open(directory / LOG, "rb") as file:
            file.seek(max(0, (directory / LOG).stat().st_size - last_bytes))
            return words.encode() in file.read()
    except FileNotFoundError:
        return False
