"""What Prometheus and Grafana are configured with exists: every metric and label, and the port."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import metrics
from gateway.settings import Settings

CONFIG = Path(__file__).parents[2] / "config"
DASHBOARDS = sorted((CONFIG / "grafana").glob("*.json"))
GRAFANA_LABELS = {"le"}


def series() -> dict[str, set[str]]:
    """Each name that a scrape can show, with its labels."""
    found = {name: set(labels) for name, (_, _, labels) in metrics.LEVELS.items()}
    for family in metrics.FAMILIES:
        (described,) = family.describe()
        labels = set(family._labelnames)
        if described.type == "histogram":
            found |= {f"{described.name}_bucket": labels | {"le"}}
            found |= {f"{described.name}_{part}": labels for part in ("sum", "count")}
        else:
            found[f"{described.name}_total"] = labels
    return found


def expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "query") and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_every_metric_and_label_of_a_dashboard_exists(path: Path) -> None:
    known = series()
    texts = list(expressions(json.loads(path.read_text())))
    used = {name for text in texts for name in re.findall(r"\bgateway_\w+", text)}
    assert used <= known.keys()
    for text in texts:
        for name, selector in re.findall(r"\b(gateway_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= known[name], text
        groups = re.findall(r"by \(([^)]*)\)", text)
        grouped = {label.strip() for group in groups for label in group.split(",")}
        everything = set().union(*(known[name] for name in re.findall(r"\bgateway_\w+", text)))
        assert grouped <= everything | GRAFANA_LABELS, text


def test_the_dashboard_shows_every_metric_there_is() -> None:
    text = "".join(path.read_text() for path in DASHBOARDS)
    names = {*metrics.LEVELS, *(family.describe()[0].name for family in metrics.FAMILIES)}
    assert {name for name in names if name not in text} == set()


def test_panels_have_a_dozen_titles_a_place_each_and_a_query() -> None:
    panels = json.loads((CONFIG / "grafana" / "skygate.json").read_text())["panels"]
    assert len(panels) >= 12
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["targets"]


def test_prometheus_scrapes_the_default_admin_port() -> None:
    (job,) = yaml.safe_load((CONFIG / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"127.0.0.1:{Settings().admin_port}"]
    assert job.get("metrics_path", "/metrics") == "/metrics"
