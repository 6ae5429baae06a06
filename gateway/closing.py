"""The end of a gateway that we have started: nothing of it is left, or we say what and how to end it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.assembly import TABLE_FILE, end_leftovers, make_provisioner
from gateway.client import AdminClient
from gateway.ending import wait_for_down
from replicas.provisioners import InstancesUnknown, owned_by
from replicas.table import Table, TableError, read_ledger

if TYPE_CHECKING:
    from gateway.tethered import Tethered

DOWN_SECONDS = 1800.0  # as long as `gateway down` tries
UNKNOWN_SECONDS = 120.0  # for a provisioner that cannot say what exists
PAUSE_SECONDS = 2.0
ABANDON = "Ending the machines first: a moment, or they go on billing. Ctrl-C once more leaves them."


def owner(folder: Path) -> str:
    """Of a state dir. Raises TableError."""
    with Table(folder / TABLE_FILE) as table:
        return table.owner


def spent(folder: Path) -> float:
    """Dollars, by the ledger."""
    try:
        return sum(entry.dollars for entry in read_ledger(folder / TABLE_FILE, None))
    except TableError:
        return 0.0


def end(gateway: Tethered, provisioner: str, say: Callable[[str], None]) -> list[str]:
    """End replicas and gateway, and ask the provisioner whether that is so. What is left; [] = nothing.

    One Ctrl-C meanwhile is answered with a warning, the second one is heeded.
    """
    for last in (False, True):
        try:
            _end(gateway, say)
            return _listed(gateway.folder, provisioner)
        except KeyboardInterrupt:
            say(ABANDON if not last else "Leaving them.")
        except Exception as error:
            return [f"what is left is not known ({error})"]
    return ["machines may run that were not ended"]


def _end(gateway: Tethered, say: Callable[[str], None]) -> None:
    if gateway.alive and gateway.admin_url:
        try:
            with AdminClient(gateway.admin_url) as client:
                wait_for_down(client, gateway.folder, DOWN_SECONDS)
        except Exception as error:  # it was killed, hangs, or could not: then without it
            say(f"The gateway could not end its replicas ({error}); trying without it.")
    gateway.stop()
    end_leftovers(gateway.folder, say, DOWN_SECONDS)


def _listed(folder: Path, provisioner: str) -> list[str]:
    """Replicas of this state dir's owner that the provisioner itself still has."""
    if not (folder / TABLE_FILE).exists():
        return []  # it never got so far
    return asyncio.run(_ask(folder, provisioner, owner(folder)))


async def _ask(folder: Path, name: str, owner: str) -> list[str]:
    provisioner = make_provisioner(name, folder, owner)
    deadline = time.monotonic() + UNKNOWN_SECONDS
    try:
        while True:
            try:
                return sorted(id for id in await provisioner.instances() if owned_by(id, owner))
            except InstancesUnknown:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(PAUSE_SECONDS)
    finally:
        await provisioner.close()


def by_hand(left: list[str], folder: Path, provisioner: str) -> str:
    """How to end them without us."""
    ways = f"`gateway down --state-dir {folder}` ends them"
    if provisioner == "skypilot":
        ways += "; or see `sky status`, and `sky down NAME`"
    return f"still there: {', '.join(left)}. {ways}"
