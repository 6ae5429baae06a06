"""Which skygate this is."""

from __future__ import annotations

import importlib.metadata
import importlib.util


def version() -> str:
    """`unknown` of a checkout that is not installed."""
    try:
        return importlib.metadata.version("skygate")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def build() -> str:
    """`compiled`, or `interpreted`: whether the data plane's modules are machine code (pyproject.toml)."""
    found = importlib.util.find_spec("gateway.relay")
    origin = found.origin if found is not None else None
    return "interpreted" if origin is None or origin.endswith(".py") else "compiled"
