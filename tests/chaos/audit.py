"""Whether the gateway kept its promises: what clients, replicas, board, metrics, access log and /proc say of
one run, held against each other. Each finding is one line, and a violation.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from replicas.board import SERVICES, SLOTS, Board
from tests.chaos.client import OUTCOMES, REPLICAS, Outcome

_COUNT = re.compile(r'^gateway_requests_total\{(.*)\} ([0-9.e+]+)$', re.MULTILINE)
_END = re.compile(r'end="(\w+)"')

WATCHED_LEAST = 30  # s; memory of a younger process still warms up
# A worker keeps what its most requests at one time took: 41-45 MiB in the second quarter of two minutes,
# 46-49 in the last. The others hold nothing for requests, and did not move by 1 %.
GROWN = {"worker": 1.2}
GROWN_ELSE = 1.05
TURN = 16  # answers that may be sent in one turn of a worker's loop, before their ends are accounted


def metric_ends(metrics: str) -> Counter[str]:
    """Requests by end, from /metrics."""
    ends: Counter[str] = Counter()
    for labels, value in _COUNT.findall(metrics):
        end = _END.search(labels)
        if end is not None:
            ends[end[1]] += round(float(value))
    return ends


def access_ends(path: Path) -> dict[str, list[str]]:
    """The ends of each request, by its marker, from the access log."""
    ends: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a worker killed while it wrote
            entry = json.loads(line)
            ends[entry["request_id"]].append(entry["end"])
    return ends


def clients(outcomes: Iterable[Outcome]) -> list[str]:
    """No answer that only looks whole, and none that never comes."""
    bad = [o for o in outcomes if o.what in ("false", "stuck")]
    return [f"{o.ask.marker} ({o.ask.kind}) {o.what}: {o.why}" for o in bad]


def ends(
    outcomes: Sequence[Outcome], metrics: Counter[str], access: dict[str, list[str]], kills: int
) -> list[str]:
    """Every accepted request has one end. A worker that dies by SIGKILL between two of its books leaves them
    one apart, and has no end yet for the answers of its last turn of the loop: hence `kills`, of workers.
    """
    found = []
    found += [f"{marker} has {len(e)} ends: {e}" for marker, e in access.items() if len(e) != 1]
    logged = Counter(end for e in access.values() for end in e)
    for end in sorted(set(logged) | set(metrics)):
        if end != "worker_died" and abs(logged[end] - metrics[end]) > kills:
            found.append(f"{end}: {metrics[end]} in /metrics, {logged[end]} in the access log")
    for o in outcomes:
        told = access.get(o.ask.marker, [""])[0]
        if told and (
            (o.what == "complete" and told != "complete")
            or (o.what == "error" and told in ("complete", "client_gone"))
            or (o.what == "broken" and o.seen and told == "complete")
        ):
            found.append(f"{o.ask.marker}: {o.what} ({o.status} {o.why}) for its client, {told} in the log")
    unlogged = [o for o in outcomes if o.ask.marker not in access]
    begun = sum(o.seen for o in unlogged)  # answered in part: accepted for certain
    if not begun - kills <= metrics["worker_died"] <= len(unlogged) + kills:
        found.append(
            f"worker_died is {metrics['worker_died']}, but {len(unlogged)} requests have no end in the log,"
            f" {begun} of which were accepted for certain"
        )
    answered = [o for o in unlogged if o.what not in ("broken", "left")]
    if len(answered) > TURN * kills:
        found += [f"{o.ask.marker} has no end and was {o.what} for its client" for o in answered]
    if not kills and any(o.seen or o.what == "broken" for o in unlogged):
        found.append(f"{len(unlogged)} requests have no end, and no worker was killed")
    return found


def runs(outcomes: Iterable[Outcome], journals: dict[str, Path]) -> tuple[list[str], int, int]:
    """Nothing ran again after a byte. Returns findings, runs, and how many requests ran more than once."""
    events: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for name, journal in journals.items():
        for line in journal.read_text().splitlines():
            what, marker, ns = line.split()
            events[marker].append((int(ns), what, name))
    found, total, again = [], 0, 0
    for marker, its in events.items():
        its.sort()
        count = sum(what == "run" for _, what, _ in its)
        total, again = total + count, again + (count > 1)
        answered = next((at for at, what, _ in its if what == "byte"), None)
        if answered is not None and any(what == "run" and at > answered for at, what, _ in its):
            found.append(f"{marker} ran again after a byte: {[(what, name) for _, what, name in its]}")
    for o in outcomes:
        last = max((event for event in events.get(o.ask.marker, ()) if event[1] == "run"), default=None)
        if o.what == "complete" and (last is None or last[2] != o.source):
            found.append(f"{o.ask.marker} was answered by {o.source}, its last run was {last and last[2]}")
        elif last is not None and o.first_ns and last[0] > o.first_ns:
            found.append(f"{o.ask.marker} ran on {last[2]} after its client had a byte")
    return found, total, again


def board(board: Board) -> list[str]:
    """Nothing in flight, nothing waiting, every arrival ended, in each worker's row."""
    found: list[str] = []
    for index in range(board.workers):
        row = board.worker(index)

        def check(size: int, left: int, right: int | None, text: str, of: int = index) -> None:
            for i in range(size):
                a, b = board.cells[left + i], board.cells[right + i] if right is not None else 0
                if a != b:
                    found.append(f"worker {of}, {i}: {text}: {a} and {b}")

        check(SLOTS, row.started, row.finished, "started and finished")
        check(SERVICES, row.arrived, row.ended, "arrived and ended")
        check(SERVICES, row.waiting, None, "waiting, should be 0")
        check(SERVICES, row.waiting_bytes, None, "waiting bytes, should be 0")
        check(SERVICES, row.oldest, None, "the oldest waiter, should be 0")
    return found


def sockets(pid: int) -> int:
    """Sockets that a process has open."""
    count = 0
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                count += os.readlink(entry).startswith("socket:")
    return count


def rss(pid: int) -> int:
    """Resident memory, MiB; 0 = no such process."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    return 0


def memory(rss: dict[tuple[str, int], list[int]]) -> list[str]:
    """No process has grown from the second quarter of its life to the last, by the least MiB of each: what is
    held or buffered for a while comes and goes. `rss`: MiB once a second, by role and pid."""
    found = []
    for (role, pid), samples in rss.items():
        seen = [mib for mib in samples if mib]  # 0: it was gone when it was asked
        n = len(seen)
        early, late = min(seen[n // 4 : n // 2], default=0), min(seen[3 * n // 4 :], default=0)
        if n >= WATCHED_LEAST and late > early * GROWN.get(role, GROWN_ELSE) + 1:
            found.append(f"{role} {pid} has grown from {early} to {late} MiB in {n} s")
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """Kinds and what became of them, in the client's view."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for o in outcomes:
        for name in ("held" if o.held else o.ask.kind, "all"):
            rows[name][o.what] += 1
    lines = [f"{'':10}" + "".join(f"{what:>10}" for what in ("requests", *OUTCOMES))]
    for name in ("short", "streaming", "held", "cancelled", "all"):
        counts = rows[name]
        lines.append(f"{name:10}{counts.total():10}" + "".join(f"{counts[what]:10}" for what in OUTCOMES))
    why = Counter(f"{o.what}: {o.status or ''} {o.why}" for o in outcomes if o.what in ("error", "broken"))
    lines += [f"  {count:8}  {text}" for text, count in why.most_common(12)]
    by = Counter(o.source for o in outcomes if o.source)
    return "\n".join([*lines, "answered by " + ", ".join(f"{name} {by[name]}" for name in REPLICAS)])
