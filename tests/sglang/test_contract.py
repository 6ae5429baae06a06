"""The simulator and a real SGLang answer alike: both are held to the same recorded answers."""

from __future__ import annotations

import pytest

from tests.sglang.conftest import Engine
from tests.sglang.contract import REQUESTS, Request, canonical, load, send


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
async def test_every_request_gets_the_recorded_answer(request_: Request, engine: Engine) -> None:
    assert canonical(request_, await send(engine.port, request_, engine.key)) == load()[request_.name]
