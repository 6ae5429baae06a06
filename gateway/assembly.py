"""What the controller process is made of, put together: table, board, provisioner, control, admin port."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from gateway import launching, metrics, statedir, transport
from gateway.admin import Admin
from gateway.child import EXIT_CONFIG, EXIT_DOWN, RESTART, Child, exit_with_supervisor, read_child
from gateway.launching import NO_VARIABLES, Variables
from gateway.logs import tidy
from gateway.progress import Progress, machines, not_ended
from gateway.serving import Server
from gateway.settings import CONTROL_SOCKET, Settings, SettingsError
from gateway.supervisor import BOARD_FILE
from gateway.version import build, version
from replicas import spec
from replicas.adoption import as_it_was
from replicas.board import Board
from replicas.control import ControlServer
from replicas.controller import Controller
from replicas.lifecycle import Replica
from replicas.messages import ColdStart, Snapshot, WorkerState
from replicas.policy import ControllerConfig
from replicas.provisioners import InstancesUnknown, Provisioner, owned_by
from replicas.provisioners.deadman import LIMIT
from replicas.provisioners.launching import ATTEMPT_SECONDS
from replicas.spec import Service, SpecError
from replicas.table import Table, Unusable
from replicas.tls import TlsError

log = logging.getLogger("gateway.controller")

TABLE_FILE = "state.db"
# For the admin port to finish what it is answering; event and log streams are told to end before.
CLOSE_SECONDS = 2
PROGRESS_SECONDS = 0.2


def make_provisioner(
    name: str | None,
    state_dir: Path,
    owner: str,
    *,
    urls: tuple[str, ...] = (),
    price: float | None = None,
    dead_man: float = LIMIT,
    attempt: float = ATTEMPT_SECONDS,
) -> Provisioner:
    """`dead_man`, `attempt`: seconds, of clusters; see SkyPilotProvisioner."""
    match name:
        case "static":
            from replicas.provisioners.static import StaticProvisioner

            return StaticProvisioner(urls, state_dir, owner, price=price)
        case "skypilot":
            from replicas.provisioners.skypilot import SkyPilotProvisioner

            return SkyPilotProvisioner(state_dir, owner, dead_man=dead_man, attempt=attempt)
        case _:
            from replicas.provisioners.local import LocalProvisioner

            return LocalProvisioner(state_dir, owner, price=price)


class Elsewhere(Exception):
    """The state dir has replicas that this start could not end. The text is one line."""


def claim(table: Table, provisioner: str | None) -> None:
    """Note that replicas come from this provisioner from now on.

    To any other one a replica is simply absent: its row would be called gone, and its machine would bill on.
    Raises Elsewhere then. Only `static` ones may be left behind: they are somebody else's servers.
    """
    name, before = provisioner or "local", table.provisioner
    rows = table.replicas()
    if rows and before not in (None, "static", name):
        ids = ", ".join(r.id for r in rows)
        raise Elsewhere(
            f"replicas of {before} are left from the last start; {name} can neither serve nor end them: {ids}"
            f". `gateway down` ends them; or start with --provisioner {before}, or with another --state-dir"
        )
    table.provisioner = name


def controller_config(settings: Settings, known: Variables = NO_VARIABLES) -> ControllerConfig:
    """`known`: the variables that the flags ask for, with their values."""
    return ControllerConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        target_in_flight=settings.target_in_flight,
        upscale_delay=settings.upscale_delay,
        downscale_delay=settings.downscale_delay,
        idle_timeout=settings.idle_timeout,
        window_max=settings.window_max,
        provision_timeout=settings.provision_timeout,
        drain_limit=settings.drain_limit,
        down_drain_limit=settings.drain_timeout,
        probe_interval=settings.probe_interval,
        hold_max=settings.hold_max,
        replica_api_key=settings.replica_api_key,
        keep_failed=settings.keep_failed,
        launch=launching.options(settings, known),
    )


async def serve(child: Child, service: Service, listener: socket.socket, known: Variables) -> int:
    """Run the controller and its admin port until SIGTERM (0) or until `gateway down` has finished (64)."""
    settings, folder = child.settings, child.settings.state_dir
    supervisor = os.getppid()
    controllers: list[Controller] = []  # the control socket is made first and pokes it later

    def poke(worker: int) -> None:
        for controller in controllers:
            controller.poke(worker)

    control = ControlServer(folder / CONTROL_SOCKET, poke)
    async with contextlib.AsyncExitStack() as stack:
        table = stack.enter_context(Table(folder / TABLE_FILE))
        claim(table, settings.provisioner)
        board = stack.enter_context(Board.open(folder / BOARD_FILE))
        limit = launching.dead_man(settings, service)
        provisioner = make_provisioner(
            settings.provisioner,
            folder,
            table.owner,
            urls=settings.replica,
            price=launching.replica_price(settings),
            dead_man=limit,
            attempt=settings.provision_timeout,
        )
        certificates = transport.certificates(settings, service)
        provisioner = transport.around(provisioner, settings, certificates)
        stack.push_async_callback(provisioner.close)
        controller = Controller(
            (service,),
            provisioner,
            table,
            board,
            control,
            settings=replace(controller_config(settings, known), dead_man=limit),
            observer=metrics.ControllerObserver(),
            state_dir=folder,
            certificates=certificates,
        )
        controllers.append(controller)
        stack.push_async_callback(controller.close)
        await control.start()
        stack.push_async_callback(control.close)
        registry = functools.partial(metrics.build_registry, os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
        about = {
            "version": version(), "build": build(),
            "provisioner": settings.provisioner, "workers": settings.workers,
        }  # fmt: skip
        restart = functools.partial(os.kill, supervisor, RESTART)
        admin = Admin(controller, folder, registry, about, restart=restart)
        server = Server(
            uvicorn.Config(
                admin.app(settings.admin_key),
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=CLOSE_SECONDS,
            ),
            child.serves,
        )
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        running = asyncio.create_task(controller.run())
        tidying = asyncio.create_task(tidy(folder, admin.live))
        ends = [asyncio.create_task(event.wait()) for event in (stop, admin.ended)]
        await asyncio.wait([serving, running, *ends], return_when="FIRST_COMPLETED")
        admin.stopping.set()
        server.should_exit = True
        running.cancel()
        results = await asyncio.gather(serving, running, return_exceptions=True)
        for task in (*ends, tidying):
            task.cancel()
        for result in results:
            if isinstance(result, Exception):
                raise result
        return EXIT_DOWN if admin.ended.is_set() else 0


def main() -> None:
    """`python -m gateway.admin`: the controller process of a supervisor."""
    child = read_child()
    exit_with_supervisor(child.alive_fd)
    settings = child.settings
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for noisy in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        known, service = _read(settings)
        launching.keep(settings.state_dir, known)  # we hold the state dir's lock
    except (SpecError, SettingsError) as error:
        log.error("%s", error)
        sys.exit(EXIT_CONFIG)
    assert child.fd is not None
    with socket.socket(fileno=child.fd) as listener:
        try:
            code = asyncio.run(serve(child, service, listener, known))
        except (Elsewhere, TlsError, Unusable) as error:
            log.error("%s", error)
            code = EXIT_CONFIG
    # A thread inside a cloud's SDK must not keep the process: everything is saved.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def _read(settings: Settings) -> tuple[Variables, Service]:
    """Raises SpecError and SettingsError."""
    known = launching.variables(settings, os.environ, launching.kept(settings.state_dir))
    return known, spec.load(settings.yaml, model=settings.model, environ={**os.environ, **known.all()})


def trial() -> None:
    """Whether a controller of this code would start with the settings on stdin: says `ok`, or why not."""
    try:
        _read(Settings.from_json(json.load(sys.stdin)))
    except (SpecError, SettingsError) as error:
        print(" ".join(str(error).split()))
    else:
        print("ok")


class _NoWorkers:
    """The control socket of a gateway that has no workers."""

    def __init__(self) -> None:
        self.workers: dict[int, WorkerState] = {}

    def publish(self, snapshot: Snapshot) -> None: ...
    def progress(self, service: str, cold: ColdStart | None) -> None: ...
    def take_suspects(self) -> dict[str, str]:
        return {}


def end_leftovers(
    folder: Path, say: Callable[[str], None] = lambda _: None, limit: float | None = None
) -> int:
    """End the replicas of a gateway that does not run; how many there were. Verified, like `gateway down`.

    `say`: lines for the person who waits, for `limit` seconds at most. Raises NotEnded naming what is left,
    StateDirBusy when the gateway runs after all, and TableError when its table cannot be used.
    """
    if not (folder / TABLE_FILE).exists():
        return 0
    lock = statedir.lock(folder)
    try:
        return asyncio.run(_end_leftovers(folder, statedir.last_start(folder), say, limit))
    finally:
        os.close(lock)


async def _end_leftovers(
    folder: Path, last: dict[str, Any], say: Callable[[str], None], limit: float | None
) -> int:
    async with contextlib.AsyncExitStack() as stack:
        table = stack.enter_context(Table(folder / TABLE_FILE))
        ever = table.replicas(gone=True)
        if not ever:
            return 0  # nothing was ever launched
        board = stack.enter_context(Board.create(folder / BOARD_FILE, 1))
        urls = tuple(last.get("replica", ()))
        name = table.provisioner or last.get("provisioner")
        provisioner = make_provisioner(name, folder, table.owner, urls=urls)
        stack.push_async_callback(provisioner.close)
        left = {r.id for r in table.replicas()}
        told = False
        with contextlib.suppress(InstancesUnknown, TimeoutError):  # `down` asks until it is told
            async with asyncio.timeout(limit):
                left |= {id for id in await provisioner.instances() if owned_by(id, table.owner)}
            told = True
        if told and not left:
            return 0
        controller = Controller(
            (_service_of(ever[-1]),),
            provisioner,
            table,
            board,
            _NoWorkers(),
            settings=ControllerConfig(),
            observer=metrics.ControllerObserver(),
            state_dir=folder,
        )
        stack.push_async_callback(controller.close)
        say(f"ending {', '.join(sorted(left))}" if left else "asking what is left")
        progress = Progress(say)
        down = asyncio.create_task(controller.down(limit))
        while not down.done():
            progress.show(machines(controller.status()))
            await asyncio.wait([down], timeout=PROGRESS_SECONDS)
        known = machines(controller.status())
        if remaining := await down:
            raise not_ended({id: known.get(id, "") for id in remaining}, limit or 0.0)
        progress.show({})
        return len(left)


def _service_of(r: Replica) -> Service:
    """To end a replica no YAML is needed: for one that cannot be read any more the least there is will do."""
    least = "run: 'false'\nservice: {readiness_probe: /health, replicas: 1, ports: 1}"
    return as_it_was(r, spec.parse(least, r.service, name=r.service))
