"""Listening sockets, made and kept by the supervisor: a restarted child finds its connections still
queued."""

from __future__ import annotations

import errno
import socket
import sys

# The kernel caps it at net.core.somaxconn (4096 on Linux); connections queue here while a worker starts.
BACKLOG = 4096


class PortError(Exception):
    """A port that cannot be had. The text is one line and says what to do next."""


def listen(host: str, port: int, count: int, option: str) -> list[socket.socket]:
    """`count` sockets on one port where the kernel spreads connections over them (Linux), else one to be
    shared.

    `option` is the flag to name in errors. Port 0 takes any free one. Raises PortError.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise PortError(f"{option}: {host} is not an address of this machine ({error})") from None
    spread = sys.platform == "linux"
    sockets: list[socket.socket] = []
    try:
        # Two programs may share a port by SO_REUSEPORT without noticing; a plain bind tells whether it is
        # free.
        with _bound(family, address, reuse_port=False) as probe:
            address = probe.getsockname()
        for _ in range(count if spread else 1):
            sockets.append(_bound(family, address, reuse_port=spread))  # noqa: PERF401 (closed if one fails)
        for listener in sockets:
            listener.listen(BACKLOG)
    except OSError as error:
        for listener in sockets:
            listener.close()
        raise PortError(_explain(error, host, port, option)) from None
    return sockets


def url(listener: socket.socket, host: str) -> str:
    """`http://host:port` that a program on this machine can use."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", ""):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bound(family: int, address: tuple[object, ...], *, reuse_port: bool) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _explain(error: OSError, host: str, port: int, option: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is in use by another program: stop it, or change {option}"
        case errno.EACCES:
            return f"port {port} needs root: give {option} a number above 1023"
        case errno.EADDRNOTAVAIL:
            return f"{host} is not an address of this machine (port {port}, {option})"
        case _:
            return f"port {port} on {host} cannot be opened ({error.strerror}): give {option} another number"
