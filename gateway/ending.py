"""`gateway down`: every replica is ended and verified gone, then the gateway; or those of a dead gateway."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.operate import SILENCE_SECONDS, admin, admin_options, friendly, state_folder
from gateway.progress import NotEnded, Progress, machines, not_ended
from replicas import costs

if TYPE_CHECKING:
    from gateway.client import AdminClient

POLL_SECONDS = 0.5


def _seconds(context: click.Context, parameter: click.Parameter, value: str) -> float:
    try:
        return costs.duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.option(
    "--timeout",
    "limit",
    default="30m",
    show_default=True,
    metavar="DURATION",
    callback=_seconds,
    help="Stop waiting then, with an error that names what is left.",
)
@click.option(
    "--orphans",
    metavar="OWNER",
    help="End the replicas of a dead gateway instead: OWNER is the 8 hex digits in their names.",
)
@click.option("--yes", "-y", is_flag=True, help="With --orphans: do not ask.")
@click.option(
    "--provisioner",
    type=click.Choice(["skypilot", "local"]),
    help="With --orphans: where they run (default: as the gateway of the state dir, or skypilot).",
)
@admin_options
def down(
    limit: float, orphans: str | None, yes: bool, provisioner: str | None, **where: str | None
) -> None:
    """End every replica, verify that it is gone, then end the gateway."""
    folder = state_folder(where["state_dir"])
    if orphans is not None:
        from gateway.orphans import end_orphans

        with friendly():
            end_orphans(orphans, folder, provisioner, yes=yes, limit=limit)
        return
    if yes or provisioner:
        raise click.UsageError("--yes and --provisioner go with --orphans")
    try:
        _ours(folder, limit, **where)
    except NotEnded as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("stopped waiting; `gateway down` again goes on from here") from None


def _ours(folder: Path, limit: float, **where: str | None) -> None:
    from gateway.client import NotRunning

    try:
        with admin(**where) as client:
            wait_for_down(client, folder, limit)
    except click.ClickException as error:
        if not isinstance(error.__context__, NotRunning) or where["admin_url"]:
            raise
        from gateway.assembly import end_leftovers

        with friendly():
            count = end_leftovers(folder, click.echo, limit)
        ended = f"{count} of its replicas ended" if count else "nothing to end"
        click.echo(f"no gateway runs; {ended}")
        return
    click.echo("every replica is gone, and the gateway has ended")


def wait_for_down(client: AdminClient, folder: Path, limit: float) -> None:
    """Ask for `down`; returns when every replica is gone and the gateway has ended. Raises ClientError, and
    NotEnded after `limit` seconds."""
    from gateway import statedir
    from gateway.client import BrokeOff, ClientError, NotRunning

    left = machines(client.call("POST", "/admin/down"))  # NotRunning here: there was none from the start
    ours = (statedir.read_address(folder) or {}).get("admin_url") == client.url
    begun = heard = time.monotonic()
    progress = Progress(click.echo)
    while True:
        progress.show(left)
        time.sleep(POLL_SECONDS)
        try:
            now = client.status()
        except (NotRunning, BrokeOff):
            gone = statedir.read_address(folder) is None if ours else True
            if gone and (ours or time.monotonic() - heard > 3):
                return progress.show({})
            if time.monotonic() - heard > SILENCE_SECONDS:
                had = f"; it had still to end {', '.join(sorted(left))}" if left else ""
                raise ClientError(f"the gateway stopped answering before it was done{had}") from None
            continue
        heard = time.monotonic()
        state: dict[str, Any] | None = now["gateway"]["down"]
        if state is None:  # the controller was started anew and does not know
            client.call("POST", "/admin/down")
        elif state["error"]:
            cause = state["error"]
            raise ClientError(f"replicas could not all be ended: {cause}; run `gateway down` again")
        left = machines(now)
        if heard - begun >= limit:
            error = not_ended(left, heard - begun)
            raise NotEnded(f"{error}. The gateway goes on trying: `gateway down` again waits for it")
