"""Commands that ask or change a running gateway, over its admin port."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gateway.settings import SettingsError

if TYPE_CHECKING:
    from gateway.client import AdminClient

Function = TypeVar("Function", bound=Callable[..., Any])

WATCH_SECONDS = 1.0
RESTART_POLL_SECONDS = 0.2
# A controller that stops answering is started again by its supervisor within this.
SILENCE_SECONDS = 20.0


def admin_options(function: Function) -> Function:
    """--admin-url, --admin-key, --state-dir: which gateway a command is for."""
    url = "Admin port of the gateway (default: found through the state dir). [GATEWAY_ADMIN_URL]"
    key, folder = "Its key. [GATEWAY_ADMIN_KEY]", "Its state dir. [GATEWAY_STATE_DIR]"
    for option in (
        click.option("--admin-url", envvar="GATEWAY_ADMIN_URL", metavar="URL", help=url),
        click.option("--admin-key", envvar="GATEWAY_ADMIN_KEY", metavar="KEY", help=key),
        click.option("--state-dir", envvar="GATEWAY_STATE_DIR", metavar="DIR", help=folder),
    ):
        function = option(function)
    return function


@contextmanager
def friendly() -> Iterator[None]:
    """Expected failures as one line on stderr; anything else is a fault and keeps its traceback."""
    from gateway.client import ClientError
    from gateway.sockets import PortError
    from gateway.statedir import StateDirBusy
    from replicas.spec import SpecError
    from replicas.table import TableError
    from replicas.tls import TlsError

    try:
        yield
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    except (ClientError, PortError, StateDirBusy, SpecError, TableError, TlsError) as error:
        raise click.ClickException(str(error)) from None


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Ctrl-C ends what shows until Ctrl-C; so does a reader that closes the pipe (`| head`)."""
    with suppress(KeyboardInterrupt, BrokenPipeError):
        yield


@contextmanager
def admin(admin_url: str | None, admin_key: str | None, state_dir: str | None) -> Iterator[AdminClient]:
    from gateway.client import AdminClient, find_admin_url

    with friendly(), AdminClient(admin_url or find_admin_url(state_folder(state_dir)), admin_key) as client:
        yield client


def state_folder(given: str | None) -> Path:
    """`--state-dir`, or where the environment or the default says."""
    from gateway.client import default_state_dir

    return Path(given).expanduser().absolute() if given else default_state_dir()


