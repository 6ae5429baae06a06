"""The client of probes and load polls, before real sockets whose other end does as a script says."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from replicas.connection import MAX_BODY, MAX_HEAD
from replicas.polling import Answer, Client, PollError
from replicas.tls import context_for, make

Script = Callable[["Peer"], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
FLOOD = b"x" * 16384


class Peer:
    """The replica's end of one connection."""

    def __init__(self, replica: Replica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.replica, self.reader, self.writer = replica, reader, writer

    async def heard(self) -> bytes:
        """The head of the next question."""
        self.replica.heard.append(await self.reader.readuntil(b"\r\n\r\n"))
        return self.replica.heard[-1]

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, data: bytes = OK) -> None:
        await self.heard()
        await self.say(data)

    async def until_closed(self) -> None:
        """Say nothing until the client has closed."""
        await self.reader.read()


class Replica:
    """Plays the next script on each new connection (the last one on all further), then closes it."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = scripts
        self.heard: list[bytes] = []
        self.connections = self.closed = 0
        self.news = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = self.scripts[min(self.connections, len(self.scripts) - 1)]
        self.connections += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await script(Peer(self, reader, writer))
        finally:
            writer.close()
            self.closed += 1
            self.news.set()

    async def all_closed(self) -> None:
        async with asyncio.timeout(5):
            while self.closed < self.connections:
                self.news.clear()
                await self.news.wait()


@asynccontextmanager
async def replica(*scripts: Script, context: ssl.SSLContext | None = None) -> AsyncIterator[Replica]:
    found = Replica(*scripts)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0, ssl=context)
    scheme = "https" if context else "http"
    found.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield found
    await found.all_closed()
    server.close()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    client.close()


async def refused(client: Client, url: str, within: float = 5.0, **more: object) -> PollError:
    with pytest.raises(PollError) as raised:
        await client.ask(url, within, **more)  # type: ignore[arg-type]
    return raised.value


async def for_ever(peer: Peer) -> None:
    while True:
        await peer.answer()


def says(data: bytes) -> Script:
    """One answer, and the connection's end."""
    return lambda peer: peer.answer(data)


def floods(head: bytes, piece: bytes = FLOOD) -> Script:
    async def script(peer: Peer) -> None:
        await peer.answer(head)
        while True:
            await peer.say(piece)

    return script


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2;x=y\r\ndy\r\n0\r\nA: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nbody",
        b"HTTP/1.0 200 OK\r\n\r\nbody",
        b"HTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",
        b"HTTP/1.1 103 Hints\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n\r\nbody",
    ],
    ids=["content-length", "chunked", "until-close", "http-1.0", "interim", "interim-until-close"],
)
async def test_an_answer_ends_where_its_framing_says_in_however_many_pieces(
    client: Client, answer: bytes
) -> None:
    async def by_the_byte(peer: Peer) -> None:
        await peer.heard()
        for i in range(len(answer)):
            await peer.say(answer[i : i + 1])
            await asyncio.sleep(0)

    async with replica(says(answer), by_the_byte) as here:
        assert await client.ask(here.url, 5.0) == Answer(200, b"body")
        client.close()
        assert await client.ask(here.url, 5.0) == Answer(200, b"body")
        client.close()


