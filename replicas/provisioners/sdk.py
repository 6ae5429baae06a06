"""SkyPilot's SDK: the functions of it that we use, typed, and the only place that imports it.

Inside a function: `import sky` takes 4 s and 160 MB.
"""
from __future__ import annotations

import logging
import os
from typing import Any, Protocol


class Sky(Protocol):
    """The functions of the package `sky` that we use; all but `get`, `stream_and_get` and the last two return
    the id of a request, whose result `get` waits for."""

    Task: Any
    StatusRefreshMode: Any
    exceptions: Any

    def launch(
        self, task: Any, *, cluster_name: str, retry_until_up: bool, idle_minutes_to_autostop: int, down: bool
    ) -> str: ...
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


def import_sky() -> Sky:
    """The real one, without telemetry (Loki, and a ping that costs 1 s per call)."""
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    import sky

    logging.getLogger("alembic").setLevel(logging.WARNING)   # its tables' migrations
    # `api_status` complains of an old server in every thread that has not asked another thing before.
    logging.getLogger("sky.client.sdk").addFilter(lambda record: "flag is ignored" not in record.getMessage())
    return sky  # type: ignore[no-any-return]
