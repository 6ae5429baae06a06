"""Stays with one SkyPilot cluster that is up: finds its endpoint and keeps its output until `run` ends."""
from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicas.provisioners import folder, keeping

if TYPE_CHECKING:
    from replicas.provisioners.sdk import Sky

log = logging.getLogger(__name__)

PAUSE_SECONDS = 5.0   # between two tries: an endpoint that is not exposed yet, a log stream that broke
_RUN_ENDED = (0, 100, 103)   # sky.exceptions.JobExitCode: SUCCEEDED, FAILED, CANCELLED


class Attendant(threading.Thread):
    """A daemon thread: it waits in SkyPilot's SDK for as long as the replica lives.

    Its attributes are written by it (`url`: under `_finding`) and read by anybody.
    """

    def __init__(self, sky: Sky, cluster: str, directory: Path, handle: Any) -> None:
        super().__init__(name=f"attendant {cluster}", daemon=True)
        self._sky = sky
        self._cluster = cluster
        self._directory = directory
        self._handle = handle   # sky.backends.CloudVmRayResourceHandle
        self.url: str | None = None
        self.ended: int | None = None   # SkyPilot's code for the end of `run` (_RUN_ENDED)
        self.following = False   # its output comes as it is printed, or would if it printed any
        self.output = folder.Output(directory)
        self.output.phases.reach("setup")   # UP: the machines are there; `setup` runs as part of the job
        self._gone = threading.Event()
        self._finding = threading.Lock()

    def stop(self) -> None:
        """The cluster is gone: no use in asking for it again."""
        self._gone.set()

    def find_again(self) -> None:
        """It does not answer at its URL: a cluster that has recovered may be elsewhere. Never waits."""
        if self.url is not None and not self._finding.locked():
            threading.Thread(target=self._find_again, name=f"attendant {self._cluster}", daemon=True).start()

    def _find_again(self) -> None:
        with self._finding:
            try:
                found = self._find((folder.record(self._directory) or {}).get("port"))
            except Exception as error:   # of any kind: not exposed yet, API server away, cluster gone
                log.info("%s: its endpoint: %s", self._cluster, error)
            else:
                self.url = found or self.url   # one that is not exposed for the moment may be back as it was

    def _seek(self) -> None:
        """Until there is a URL. Beside the output: on Kubernetes an address takes minutes, and `run` may end
        before."""
        while self.url is None and self.ended is None and not self._gone.is_set():
            self._find_again()
            if self.url is None:
                self._gone.wait(PAUSE_SECONDS)

    def why(self) -> str:
        """Why it is no replica any more, for people."""
        words = folder.last_words(self._directory, keeping.said)
        failed = keeping.mentions(self._directory, "FAILED_SETUP")
        stage = "setup failed" if failed else "run ended"
        return f"{stage}{': ' if words else ''}{words}"

    @property
    def complete(self) -> bool:
        """Whether output.log has all that was printed until now."""
        return self.following or self.ended is not None

    def run(self) -> None:
        threading.Thread(target=self._seek, name=f"attendant {self._cluster}", daemon=True).start()
        lines = keeping.LAST_LINES if keeping.has_words(self._directory) else 0   # 0: all
        while self.ended is None and not self._gone.is_set():
            try:
                self.ended = self._follow(lines)
            except (Exception, SystemExit) as error:   # of any kind; whether it exists is for `instances`
                log.info("%s: %s", self._cluster, keeping.mask(self._directory)(str(error)))
            if self.ended is None:
                self._gone.wait(PAUSE_SECONDS)
            lines = keeping.LAST_LINES

    def _find(self, port: int | None) -> str | None:
        try:
            return base_url(self._sky.get(self._sky.endpoints(self._cluster)), port)
        except ValueError as error:   # from sky/backends/backend_utils.py: get_endpoints
            if "Querying endpoints is not supported" not in str(error):
                raise
            return internal_url(self._handle, port)

    def _follow(self, lines: int) -> int | None:
        with keeping.appending(self._directory) as out:
            self.following = True
            try:
                code = self._sky.tail_logs(self._cluster, None, True, lines, out)
            finally:
                self.following = False
        return code if code in _RUN_ENDED else None


def base_url(endpoints: Mapping[int, str] | Mapping[str, str], port: int | None) -> str | None:
    """The URL of the replica's port, or None while SkyPilot does not expose it.

    VMs and load balancers: `10.0.0.5:30000`, no scheme. Kubernetes ingress: scheme and path prefix.
    Some clouds map to another port of the host. Without a known port, the only one there is.
    """
    by_port = {str(key): value for key, value in endpoints.items()}
    found = by_port.get(str(port)) if port is not None else None
    if found is None and port is None and len(by_port) == 1:
        (found,) = by_port.values()
    if not found:
        return None
    return (found if "://" in found else f"http://{found}").rstrip("/")


def internal_url(handle: Any, port: int | None) -> str | None:
    """The URL of the port on the head node's own address, where SkyPilot knows no endpoints (Slurm).

    Not `handle.head_ip`, nor the external address of the pair: on Slurm both are the login host's.
    """
    addresses = handle.stable_internal_external_ips if handle is not None else None
    if not addresses or port is None:
        return None
    return f"http://{addresses[0][0]}:{port}"
