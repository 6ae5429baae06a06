"""`gateway cost`: what the replicas have cost, as a table, CSV or JSON; also when no gateway runs."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from gateway.operate import admin, admin_options, friendly, show, state_folder
from replicas import costs

if TYPE_CHECKING:
    from rich.console import RenderableType

ESTIMATE = "An estimate: list prices times the time each machine was known to exist. Days are UTC."
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "day": ("day", "replicas", "hours", "dollars"),
    "key": ("key", "replicas", "hours", "dollars"),
    "replica": (
        *("replica", "service", "plan", "region", "spot", "price", "from", "to", "hours", "dollars"),
        *("key", "request"),
    ),
}


@click.command()
@click.option("--since", metavar="7d|DATE", help="Only what was spent since; a date is UTC (default: all).")
@click.option("--by", type=click.Choice(costs.BYS), default="day", show_default=True, help="A line for each.")
@click.option("--csv", "as_csv", is_flag=True, help="For spreadsheets.")
@click.option("--json", "as_json", is_flag=True, help="For scripts; times are unix seconds.")
@admin_options
def cost(since: str | None, by: str, as_csv: bool, as_json: bool, **where: str | None) -> None:
    """Show what replicas have cost: by day, by replica, or by the API key that woke them. An estimate."""
    if as_csv and as_json:
        raise click.UsageError("--csv or --json, not both")
    try:
        begin = None if since is None else costs.moment(since, time.time())
    except ValueError as error:
        raise click.UsageError(f"--since: {error}") from None
    bill = _ask(begin, by, **where)
    if as_json:
        click.echo(json.dumps(bill, indent=2))
    elif as_csv:
        click.echo(as_text(bill), nl=False)
    else:
        show(view(bill))


def _ask(since: float | None, by: str, **where: str | None) -> dict[str, Any]:
    from gateway.client import NotRunning

    query = urlencode({"by": by} | ({} if since is None else {"since": _iso(since)}))
    try:
        with admin(**where) as client:
            bill: dict[str, Any] = client.call("GET", f"/admin/cost?{query}")
            return bill
    except click.ClickException as error:
        if not isinstance(error.__context__, NotRunning) or where["admin_url"]:
            raise
        with friendly():
            return without_gateway(state_folder(where["state_dir"]), since, by)


def without_gateway(folder: Path, since: float | None, by: str) -> dict[str, Any]:
    """The same from the state dir, up to when it was last written. Raises TableError."""
    from gateway.assembly import TABLE_FILE
    from replicas.table import read_ledger

    entries = read_ledger(folder / TABLE_FILE, since)
    known = max((e.until for e in entries if not e.closed), default=time.time())
    return costs.bill(entries, by, known, since)


def as_text(bill: Mapping[str, Any]) -> str:
    """CSV with a head line; times as ISO 8601 in UTC, what is not known empty."""
    columns = COLUMNS[bill["by"]]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in bill["rows"]:
        writer.writerow([_cell(row, column) for column in columns])
    return text.getvalue()


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if column in ("from", "to"):
        return _iso(value)
    return f"{value:.6f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def view(bill: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns = [c for c in COLUMNS[bill["by"]] if any(row[c] not in ("", None) for row in bill["rows"])]
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        title = {"price": "$/h", "dollars": "$"}.get(column, column)
        number = column in ("replicas", "hours", "dollars", "price")
        table.add_column(title, justify="right" if number else "left")
    for row in bill["rows"]:
        table.add_row(*(Text(_shown(row, column, bill["until"])) for column in columns))
    since = "" if bill["since"] is None else f" since {_iso(bill['since'])}"
    total = f"${bill['total']:.2f} in all{since}, up to {_iso(bill['until'])}"
    parts: list[RenderableType] = [table] if bill["rows"] else []
    return Group(*parts, Text(total, style="bold"), Text(ESTIMATE, style="dim"))


def _shown(row: Mapping[str, Any], column: str, now: float) -> str:
    value = row[column]
    match column:
        case "from":
            return _iso(value)
        case "to":
            return "now" if row["open"] and value >= now - 60 else _iso(value)
        case "dollars" | "price" | "hours":
            return "" if value is None else f"{value:.2f}"
        case "spot":
            return {True: "spot", False: "on-demand"}.get(value, "")
        case "key":
            return value or "-"  # no request woke it, or none that had to show a key
        case _:
            return str(value)


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
