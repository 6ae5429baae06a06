"""A real SGLang (tests/sglang) as a replica that SkyPilot launched."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.sglang import install
from tests.sglang.contract import REQUESTS, Request, canonical, load, send

pytestmark = pytest.mark.sky

YAML = Path(install.__file__).with_name("sglang.yaml")
FLAGS = "--max-queued-requests 30"   # with which the contract was recorded


class Replica:
    """The engine itself: the node's address, the pinned certificate, the replica's key."""

    def __init__(self, gateway: Any, url: str) -> None:
        where = urlsplit(url)
        self.host, self.port = str(where.hostname), where.port or 0
        self.key = gateway.secrets()["the replica's key"]
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.tls.check_hostname = False
        self.tls.load_verify_locations(cadata=gateway.certificate())

    async def breaches(self) -> list[str]:
        """The contract's requests that it does not answer as was recorded."""
        recorded, wrong = load(), []
        for request in REQUESTS:
            answer = await send(self.port, request, self.key, host=self.host, tls=self.tls)
            if (found := canonical(request, answer)) != recorded[request.name]:
                wrong.append(f"{request.name}: {found} is not {recorded[request.name]}")
        return wrong

    def get(self, path: str) -> str:
        request = Request("", "GET", path)
        answer = asyncio.run(send(self.port, request, self.key, host=self.host, tls=self.tls))
        assert answer.status == 200, answer.raw
        return answer.rest.decode()

    def aborted(self) -> float:
        """`sglang:num_aborted_requests_total`, summed."""
        lines = self.get("/metrics").splitlines()
        found = [line for line in lines if line.startswith("sglang:num_aborted_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in found)


def leave_in_mid_stream(gateway: Any) -> None:
    """A request for many tokens, left at the first."""
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1800, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", gateway.url + "/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                return
    raise AssertionError("it had ended before")


def test_the_first_request_launches_a_real_sglang_which_keeps_the_contract_and_aborts_what_is_left(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any
) -> None:
    if not (install.home() / install.STAMP).exists():
        pytest.skip(f"no SGLang in {install.home()}; `python tests/sglang/install.py` makes one (4 GB)")
    yaml = YAML.read_text()
    assert "${SGLANG_FLAGS:-}" in yaml
    gateway = gateways("sglang", yaml=yaml.replace("${SGLANG_FLAGS:-}", FLAGS))
    text, phases = ask(gateway, seconds=500)
    lap(f"the first request: sky launch, SGLang's start, held, streamed {text!r}")
    assert text
    assert {"provision", "setup"} <= set(phases)
    (ready,) = gateway.ready()
    assert site.clusters("sglang") == [ready["id"]]
    assert ready["url"].startswith("https://10.77.0.1")
    ask(gateway)
    lap("a second request, warm")
    replica = Replica(gateway, ready["url"])
    wrong = asyncio.run(replica.breaches())
    assert not wrong, "\n".join(wrong)
    lap(f"the contract, {len(REQUESTS)} requests to it")
    before = replica.aborted()
    leave_in_mid_stream(gateway)
    eventually(lambda: replica.aborted() == before + 1)
    lap("a client left in mid stream, aborted there")
    assert "The server is fired up and ready to roll!" in gateway.logs(ready["id"])
    assert gateway.cli("down").returncode == 0
    lap("gateway down")