@click.command()
@click.option("--watch", is_flag=True, help="Again each second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="For scripts; with --watch one line each second.")
@admin_options
def status(watch: bool, as_json: bool, **where: str | None) -> None:
    """Show services and replicas: state, phase, ETA, load, cost."""
    with until_interrupted(), admin(**where) as client:
        if as_json:
            click.echo(json.dumps(client.status(), indent=None if watch else 2))
            while watch:
                time.sleep(WATCH_SECONDS)
                click.echo(json.dumps(client.status()))
            return
        from gateway.display import status_view

        if not watch:
            show(status_view(client.status()))
            return
        from rich.live import Live

        with Live(status_view(client.status()), auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_SECONDS)
                live.update(status_view(client.status()), refresh=True)


@click.command()
@click.argument("service", required=False)
@click.option("--min", "low", type=int, metavar="N", help="Fewest replicas.")
@click.option("--max", "high", type=int, metavar="N", help="Most replicas; 0 pauses the service.")
@click.option("--reset", is_flag=True, help="Back to the YAML's figures.")
@admin_options
def scale(service: str | None, low: int | None, high: int | None, reset: bool, **where: str | None) -> None:
    """Set how many replicas SERVICE may have. It lasts until --reset or a changed YAML."""
    given = {name: value for name, value in (("min", low), ("max", high)) if value is not None}
    if bool(given) == reset:
        raise click.UsageError("give --min N, --max N or both; or --reset alone")
    with admin(**where) as client:
        name = one_service(client, service)
        after = client.call("PUT", f"/admin/services/{name}/limits", {"reset": True} if reset else given)
        limits = after["limits"]
    click.echo(f"{name}: {limits['min']}..{limits['max']} replicas" + ("" if limits["max"] else " (paused)"))


@click.command()
@click.argument("service", required=False)
@admin_options
def retry(service: str | None, **where: str | None) -> None:
    """Let SERVICE launch again at once after failed starts blocked it."""
    with admin(**where) as client:
        name = one_service(client, service)
        client.call("POST", f"/admin/services/{name}/retry")
    click.echo(f"{name}: the next request may start a replica")


@click.command()
@click.argument("replica", required=False)
@click.option("--provision", is_flag=True, help="SkyPilot's log of how its machines were made.")
@click.option("--rank", type=click.IntRange(0), metavar="N", help="Only this node (0 is the head).")
@click.option("--follow", "-f", is_flag=True, help="Go on as it prints, until it is gone.")
@click.option(
    "--lines", "--tail", "-n", "lines", type=click.IntRange(0), default=200, show_default=True,
    help="Last lines.",
)  # fmt: skip
@admin_options
def logs(
    replica: str | None,
    provision: bool,
    rank: int | None,
    follow: bool,
    lines: int,
    **where: str | None,
) -> None:
    """Print what REPLICA printed (default: the newest), dead ones too; its number alone is enough.

    Secrets in it are masked. Logs of dead replicas are kept for 14 days.
    """
    from gateway.client import NotRunning

    folder = state_folder(where["state_dir"])
    asked = {"tail": str(lines), "follow": "1" if follow else "", "provision": "1" if provision else ""}
    params = asked | ({} if rank is None else {"rank": str(rank)})
    try:
        with until_interrupted(), admin(**where) as client:
            chosen = one_replica(client.call("GET", "/admin/replicas"), replica)
            for text in client.lines(f"/admin/replicas/{chosen}/logs", params):
                click.echo(text, nl=False)
    except click.ClickException as error:
        if not isinstance(error.__context__, NotRunning) or where["admin_url"]:
            raise
        _logs_without_gateway(folder, replica, lines, provision, rank)


def _logs_without_gateway(
    folder: Path, replica: str | None, lines: int, provision: bool, rank: int | None
) -> None:
    """The same from the files, when no gateway runs: what went wrong is often asked then."""
    from gateway.logs import NoLog, known_replicas, read, select

    chosen = one_replica(known_replicas(folder), replica)
    try:
        text, _ = read(select(folder, chosen, provision=provision, rank=rank), lines)
    except NoLog as error:
        raise click.ClickException(str(error)) from None
    click.echo(text, nl=False)


@click.command()
@admin_options
def restart(**where: str | None) -> None:
    """Replace the gateway's processes one by one, without losing a request: after an update, say.

    Options stay as they were given to `up`. Old workers leave when their last request has ended.
    """
    from gateway.client import BrokeOff, ClientError, NotRunning

    with admin(**where) as client:
        before = (client.call("POST", "/admin/restart")["gateway"].get("restart") or {}).get("number", 0)
        heard = time.monotonic()
        while True:
            time.sleep(RESTART_POLL_SECONDS)
            try:
                now = client.status()["gateway"].get("restart") or {}
            except (NotRunning, BrokeOff):  # between two controllers
                if time.monotonic() - heard > SILENCE_SECONDS:
                    raise ClientError(
                        "the gateway stopped answering during its restart; see its log"
                    ) from None
                continue
            heard = time.monotonic()
            if now.get("number", 0) > before and now["state"] != "running":
                break
        if now["state"] != "done":
            raise ClientError(f"the restart failed: {now['message']}")
    click.echo("every process of the gateway is a new one")


def one_service(client: AdminClient, given: str | None) -> str:
    """The name given, or the only service there is."""
    if given is not None:
        return given
    names = [service["name"] for service in client.status()["services"]]
    if len(names) != 1:
        raise click.UsageError(f"name one of the services: {', '.join(names)}")
    return str(names[0])


def one_replica(known: list[dict[str, Any]], given: str | None) -> str:
    """The newest replica with output, or the one whose id, or number at its id's end, is given."""
    if not known:
        raise click.ClickException("no replica has printed anything yet")
    if given is None:
        return str(known[0]["id"])
    ids = [str(replica["id"]) for replica in known]
    matches = [i for i in ids if i == given] or [i for i in ids if i.endswith(f"-{given}")]
    if len(matches) != 1:
        raise click.ClickException(f"no single replica {given!r}: there is {', '.join(ids[:10])}")
    return matches[0]


def show(view: Any) -> None:
    from rich.console import Console

    console = Console()
    # Not a terminal: no wrapping at 80 columns, so that lines can be searched.
    (console if console.is_terminal else Console(width=200)).print(view)
