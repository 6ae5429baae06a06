"""The `gateway` command: `up`, `demo` and `check` here, what speaks to a running gateway in operate.py.

Every option of `up` comes from `settings.SETTINGS`. Exit codes: 0 done, 1 it did not work (the reason is on
stderr), 2 used wrongly.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gateway import cost, ending, operate, quote
from gateway import settings as options
from gateway.operate import friendly, show
from gateway.settings import SETTINGS, Setting, Settings
from gateway.version import build

if TYPE_CHECKING:
    from gateway.supervisor import Supervisor
    from replicas.spec import Service

Function = TypeVar("Function", bound=Callable[..., Any])


PORT = click.IntRange(0, 65535)


class Texts(click.ParamType):
    """One of several texts; an environment variable may hold many, apart by `split`."""

    name = "text"

    def __init__(self, split: str) -> None:
        self._split = split

    def split_envvar_value(self, rv: str) -> list[str]:
        return [item for item in re.split(self._split, rv) if item]


def setting_option(row: Setting) -> Callable[[Function], Function]:
    """The click option of one row. Values stay texts: `settings.make` reads and checks all sources alike."""
    shown = {"max_body": "", "max_waiting_bytes": ""}.get(row.name, f"default: {row.default}; ")
    if row.default in (None, ()) or row.kind == "flag":
        shown = ""
    more: dict[str, Any] = {"type": click.Choice(row.choices)} if row.choices else {"metavar": _metavar(row)}
    if row.kind == "texts":
        more |= {"multiple": True, "type": Texts(row.split)}
    elif row.kind in ("flag", "switch"):
        more = {"is_flag": True, "default": False if row.kind == "flag" else None}
    else:
        more["default"] = None
    text = f"{row.sentence} [{shown}{row.env}]"
    option = f"{row.option}/--no-{row.option[2:]}" if row.kind == "switch" else row.option
    return click.option(option, row.name, envvar=row.env, help=text, **more)


def _metavar(row: Setting) -> str:
    return row.metavar or {"int": "N", "float": "SECONDS", "path": "DIR"}.get(row.kind, "TEXT")


def setting_options(names: Collection[str] = ()) -> Callable[[Function], Function]:
    """The options of these settings; all, when none is named."""

    def add(function: Function) -> Function:
        for row in reversed(SETTINGS):
            if not names or row.name in names:
                function = setting_option(row)(function)
        return function

    return add


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    package_name="skygate", prog_name="gateway", message=f"%(prog)s, version %(version)s, {build()}"
)
def main() -> None:
    """Serve big open models on your own cloud GPUs: launch on demand, hold requests, scale to zero.

    Point any OpenAI client at http://127.0.0.1:8000/v1.
    """


# -- serving ---------------------------------------------------------------------------------------


def load_service(settings: Settings) -> Service:
    from gateway import launching
    from replicas import spec

    known = launching.variables(settings, os.environ, launching.kept(settings.state_dir))
    return spec.load(settings.yaml, model=settings.model, environ={**os.environ, **known.all()})


@main.command()
@click.argument("file", required=False, envvar="GATEWAY_FILE", metavar="[FILE]")
@setting_options()
@click.option("--end-replicas", is_flag=True, hidden=True, help="Replicas end with the gateway (demo).")
def up(file: str | None, end_replicas: bool, **values: Any) -> None:
    """Serve the SkyPilot YAML in FILE; without FILE, a simulated model on this machine."""
    from gateway import transport
    from gateway.supervisor import Supervisor

    with friendly():
        settings = options.make(file, **values)
        settings = replace(settings, provisioner=options.guess_provisioner(settings))
        service = load_service(settings)
        set_up_logging(settings)
        warnings = [*service.warnings] if settings.file else []
        if doubt := transport.check(settings, service):
            warnings.append(doubt)
        for warning in warnings:
            click.echo(f"warning: {warning}", err=True)
        ends = end_replicas or (settings.provisioner == "local" and sys.stdin.isatty())

        def banner(supervisor: Supervisor) -> None:
            now, urls = supervisor.settings, (supervisor.url, supervisor.admin_url)
            for line in banner_lines(now, service, *urls, ends):
                click.echo(line, err=True)

        leash = sys.stdin.fileno() if end_replicas else None
        supervisor = Supervisor(settings, (service.name,), end_replicas=ends, started=banner, leash=leash)
        sys.exit(supervisor.run())


def set_up_logging(settings: Settings) -> None:
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr, format=line)


def banner_lines(settings: Settings, service: Service, url: str, admin_url: str, ends: bool) -> list[str]:
    keys = ", ".join(name for name, _ in settings.api_key)
    return [
        f"service     {service.name} ({service.model}), replicas from {settings.provisioner}",
        f"OpenAI API  {url}/v1" + (f"  keys: {keys}" if keys else "  no key needed"),
        f"admin       {admin_url}/  (status page, /metrics, `gateway status`)",
        f"state       {settings.state_dir}",
        "Ctrl-C      stops the gateway" + (" and ends its replicas" if ends else "; replicas keep running"),
    ]


@main.command()
@click.option("--once", is_flag=True, help="End after the answer, with exit code 0.")
@click.option("--state-dir", envvar="GATEWAY_STATE_DIR", metavar="DIR", help="Default: a temporary one.")
@click.option("--port", envvar="GATEWAY_PORT", type=PORT, default=8000, help="Public port.")
@click.option("--admin-port", envvar="GATEWAY_ADMIN_PORT", type=PORT, default=8001, help="Admin port.")
def demo(once: bool, state_dir: str | None, port: int, admin_port: int) -> None:
    """Show the whole thing on this machine: a request, its cold start, the answer."""
    from gateway.demo import run

    with friendly():
        sys.exit(run(once=once, state_dir=state_dir, port=port, admin_port=admin_port))


@main.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
@setting_options()
def check(file: str, as_json: bool, **values: Any) -> None:
    """Read a SkyPilot YAML: what would be launched, for how much, and what is wrong or missing.

    Takes the flags of `up`, so that any command line of it can be tried. Starts nothing and asks no cloud.
    """
    from gateway import launching, preflight
    from gateway.display import service_facts, service_view
    from replicas import spec

    with friendly():
        settings = replace(options.make(**values), file=Path(file))
        settings = replace(settings, provisioner=options.guess_provisioner(settings))
        known = launching.variables(settings, os.environ, launching.kept(settings.state_dir))
        service = spec.load(file, model=settings.model, environ={**os.environ, **known.all()})
    wanted = launching.options(settings, known)
    found = preflight.report(service, settings, wanted, preflight.Machine.this())
    if as_json:
        click.echo(json.dumps({**service_facts(service), **found}, indent=2))
    else:
        show(service_view(service, found))


@main.command()
@click.argument("file")
@click.option(
    "--max-cost",
    type=click.FloatRange(0, min_open=True),
    required=True,
    metavar="DOLLARS",
    help="Most it may cost: it is not begun if it might cost more, and ends once it has.",
)
@click.option("--state-dir", metavar="DIR", help="Default: a temporary one, kept if it fails.")
@setting_options(quote.TAKEN)
def selftest(file: str, max_cost: float, state_dir: str | None, **values: Any) -> None:
    """Launch FILE for real, ask it, take its replica away, see it recover and go to zero.

    It has a gateway of its own. Takes the flags of `up` that matter for that. Whatever happens, nothing of
    it runs afterwards, which is verified. The price must be known: --price where no catalogue has it.
    """
    from gateway.selftest import run

    with friendly():
        settings, service, found = quote.prepare(file, values)
        if why := quote.refusal(found, max_cost):
            raise click.ClickException(why)
    click.echo(f"{service.name}, replicas from {settings.provisioner}: {found}")
    sys.exit(run(settings, service, max_cost, state_dir, click.echo))


for command in (
    operate.status,
    operate.scale,
    operate.retry,
    operate.logs,
    cost.cost,
    operate.restart,
    ending.down,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
