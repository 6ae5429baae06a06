"""API keys of the public port."""

from __future__ import annotations

import pytest

from gateway.errors import Unauthorized
from gateway.keys import ApiKeys

KEYS = ApiKeys([("alice", "sk-a"), ("bob", "sk-b"), ("zoë", "sk-ü")])


def test_without_keys_everybody_is_let_in() -> None:
    assert ApiKeys([]).check({}) == ""
    assert ApiKeys([]).check({b"authorization": b"Bearer whatever"}) == ""


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({b"authorization": b"Bearer sk-a"}, "alice"),
        ({b"authorization": b"bearer  sk-b "}, "bob"),
        ({b"authorization": "Bearer sk-ü".encode()}, "zoë"),
        ({b"x-api-key": b"sk-b"}, "bob"),
        ({b"x-api-key": b"wrong", b"authorization": b"Bearer sk-a"}, "alice"),
        ({b"x-api-key": b"sk-b", b"authorization": b"Basic Zm9v"}, "bob"),
    ],
)
def test_a_key_is_known_by_its_name(headers: dict[bytes, bytes], name: str) -> None:
    assert KEYS.check(headers) == name


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b""},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer "},
        {b"authorization": b"sk-a"},
        {b"authorization": b"Basic sk-a"},
        {b"authorization": b"Bearer sk-"},
        {b"authorization": b"Bearer sk-ab"},
        {b"authorization": b"Bearer SK-A"},
        {b"authorization": b"Bearer \xff\xfe"},
        {b"x-api-key": b""},
    ],
)
def test_anything_else_is_refused_with_what_to_do(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(Unauthorized, match="Authorization: Bearer KEY") as caught:
        KEYS.check(headers)
    assert caught.value.status == 401


def test_a_wrong_key_and_a_missing_one_are_told_apart() -> None:
    with pytest.raises(Unauthorized, match="No API key"):
        KEYS.check({})
    with pytest.raises(Unauthorized, match="Incorrect API key"):
        KEYS.check({b"authorization": b"Bearer nope"})


def test_a_log_shows_names_and_never_keys() -> None:
    assert repr(KEYS) == "<ApiKeys alice bob zoë>"
    assert repr(ApiKeys([])) == "<ApiKeys open>"