async def test_questions_share_one_connection_until_it_has_been_idle_too_long(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replica(for_ever) as here:
        url, key = here.url + "/v1/loads?include=core", {"Authorization": "Bearer k3y"}
        for _ in range(3):
            await client.ask(url, 5.0, headers=key)
        assert here.connections == 1
        assert here.heard[2].startswith(b"GET /v1/loads?include=core HTTP/1.1\r\n")
        assert b"\r\nauthorization: Bearer k3y\r\n" in here.heard[2]
        monkeypatch.setattr("replicas.polling.KEEP_SECONDS", -1.0)
        await client.ask(here.url, 5.0)
        assert here.connections == 2
        client.close()


async def test_a_json_body_is_posted(client: Client) -> None:
    async def script(peer: Peer) -> None:
        assert (await peer.heard()).startswith(b"POST /x%20y HTTP/1.1\r\n")
        assert await peer.reader.readexactly(7) == b'{"a":1}'
        await peer.say(OK)

    async with replica(script) as here:
        assert (await client.ask(here.url + "/x y", 5.0, body=b'{"a":1}')).status == 200
        assert b"\r\ncontent-length: 7\r\n" in here.heard[0]
        assert b"\r\ncontent-type: application/json\r\n" in here.heard[0]


async def test_a_type_that_was_given_for_the_body_is_sent_and_a_length_is_not(client: Client) -> None:
    given = {"Content-Type": "application/x-ndjson", "Content-Length": "9"}
    async with replica(for_ever) as here:
        await client.ask(here.url, 5.0, headers=given, body=b"{}")
        assert b"\r\ncontent-type: application/x-ndjson\r\n" in here.heard[0]
        assert b"\r\ncontent-length: 2\r\n" in here.heard[0]
        client.close()


async def once_then_closes_when_asked_again(peer: Peer) -> None:
    await peer.answer()
    await peer.heard()


async def test_a_question_that_meets_a_stale_connection_is_asked_on_a_new_one(client: Client) -> None:
    async with replica(once_then_closes_when_asked_again, for_ever) as here:
        await client.ask(here.url, 5.0)
        assert await client.ask(here.url, 5.0) == Answer(200, b"ok")
        assert (here.connections, len(here.heard)) == (2, 3)
        client.close()


async def test_it_is_asked_again_once_only_and_never_after_a_byte_or_on_a_new_connection(
    client: Client,
) -> None:
    async def half_an_answer(peer: Peer) -> None:
        await peer.answer()
        await peer.answer(b"HTTP/1.1 2")

    async with replica(once_then_closes_when_asked_again, says(b"")) as here:
        await client.ask(here.url, 5.0)
        assert str(await refused(client, here.url)) == "it closed the connection without an answer"
        assert len(here.heard) == 3
        assert str(await refused(client, here.url)) == "it closed the connection without an answer"
        assert len(here.heard) == 4
    async with replica(half_an_answer) as here:
        await client.ask(here.url, 5.0)
        assert str(await refused(client, here.url)) == "it broke off its answer"
        assert len(here.heard) == 2


@pytest.mark.parametrize("late", [False, True])
async def test_bytes_that_answer_no_question_end_the_connection(client: Client, late: bool) -> None:
    async def talks(peer: Peer) -> None:
        await peer.answer(OK if late else OK + OK)
        if late:
            await peer.say(OK)
        await peer.until_closed()

    async with replica(talks, for_ever) as here:
        assert await client.ask(here.url, 5.0) == Answer(200, b"ok")
        await here.all_closed()
        assert await client.ask(here.url, 5.0) == Answer(200, b"ok")
        assert here.connections == 2
        client.close()


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (floods(b"HTTP/1.1 200 OK\r\nx: "), f"its answer has over {MAX_HEAD} bytes of headers"),
        (floods(b"HTTP/1.1 "), "its answer is not HTTP"),
        (floods(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 999), f"over {MAX_HEAD} bytes of headers"),
        (floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 99), f"over {MAX_HEAD} bytes of headers"),
        (floods(b"HTTP/1.1 200 OK\r\n\r\n"), f"its answer has over {MAX_BODY} bytes"),
        (floods(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n"), f"over {MAX_BODY} bytes"),
        (
            floods(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 999),
            f"over {MAX_BODY} bytes",
        ),
        (says(b"\x16\x03\x01 no HTTP at all\r\n\r\n"), "its answer is not HTTP"),
        (says(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"), "it broke off its answer"),
        (says(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"), "it broke off"),
        (says(b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"), "not HTTP"),
    ],
    ids=[
        *("endless-header", "endless-status", "endless-headers", "endless-interim", "endless-body"),
        *("long-body", "endless-chunks", "garbage", "broken-body", "broken-chunks", "upgrade"),
    ],
)
async def test_what_no_well_behaved_replica_sends_is_an_error_and_ends_the_connection(
    client: Client, script: Script, why: str
) -> None:
    async with replica(script) as here:
        assert why in str(await refused(client, here.url))


async def test_silence_is_an_error_after_so_many_seconds_in_all(client: Client) -> None:
    async def drips(peer: Peer) -> None:
        await peer.answer(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await peer.say(b"x")
            await asyncio.sleep(0.01)

    async with replica(Peer.until_closed, drips) as here:
        for _ in here.scripts:
            error = await refused(client, here.url, 0.1)
            assert str(error) == "no answer in 0 s"
            assert isinstance(error.__cause__, TimeoutError)


async def test_a_redirect_is_an_answer_and_not_followed(client: Client) -> None:
    async with replica(for_ever) as other, replica(for_ever) as here:
        moved = b"HTTP/1.1 307 Moved\r\nlocation: %s/\r\ncontent-length: 0\r\n\r\n" % other.url.encode()
        here.scripts = (says(moved),)
        assert await client.ask(here.url, 5.0) == Answer(307, b"")
        assert (here.connections, other.connections) == (1, 0)


async def test_only_the_certificate_of_the_context_is_accepted(client: Client, tmp_path: Path) -> None:
    ours, other = make("r1"), make("r1")
    (tmp_path / "pem").write_text(ours.key + ours.cert)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    async with replica(for_ever, context=context) as here:
        right, wrong = (context_for(here.url, identity.cert, None) for identity in (ours, other))
        for _ in range(2):
            assert await client.ask(here.url, 5.0, context=right) == Answer(200, b"ok")
        assert here.connections == 1
        error = await refused(client, here.url, context=wrong)  # not by the kept connection either
        assert str(error) == "its certificate is not the one that this gateway gave it"
        assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
        assert "its certificate is not accepted" in str(await refused(client, here.url))
        assert len(here.heard) == 2
    async with replica(lambda peer: peer.say(b"HTTP/1.1 400 No\r\n\r\n")) as plain:
        url = plain.url.replace("http://", "https://")
        assert str(await refused(client, url, context=wrong)) == "it does not speak TLS"


async def test_a_question_that_is_cancelled_closes_its_connection_and_so_does_close(client: Client) -> None:
    async with replica(for_ever) as here:
        await client.ask(here.url, 5.0)
        client.close()
        await here.all_closed()
    async with replica(Peer.until_closed) as here:
        asking = asyncio.create_task(client.ask(here.url, 5.0))
        while not here.connections:  # noqa: ASYNC110 (one turn of the loop each)
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await here.all_closed()


async def test_the_key_is_in_no_error_repr_or_log(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told = []
    async with replica(for_ever) as here:
        for key in ("k3y\r\nx: y", "k3y\N{SNOWMAN}"):
            error = await refused(client, here.url, headers={"authorization": f"Bearer {key}"})
            told += [repr(error), repr(error.__cause__)]
            assert error.__suppress_context__ or error.__context__ is None
        assert here.connections == 0
        await client.ask(here.url, 5.0, headers={"authorization": "Bearer k3y"})
        told += [repr(client), repr(client._kept)]
        client.close()
    told.append(repr(await refused(client, here.url, headers={"authorization": "Bearer k3y"})))
    assert "refused" in told[-1]
    assert told[-2:-1] == ["<Connection idle>"]
    assert "k3y" not in "".join([*told, caplog.text])


@pytest.mark.parametrize(
    "url", ["ftp://h/", "http://", "http://[::1", "http://h:port", "http://" + "x" * 70 + ".h"]
)
async def test_a_url_that_cannot_be_asked_is_an_error_like_any_other(client: Client, url: str) -> None:
    await refused(client, url)
