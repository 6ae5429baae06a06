"""The error tree: its picture, its statuses and its Retry-After."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import errors
from gateway.errors import End, GatewayError

SEEDED = settings(deadline=None, derandomize=True)
LINE = re.compile(r"^(?P<branch>[ │├└─]*)(?P<name>\w+)\s{2,}(?P<text>.*)$")


def classes(root: type[GatewayError] = GatewayError) -> list[type[GatewayError]]:
    return [root, *(found for child in root.__subclasses__() for found in classes(child))]


def drawn() -> list[tuple[str, str | None, str]]:
    """(class, its parent, the text beside it) as the module's docstring draws them."""
    assert errors.__doc__ is not None
    path: list[str] = []
    rows = []
    for line in errors.__doc__.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        depth = (len(match["branch"]) - 4) // 4
        path[depth:] = [match["name"]]
        rows.append((match["name"], path[depth - 1] if depth else None, match["text"]))
    return rows


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    tree = [(c.__name__, c.__bases__[0].__name__ if c is not GatewayError else None) for c in classes()]
    assert [(name, parent) for name, parent, _ in drawn()] == tree


@pytest.mark.parametrize(("name", "parent", "text"), drawn())
def test_what_the_picture_says_of_a_class_is_true(name: str, parent: str | None, text: str) -> None:
    kind = getattr(errors, name)
    statuses = [int(status) for status in re.findall(r"(?<!= )\b[45]\d\d\b", text)]
    assert not statuses or kind.status in statuses
    for end in re.findall(r"end=(\w+)", text):
        assert kind.end == End(end)


@pytest.mark.parametrize("kind", classes())
def test_every_error_has_a_status_a_code_and_a_retry_after_that_clients_obey(
    kind: type[GatewayError],
) -> None:
    error = kind("why")
    assert 400 <= error.status <= 599
    assert re.fullmatch(r"[a-z][a-z_]+", error.code)
    assert re.fullmatch(r"[a-z_]+", error.type)
    assert error.end in End
    assert error.retry_after is None or 1 <= error.retry_after <= 60
    assert str(error) == error.message == "why"
    if error.status in (429, 503):
        assert error.retry_after is not None


@SEEDED
@given(st.integers())
def test_retry_after_is_always_within_1_and_60_seconds(seconds: int) -> None:
    assert GatewayError("x", retry_after=seconds).retry_after == min(60, max(1, seconds))


def test_what_is_given_wins_over_what_the_class_says() -> None:
    error = GatewayError("x", code="c", param="p", status=418, type="t", headers={"A": "b"})
    assert (error.code, error.param, error.status, error.type) == ("c", "p", 418, "t")
    assert error.headers == {"A": "b"}
    assert GatewayError.status == 500


def test_the_ends_are_those_of_the_design() -> None:
    assert {end.value for end in End} == {
        "complete", "client_gone", "client_slow", "upstream_error", "upstream_died", "timeout",
        "cold_start_failed", "rejected", "shutdown", "worker_died",
    }  # fmt: skip
