"""SkyPilot's SDK: the functions of it that we use, typed, and the only place that imports it.

Inside a function: `import sky` takes 4 s and 160 MB.
"""
from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

ENDPOINT = "SKYPILOT_API_SERVER_ENDPOINT"   # a person says which API server
NO_SERVER = "SKYPILOT_DISABLE_LOCAL_API_SERVER"   # no local one may be started
START_SECONDS = 120.0   # an API server starts in 7 to 15 s; on a busy machine SkyPilot itself waits a minute
KEEP_ALIVE: Final = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}   # s, s, times
_FORBIDDEN = os.environ.get(NO_SERVER, "").lower() in ("true", "1")   # before import_sky says so, too


class Sky(Protocol):
    """The functions of the package `sky` that we use; all but `get`, `stream_and_get` and the last three
    return the id of a request, whose result `get` waits for."""

    Task: Any
    StatusRefreshMode: Any
    exceptions: Any
    server: Any   # `server.common`: the API server, see `health`
    skylet: Any   # `skylet.autostop_lib.AutostopWaitFor`
    __version__: str

    def launch(
        self,
        task: Any,
        *,
        cluster_name: str,
        retry_until_up: bool,
        idle_minutes_to_autostop: int | None,
        wait_for: Any,
        down: bool,
    ) -> str: ...
    def autostop(self, cluster_name: str, idle_minutes: int, *, wait_for: Any, down: bool) -> str: ...
    def status(self, cluster_names: list[str] | None, *, refresh: Any) -> str: ...
    def endpoints(self, cluster: str) -> str: ...
    def down(self, cluster_name: str) -> str: ...
    def queue(self, cluster_name: str) -> str: ...
    def api_cancel(self, request_ids: list[str], *, silent: bool) -> str: ...
    def get(self, request_id: str) -> Any: ...
    def stream_and_get(self, request_id: str, *, output_stream: Any) -> Any: ...
    def api_status(self, *, cluster_name: str) -> list[Any]: ...
    def tail_logs(
        self, cluster_name: str, job_id: int | None, follow: bool, tail: int, output_stream: Any
    ) -> int: ...
    def tail_provision_logs(
        self, cluster_name: str, worker: int | None, follow: bool, tail: int, output_stream: Any
    ) -> int: ...


def import_sky() -> Sky:
    """The real one, without telemetry (Loki, and a ping that costs 1 s per call), and starting no API server
    by itself: a server inherits our whole environment, and keeps it."""
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    os.environ[NO_SERVER] = "1"
    logging.getLogger("alembic").setLevel(logging.WARNING)   # its tables' migrations
    import sky
    from sky.client import sdk
    from sky.server import rest

    # SkyPilot waits for answers without a limit: through a firewall that has forgotten us, for ever.
    rest.adapter.poolmanager.connection_pool_kw["socket_options"] = _socket_options()
    sky.tail_provision_logs = sdk.tail_provision_logs   # the only one of ours that it does not export
    # `api_status` complains of an old server in every thread that has not asked another thing before.
    logging.getLogger("sky.client.sdk").addFilter(lambda record: "flag is ignored" not in record.getMessage())
    return sky  # type: ignore[no-any-return]


def _socket_options() -> list[Any]:
    """urllib3's own, and those that find out after two minutes that the other end is gone without a word."""
    from urllib3.connection import HTTPConnection

    tcp = [(getattr(socket, name, None), value) for name, value in KEEP_ALIVE.items()]
    return [
        *HTTPConnection.default_socket_options,
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        *((socket.IPPROTO_TCP, option, value) for option, value in tcp if option is not None),
    ]


@dataclass(frozen=True, slots=True)
class Health:
    """What the API server says of itself, and whether SkyPilot would talk to it."""

    status: Literal["healthy", "unhealthy", "version_mismatch", "needs_auth"]
    url: str   # without a password
    ours: str   # version of the SDK
    theirs: str | None   # of the server; None when it did not say
    local: bool   # one that SkyPilot could start on this machine
    words: str = ""   # of SkyPilot, about a mismatch


def health(sky: Sky, *, anew: bool = False) -> Health:
    """Ask /api/health; starts nothing. SkyPilot keeps an answer for 5 s, unless `anew`; none takes 7.5 s."""
    common = sky.server.common
    url = common.get_server_url()
    if anew:
        common.get_api_server_status_response.cache_clear()
    info = common.get_api_server_status(url)
    theirs = info.version
    if theirs is None:   # a refusal: only its header says
        response = common.get_api_server_status_response(url)
        theirs = None if response is None else response.headers.get("X-SkyPilot-Version")
    return Health(
        info.status.value,
        common.redact_url_password(url),
        sky.__version__,
        theirs,
        common.is_api_server_local(url),
        info.error or "",
    )


def may_start_server() -> bool:
    """Whether a local API server may be started at all: nobody has named another, nor forbidden it."""
    return not _FORBIDDEN and not os.environ.get(ENDPOINT)


def start_server() -> None:
    """Start SkyPilot's API server on this machine; returns when it answers. Raises RuntimeError.

    By a process of its own: a server keeps the environment of whoever starts it, and ours has API keys, and a
    folder where it would write its metrics between ours.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GATEWAY_") and name not in (NO_SERVER, "PROMETHEUS_MULTIPROC_DIR")
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import sky; sky.api_start()"],
            env=env, cwd="/", capture_output=True, text=True, errors="replace", timeout=START_SECONDS,
            check=False, stdin=subprocess.DEVNULL,
        )   # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it did not start within {START_SECONDS:.0f} s") from None
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:] or f"`sky api start` ended with {done.returncode}")
