"""`python -m tests.chaos`: see README.md here, or --help. Exits 1 on any violation."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos import audit
from tests.chaos.bed import WORKERS, Bed, BedError, exists, until
from tests.chaos.client import Ask, Client, Outcome
from tests.chaos.faults import Faults

SHOWN = 20  # violations printed of each sort
LONG = 10_000  # requests from which a run has blackouts of 20 s, and its memory can be judged
IDLE_SECONDS = 15.0  # the gateway's time to close what it keeps for the next request


class Run:
    """One run. Mutable: `outcomes`; `rss`, MiB by process of the gateway, once a second."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.bed = Bed(folder)
        self.faults = Faults(self.bed, options.seed, long=options.requests >= LONG)
        self.outcomes: list[Outcome] = []
        self.rss: dict[tuple[str, int], list[int]] = {}

    async def run(self) -> dict[str, list[str]]:
        """Everything; returns the violations by sort. Raises BedError."""
        bed = self.bed
        await bed.start()
        idle = {role: max(audit.sockets(p) for p, r in bed.children().items() if r == role)
                for role in ("supervisor", "controller", "worker")}  # fmt: skip
        client = Client("127.0.0.1", bed.port)
        trouble, watch = asyncio.ensure_future(self.faults.run()), asyncio.ensure_future(self._watch())
        began = time.monotonic()
        load = asyncio.ensure_future(self._load(client))
        await asyncio.wait((load, trouble), return_when=asyncio.FIRST_COMPLETED)
        if not load.done():
            load.cancel()
        trouble.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await trouble
        watch.cancel()
        self.seconds = time.monotonic() - began
        await load
        client.close()
        await self.faults.heal()
        after = [await client.ask(Ask(f"after{i}", "short", i % 2 == 0, 5, fresh=True)) for i in range(20)]
        self.outcomes += after
        await asyncio.sleep(0.2)
        assert bed.board is not None
        with contextlib.suppress(BedError):
            await until("the board is at rest", lambda: bed.board and not audit.board(bed.board), 10)
        found = {"board": audit.board(bed.board), "clients": audit.clients(self.outcomes)}
        sick = [o for o in after if o.what != "complete"]
        found["well again"] = [f"{o.ask.marker} {o.what} {o.status} {o.why}" for o in sick]
        self.ends = audit.metric_ends(await bed.metrics())
        access, kills = audit.access_ends(bed.access), self.faults.counts["worker"]
        found["ends"] = audit.ends(self.outcomes, self.ends, access, kills)
        self.logged = len(access)
        journals = {replica.name: replica.journal for replica in bed.replicas}
        found["runs"], self.runs, self.again = audit.runs(self.outcomes, journals)
        found["sockets"] = await self._sockets(idle)
        code = await bed.stop()
        left = [pid for pid in bed.pids if exists(pid)]
        found["processes"] = [f"the gateway's exit code is {code}"] if code != 0 else []
        found["processes"] += [f"pid {pid} of the gateway still runs" for pid in left]
        if self.options.requests >= LONG:
            found["memory"] = audit.memory(self.rss)
        found["log"] = [line for line in bed.log() if "Traceback" in line or "fault of the gateway" in line]
        return found

    async def _load(self, client: Client) -> None:
        """`--requests` at `--rate` a second, at most `--concurrency` at one time."""
        options, tasks = self.options, set()
        room = asyncio.Semaphore(options.concurrency)

        async def one(number: int) -> None:
            try:
                outcome = await client.ask(Ask.make(number, options.seed), held=self.faults.blackout)
                self.outcomes.append(outcome)
            finally:
                room.release()

        began = time.monotonic()
        for number in range(options.requests):
            if (ahead := began + number / options.rate - time.monotonic()) > 0.002:
                await asyncio.sleep(ahead)
            await room.acquire()
            task = asyncio.ensure_future(one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _watch(self) -> None:
        while True:
            for pid, role in self.bed.children().items():
                self.rss.setdefault((role, pid), []).append(audit.rss(pid))
            await asyncio.sleep(1)

    async def _sockets(self, idle: dict[str, int]) -> list[str]:
        """What each process has open beyond what it had before the first request. The controller keeps
        connections to the replicas it asks."""
        spare = {"controller": 2 * len(self.bed.replicas)}
        whole = Counter(supervisor=1, controller=1, worker=WORKERS)

        def over() -> list[str]:
            children = self.bed.children()
            roles = Counter(children.values())
            return [f"processes: {dict(roles)}" for _ in range(roles != whole)] + [
                f"{role} {pid} has {count} sockets open, {idle[role]} when idle"
                for pid, role in children.items()
                if (count := audit.sockets(pid)) > idle[role] + spare.get(role, 0)
            ]

        with contextlib.suppress(BedError):
            await until("idle", lambda: not over(), IDLE_SECONDS)
        return over()

    def report(self) -> str:
        """What happened, for a person."""
        rate = len(self.outcomes) / self.seconds
        ends = ", ".join(f"{end} {n}" for end, n in sorted(self.ends.items()))
        lines = [
            f"seed {self.options.seed}: {len(self.outcomes)} requests in {self.seconds:.0f} s ({rate:.0f}/s)",
            "faults: " + ", ".join(f"{name} {n}" for name, n in sorted(self.faults.counts.items())),
            audit.table(self.outcomes),
            f"ends in /metrics: {ends}; together {self.ends.total()}; in the access log {self.logged}",
            f"runs on the replicas {self.runs}; requests that ran more than once {self.again}",
        ]
        for (role, pid), seen in sorted(self.rss.items(), key=lambda item: -len(item[1]))[:5]:
            early, late, most = seen[len(seen) // 4], seen[-1], max(seen)
            lines.append(f"RSS of {role} {pid}: {early} MiB after a quarter, {late} at its end, most {most}")
        return "\n".join(lines)


def main() -> int:
    flags = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    flags.add_argument("--requests", type=int, default=100_000)
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--rate", type=float, default=400, help="requests a second")
    flags.add_argument("--concurrency", type=int, default=300, help="at most so many open at one time")
    flags.add_argument("--keep", action="store_true", help="keep the folder with logs and journals")
    options = flags.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: unix socket paths are limited to 103 bytes
    run = Run(options, folder)
    keep = True
    try:
        found = asyncio.run(run.run())
        print(run.report())
        for sort, lines in found.items():
            print(f"{sort:12} {'ok' if not lines else f'{len(lines)} VIOLATIONS'}")
            for line in lines[:SHOWN]:
                print(f"    {line}")
        keep = options.keep or any(found.values())
        return int(any(found.values()))
    except BedError as error:
        print(error)
        return 1
    finally:
        run.bed.clean_up()
        if keep:
            print(f"logs and journals: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
