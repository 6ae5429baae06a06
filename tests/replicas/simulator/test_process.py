"""`python -m replicas.simulator`: a real process, its port, its signals and its exit codes."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest

from replicas.tls import context_for, make

FAST = ("--profile", "fast", "--health-seconds", "0", "--speedup", "10")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Process:
    """The simulator as a child; its output as lines."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.lines: list[str] = []

    async def read_until(self, words: str) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while line := await self.process.stdout.readline():
                self.lines.append(line.decode())
                if words in self.lines[-1]:
                    return
        raise AssertionError(f"{words!r} never came; said: {''.join(self.lines[-5:])}")

    async def rest(self) -> int:
        """Its exit code; what it said till then is in `lines`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            self.lines += (await self.process.stdout.read()).decode().splitlines()
            return await self.process.wait()


@pytest.fixture
async def launch():
    started: list[Process] = []

    async def start(*flags: str) -> Process:
        port = free_port()
        command = [sys.executable, "-m", "replicas.simulator", "--port", str(port), *FAST, *flags]
        out, err = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        process = Process(await asyncio.create_subprocess_exec(*command, stdout=out, stderr=err), port)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.process.returncode is None:
            process.process.kill()
        await process.rest()


async def test_the_port_is_closed_while_loading_then_health_is_503_while_the_rest_answers(launch, get, chat):
    process = await launch("--startup", "load=0.3,warmup=1000")
    await process.read_until("Load weight begin")
    with pytest.raises(OSError, match="Connect"):
        await get(process.port, "GET", "/health")
    await process.read_until("Uvicorn running on")
    assert [(await get(process.port, "GET", path)).status for path in ("/health", "/ready")] == [503, 503]
    assert (await get(process.port, "GET", "/v1/models")).status == 200
    assert (await chat(process.port, max_tokens=1)).status == 200


async def test_warmed_up_it_is_healthy_and_ready(launch, get):
    process = await launch("--startup", "warmup=0.2")
    await process.read_until("The server is fired up and ready to roll!")
    assert [(await get(process.port, "GET", path)).status for path in ("/health", "/ready")] == [200, 200]


async def test_flags_of_sglang_that_mean_nothing_here_are_named_and_ignored(launch, get):
    process = await launch("--startup", "", "--tp", "8", "--trust-remote-code", "--served-model-name", "m")
    await process.read_until("ready to roll")
    assert "simulator: ignored: --tp 8 --trust-remote-code\n" in process.lines
    assert (await get(process.port, "GET", "/v1/models")).json["data"][0]["id"] == "m"


async def test_sigterm_lets_the_running_stream_end_and_exits_with_0(launch, ask, body, get):
    process = await launch("--startup", "")
    await process.read_until("ready to roll")
    reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
    writer.write(ask("POST", "/v1/chat/completions", body(stream=True, max_tokens=2000, ignore_eos=True)))
    await reader.readuntil(b"data: ")
    process.process.send_signal(signal.SIGTERM)
    assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    writer.close()
    assert await process.rest() == 0


async def test_sigterm_while_warming_up_exits_with_0_too(launch):
    process = await launch("--startup", "warmup=1000")
    await process.read_until("Uvicorn running on")
    process.process.send_signal(signal.SIGTERM)
    assert await process.rest() == 0


async def test_a_crash_ends_the_process_by_sigkill_and_the_stream_without_an_end(launch, chat):
    process = await launch("--startup", "", "--fault", "crash-after=2", "--crash-silence", "0.1")
    await process.read_until("ready to roll")
    response = await chat(process.port, stream=True, max_tokens=50)
    assert len(response.events) == 3
    assert b"[DONE]" not in response.raw
    assert await process.rest() == -signal.SIGKILL


async def test_a_death_at_load_exits_with_1_and_says_why(launch):
    process = await launch("--startup", "load=0.1", "--fault", "die-at-load")
    assert await process.rest() == 1
    assert any("CUDA out of memory" in line for line in process.lines)


async def test_an_exit_code_can_be_asked_for(launch, get):
    process = await launch("--startup", "", "--exit-code", "7")
    await process.read_until("ready to roll")
    await get(process.port, "POST", "/sim/fault", {"kind": "exit"})
    assert await process.rest() == 7


@pytest.mark.parametrize(
    "flags", [("--startup", "boot=1"), ("--fault", "meteor"), ("--profile", "none"), ("--speedup", "0")]
)
async def test_a_flag_that_cannot_be_read_is_refused(launch, flags):
    assert await (await launch(*flags)).rest() == 2


async def test_a_port_in_use_is_said_in_one_line(launch):
    first = await launch("--startup", "")
    await first.read_until("ready to roll")
    second = await launch("--startup", "", "--port", str(first.port))
    assert await second.rest() == 1
    assert any(line.startswith("simulator: ") and "in use" in line for line in second.lines)


async def test_with_sglangs_ssl_flags_it_speaks_tls_alone(launch, tmp_path: Path) -> None:
    identity = make("r1")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    key.write_text(identity.key)
    cert.write_text(identity.cert)
    flags = ("--ssl-keyfile", str(key), "--ssl-certfile", str(cert), "--startup", "load=0,warmup=0")
    process = await launch(*flags)
    await process.read_until("ready to roll")
    assert any(f"Uvicorn running on https://127.0.0.1:{process.port}" in line for line in process.lines)
    context = context_for("https://127.0.0.1", identity.cert, None)
    async with httpx.AsyncClient(verify=context or False) as client:
        assert (await client.get(f"https://127.0.0.1:{process.port}/v1/models")).status_code == 200
        with pytest.raises(httpx.HTTPError):
            await client.get(f"http://127.0.0.1:{process.port}/v1/models")


async def test_ssl_files_that_are_none_end_it_with_the_reason(launch, tmp_path: Path) -> None:
    process = await launch("--ssl-keyfile", "/nowhere/key", "--ssl-certfile", "/nowhere/cert")
    assert await process.rest() == 1
    assert any("No such file" in line for line in process.lines)
