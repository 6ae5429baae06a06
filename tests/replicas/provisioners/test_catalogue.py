"""Prices from SkyPilot's catalogues: the cheapest offer, without a network, within a deadline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replicas.provisioners import catalogue
from replicas.provisioners.catalogue import Price


def offer(cloud: str, count: float, price: float, spot: float = float("nan")) -> Any:
    return SimpleNamespace(cloud=cloud, accelerator_count=count, price=price, spot_price=spot)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for cloud in ("common", "aws", "lambda"):
        folder = tmp_path / ".sky/catalogs/v8" / cloud
        folder.mkdir(parents=True)
        (folder / "vms.csv").touch()
    return tmp_path


def says(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def test_the_cheapest_offer_of_each_market_counts() -> None:
    asked: list[dict[str, Any]] = []

    def list_accelerators(**arguments: Any) -> dict[str, list[Any]]:
        asked.append(arguments)
        if arguments["name_filter"] != r"^H200$":
            return {}
        return {"H200": [offer("AWS", 8, 40.0, 15.0), offer("GCP", 8, 35.0), offer("GCP", 1, 5.0, 1.0)]}

    sky = SimpleNamespace(catalog=SimpleNamespace(list_accelerators=list_accelerators))
    assert catalogue.look(sky, ["H200:8", "A100-80GB:8"], ["aws", "gcp"]) == {
        "H200:8": {"on-demand": Price(35.0, "GCP"), "spot": Price(15.0, "AWS")}
    }
    assert asked[1]["name_filter"] == r"^A100\-80GB$"
    assert asked[0]["clouds"] == ["aws", "gcp"]


def test_only_catalogues_that_are_here_are_asked(home: Path, tmp_path: Path) -> None:
    assert catalogue.clouds(home) == ["aws", "lambda"]
    assert catalogue.ask(["H200:8"], tmp_path / "nowhere", command=("/no/such/program",)) == {}
    assert catalogue.ask([], home, command=("/no/such/program",)) == {}


def test_the_answer_is_the_last_line_that_skypilot_prints(home: Path) -> None:
    answer = json.dumps({"H200:8": {"spot": [15.0, "AWS"]}})
    program = says(f"import sys; print('hello'); print({answer!r} if '--clouds' in sys.argv else '')")
    assert catalogue.ask(["H200:8"], home, command=program) == {"H200:8": {"spot": Price(15.0, "AWS")}}


@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "exit(1)", "print('no JSON')", "pass"])
def test_no_answer_in_time_or_a_strange_one_is_no_price(home: Path, program: str) -> None:
    assert catalogue.ask(["H200:8"], home, deadline=0.5, command=says(program)) == {}
