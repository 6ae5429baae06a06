"""`gateway down --orphans OWNER`: the replicas of a gateway that is dead, ended and verified gone.

A gateway ends only what bears its own owner's name, and its owner is in its state dir. If that is lost, or on
a machine that is, its replicas bill on; anybody with access to the same SkyPilot can end them with this.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click

from gateway import statedir
from gateway.assembly import TABLE_FILE, make_provisioner
from gateway.client import ClientError
from gateway.display import price_text
from gateway.progress import Progress, not_ended
from replicas.provisioners import Other, Provisioner, service_and_owner
from replicas.table import TableError, read_owner

POLL_SECONDS: Final = 0.5
NOBODY: Final = "*"  # an owner of nothing: no name of a machine has this character
_OWNER: Final = re.compile(r"[0-9a-f]{8}", re.ASCII)


def end_orphans(given: str, folder: Path, provisioner: str | None, *, yes: bool, limit: float) -> None:
    """`given`: an owner, or the name of one of its replicas. Asks before it ends anything, unless `yes`.

    Raises ClientError: no such owner, one that lives, or replicas that are not verified gone within `limit`
    seconds. Raises click.Abort when the answer is no.
    """
    named = service_and_owner(given)
    owner = named[1] if named else given
    if not _OWNER.fullmatch(owner):
        raise ClientError(f"{given!r} is no owner: give the 8 hex digits of <service>-gw-OWNER-<n>")
    _refuse_a_living_one(owner, folder)
    before = statedir.last_start(folder).get("provisioner")
    where = provisioner or (before if before == "local" else "skypilot")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Two of them: to look as OWNER would be to care for its replicas, such as arming their timers anew.
    asyncio.run(
        _end(
            make_provisioner(where, folder, NOBODY),
            make_provisioner(where, folder, owner),
            where,
            owner,
            yes=yes,
            limit=limit,
        )
    )


def _refuse_a_living_one(owner: str, folder: Path) -> None:
    for home in {folder, *statedir.running()}:
        with contextlib.suppress(TableError):
            if read_owner(home / TABLE_FILE) == owner:
                lives = "runs" if statedir.read_address(home) else "can be started again"
                raise ClientError(
                    f"{owner} is the gateway of the state dir {home}, which {lives} here:"
                    f" `gateway down --state-dir {home}` ends its replicas"
                )


async def _end(
    looker: Provisioner, ender: Provisioner, where: str, owner: str, *, yes: bool, limit: float
) -> None:
    try:
        known = await _replicas(looker)
        found = known.get(owner, {})
        if not found:
            there = ", ".join(f"{name} ({len(those)})" for name, those in sorted(known.items()))
            more = f"; replicas of other gateways there are of {there}" if there else ""
            click.echo(f"{where} has no replica of {owner}: nothing to end{more}")
            return
        click.echo(f"replicas of gateway {owner} on {where}:")
        for id, machine in sorted(found.items()):
            click.echo(f"  {id}  {machine.status}  {price_text(machine.hourly_cost)}")
        if not yes:
            click.echo(
                "No gateway of this owner is known on this machine. One that lives elsewhere cannot be seen\n"
                "from here: it would lose these with the requests they serve, and might launch new ones."
            )
            total = sum(machine.hourly_cost or 0.0 for machine in found.values())
            click.confirm(f"End {len(found)} ({price_text(total)})?", abort=True)
        left, seconds = await _end_all(ender, found, limit)
        for id in (await _replicas(looker)).get(owner, {}).keys() - left.keys():
            left[id] = "still listed"
        if left:
            raise ClientError(f"{not_ended(left, seconds)}. Give the same command again")
        click.echo(f"{len(found)} ended, verified: {where} has no replica of {owner}")
    finally:
        await looker.close()
        await ender.close()


async def _end_all(ender: Provisioner, ids: Iterable[str], limit: float) -> tuple[dict[str, str], float]:
    """What was not ended, with the reason, and the seconds that it took."""
    begun, progress = time.monotonic(), Progress(click.echo)
    ending = {id: asyncio.create_task(ender.terminate(id)) for id in ids}
    failed: dict[str, str] = {}
    while True:
        left = dict.fromkeys(ending, "terminating") | failed
        progress.show(left)
        seconds = time.monotonic() - begun
        if not ending or seconds >= limit:
            break
        await asyncio.wait(ending.values(), timeout=POLL_SECONDS)
        for id, task in list(ending.items()):
            if task.done():
                del ending[id]
                if error := task.exception():
                    failed[id] = str(error) or type(error).__name__
    for task in ending.values():
        task.cancel()
    return left, seconds


async def _replicas(looker: Provisioner) -> dict[str, dict[str, Other]]:
    """All gateways' replicas, by owner and name."""
    try:
        await looker.instances()
        others = await looker.others(())
    except Exception as error:
        raise ClientError(f"nothing can be said or ended: {error}") from None
    found: dict[str, dict[str, Other]] = {}
    for other in others:
        if name := service_and_owner(other.name):
            found.setdefault(name[1], {})[other.name] = other
    return found
