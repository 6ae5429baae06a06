"""Dials that fail, and URLs: nothing is sent to whom is not the replica."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from gateway.errors import Undialable
from gateway.upstream import Pool
from replicas.tls import Identity, context_for, make

from .conftest import eventually
from .scripted import ANSWER, Scripted, says, server_context


@pytest.fixture(scope="module")
def identity() -> Identity:
    return make("r1")


async def test_a_refused_dial_is_undialable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(Undialable, match="No connection to the replica"):
        await Pool(f"http://127.0.0.1:{port}").acquire()


async def test_another_certificate_than_the_pinned_one_is_undialable_and_nothing_is_sent(
    identity: Identity, tmp_path: Path
) -> None:
    async with Scripted(says(ANSWER), context=server_context(make("r1"), tmp_path)) as server:
        pool = Pool(server.url, context=context_for(server.url, identity.cert, None))
        with pytest.raises(Undialable, match="its certificate is not the one that this gateway gave it"):
            await pool.acquire()
        assert server.requests == []


async def test_a_replica_that_ought_to_speak_tls_and_does_not_is_undialable(identity: Identity) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ANSWER)
        got.append(await reader.read(100))
        writer.close()

    got: list[bytes] = []
    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        pool = Pool(url, context=context_for(url, identity.cert, None))
        with pytest.raises(Undialable, match="it does not speak TLS"):
            await pool.acquire()
        await eventually(lambda: got)
        assert b"HTTP" not in got[0]


async def test_a_replica_that_never_ends_its_handshake_is_undialable(identity: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:  # accepts, and says nothing
        url = f"https://127.0.0.1:{sock.getsockname()[1]}"
        pool = Pool(url, connect_timeout=0.2, context=context_for(url, identity.cert, None))
        with pytest.raises(Undialable, match=r"within 0.2 s"):
            await pool.acquire()


async def test_a_name_that_does_not_resolve_is_undialable() -> None:
    with pytest.raises(Undialable):
        await Pool("http://replica.invalid:30000", connect_timeout=2).acquire()


async def test_a_dial_that_is_not_answered_is_undialable() -> None:
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # fill what the kernel accepts by itself
            full = stack.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex(sock.getsockname())
        pool = Pool(f"http://127.0.0.1:{sock.getsockname()[1]}", connect_timeout=0.2)
        with pytest.raises(Undialable, match=r"within 0.2 s"):
            await pool.acquire()


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://x:1", "http://", ""])
async def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        Pool(url)


async def test_a_url_may_have_a_path_and_no_port() -> None:
    pool = Pool("https://user:secret@example.org/base/")
    assert (pool.host, pool.port) == ("example.org", 443)
    assert (pool.prefix, pool.authority) == (b"/base", "example.org")
    assert "secret" not in repr(pool)
