"""`gateway cost` and what `gateway status` says of money, against an admin port and without one."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from gateway import cli
from gateway.display import cost_text, reason_text
from gateway.settings import SETTINGS
from replicas.costs import HOUR, Entry
from replicas.table import Table

if TYPE_CHECKING:
    from .conftest import AdminPort, FakeController

Invoke = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, home: Path) -> Invoke:
    """The command, in a state dir of its own where no gateway runs."""
    for row in SETTINGS:
        monkeypatch.delenv(row.env, raising=False)
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(home))
    monkeypatch.delenv("GATEWAY_ADMIN_URL", raising=False)
    return lambda *words, **environment: CliRunner().invoke(cli.main, list(words), env=environment)


@pytest.fixture
def ask(invoke: Invoke, port: AdminPort) -> Invoke:
    return lambda *words: invoke(*words, GATEWAY_ADMIN_URL=port.url)


def test_the_bill_is_a_table_with_its_total_and_says_that_it_is_an_estimate(ask: Invoke) -> None:
    result = ask("cost")
    assert result.exit_code == 0, result.output
    for words in ("2023-11-14", "2023-11-15", "$5.00 in all", "An estimate", "UTC"):
        assert words in result.output, words


def test_by_replica_it_shows_plan_market_price_times_and_who_woke_it(ask: Invoke) -> None:
    output = ask("cost", "--by", "replica").output
    for words in ("svc-gw-0a1b2c3d-1", "H200:8x1 spot", "2.50", "2023-11-14T22:13:20Z", "alice", "req-1"):
        assert words in output, words
    assert "region" not in output, "an empty column is left out"


def test_csv_has_a_head_line_and_times_that_a_spreadsheet_reads(ask: Invoke) -> None:
    rows = list(csv.DictReader(io.StringIO(ask("cost", "--by", "replica", "--csv").output)))
    assert [(r["replica"], r["from"], r["hours"], r["dollars"], r["spot"], r["region"]) for r in rows] == [
        ("svc-gw-0a1b2c3d-1", "2023-11-14T22:13:20Z", "2", "5", "True", "")
    ]
    assert ask("cost", "--by", "key", "--csv").output == "key,replicas,hours,dollars\nalice,1,2,5\n"


def test_json_is_the_answer_of_the_admin_port_and_since_reaches_it_as_a_time(
    ask: Invoke, controller: FakeController
) -> None:
    bill = json.loads(ask("cost", "--json", "--by", "key", "--since", "2023-11-14T23:13:20").output)
    assert (bill["total"], bill["rows"][0]["key"]) == (2.5, "alice")
    assert controller.calls == [("cost", "2023-11-14T23:13:20Z", "key")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--since", "soon"), "--since: 'soon' is neither a time ago such as 7d nor a date"),
        (("--by", "week"), "'week' is not one of 'day', 'replica', 'key'"),
        (("--csv", "--json"), "--csv or --json, not both"),
    ],
)
def test_wrong_use_says_what_is_right(invoke: Invoke, words: tuple[str, ...], says: str) -> None:
    result = invoke("cost", *words)
    assert result.exit_code == 2
    assert says in result.output


def test_without_a_gateway_the_ledger_is_read_from_the_state_dir(invoke: Invoke, home: Path) -> None:
    home.mkdir()
    now = time.time()
    with Table(home / "state.db") as table:
        ended = Entry("r1-1", "r1", now - 5 * HOUR, now - 4 * HOUR, price=3.0, dollars=3.0, closed=True)
        left = Entry("r1-2", "r1", now - 3 * HOUR, now - 2 * HOUR, price=3.0, dollars=3.0, key="bob")
        left = replace(left, region="aws/us-east-1/us-east-1a", spot=False)
        table.save_ledger([ended, left])
    result = invoke("cost", "--by", "replica")
    assert result.exit_code == 0, result.output
    assert "$6.00 in all, up to" in result.output
    bill = json.loads(invoke("cost", "--by", "replica", "--since", "210m", "--json").output)
    assert [row["replica"] for row in bill["rows"]] == ["r1-2"]
    assert bill["until"] == left.until, "what the last controller knew"
    (row,) = csv.DictReader(io.StringIO(invoke("cost", "--by", "replica", "--since", "210m", "--csv").output))
    assert (row["region"], row["spot"]) == ("aws/us-east-1/us-east-1a", "False")
    for words in ("aws/us-east-1/us-east-1a", "on-demand"):
        assert words in result.output


def test_without_a_gateway_and_a_state_dir_it_says_so_in_one_line(invoke: Invoke) -> None:
    result = invoke("cost")
    assert result.exit_code == 1
    assert "state.db: there is no such file" in result.output


def test_nothing_spent_is_a_total_of_zero(invoke: Invoke, home: Path) -> None:
    home.mkdir()
    Table(home / "state.db").close()
    assert "$0.00 in all" in invoke("cost").output


def test_the_status_tells_idle_share_and_saving_when_they_are_known() -> None:
    cost = {"hourly": 2.5, "total": 10.0, "idle_share": 0.25, "always_on": 110.0, "saved": 100.0}
    assert cost_text(cost) == (
        "$2.50 an hour now, $10.00 so far; idle 25% of its ready time; $100.00 saved against always on"
    )
    plain = "$0.00 an hour now, $0.00 so far"
    assert cost_text({"hourly": 0, "total": 0.0, "idle_share": None, "saved": None}) == plain
    assert cost_text({"hourly": None, "total": None}) == plain, "an older gateway"
    assert "saved" not in cost_text({"hourly": 1, "total": 9.0, "idle_share": None, "saved": -3.0})


def test_a_kept_machine_shows_its_countdown(ask: Invoke, controller: FakeController) -> None:
    assert reason_text({"reason": "exit 1", "kept_until": 2400.0}, 600.0) == "kept for 30 min more: exit 1"
    assert reason_text({"reason": "exit 1", "kept_until": None}, 600.0) == "exit 1"
    assert reason_text({}, 600.0) == ""
    controller.service["replicas"][0] |= {"state": "failed", "kept_until": time.time() + 7200}
    assert "kept for 2.0 h more: 3 requests wait" in ask("status").output
