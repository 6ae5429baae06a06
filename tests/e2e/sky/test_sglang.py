"""A real SGLang (tests/sglang) as a replica that SkyPilot launched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sglang import install

pytestmark = pytest.mark.sky

YAML = Path(install.__file__).with_name("sglang.yaml")


def test_the_first_request_launches_a_real_sglang_and_is_streamed_from_it(
    gateways: Callable[..., Any], site: Any, ask: Any, lap: Any
) -> None:
    if not (install.home() / install.STAMP).exists():
        pytest.skip(f"no SGLang in {install.home()}; `python tests/sglang/install.py` makes one (4 GB)")
    gateway = gateways("sglang", yaml=YAML.read_text())
    text, phases = ask(gateway, seconds=500)
    lap(f"the first request: sky launch, SGLang's start, held, streamed {text!r}")
    assert text
    assert {"provision", "setup"} <= set(phases)
    (replica,) = gateway.ready()
    assert site.clusters("sglang") == [replica["id"]]
    assert replica["url"].startswith("https://10.77.0.1")
    ask(gateway)
    lap("a second request, warm")
    assert "The server is fired up and ready to roll!" in gateway.logs(replica["id"])
    assert gateway.cli("down").returncode == 0
    lap("gateway down")
