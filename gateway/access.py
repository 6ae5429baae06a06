"""The access log: one JSON line per request, after its typed end. No bodies, no keys, no prompts."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

log = logging.getLogger(__name__)


class AccessLog:
    """`path`: None = off, "-" = stderr, else a file that is appended to (one line per write, so workers can
    share)."""

    def __init__(self, path: str | None) -> None:
        self._file: TextIO | None = None
        self._failing = False  # said once, until it works again
        if path == "-":
            self._file = sys.stderr
        elif path is not None:
            self._file = open(  # noqa: SIM115 - closed by close()
                path, "a", buffering=1, encoding="utf-8", errors="backslashreplace"
            )

    def __bool__(self) -> bool:
        return self._file is not None

    def write(self, entry: Mapping[str, Any]) -> None:
        """Write one entry; `time` is put first."""
        if self._file is None:
            return
        line = json.dumps({"time": _now(), **entry}, ensure_ascii=False) + "\n"
        try:
            self._file.write(line)
        except OSError as error:  # a full disk fails no request
            if not self._failing:
                log.warning("the access log cannot be written: %s", error)
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        if self._file is not None and self._file is not sys.stderr:
            with contextlib.suppress(OSError):  # what a full disk did not take
                self._file.close()
        self._file = None


def _now() -> str:
    """ISO 8601 in UTC, milliseconds."""
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}Z"
