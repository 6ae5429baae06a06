"""Which header lines cross the gateway."""

from __future__ import annotations

from typing import Any

import pytest

from gateway import headers as lines

Header = tuple[bytes, bytes]


def sent(headers: list[Header], **changes: Any) -> tuple[bytes, list[Header]]:
    """Request line and headers that the replica gets."""
    values: dict[str, Any] = {
        "target": b"/v1/chat/completions", "authority": "10.0.0.1:30000", "key": "replica-key",
        "request_id": "id-1", "length": 42,
    }  # fmt: skip
    head = lines.to_replica(lines.Head(headers, "192.0.2.7", "http"), **{**values, **changes})
    assert head.endswith(b"\r\n\r\n")
    first, *rest = head[:-4].split(b"\r\n")
    return first, [(name, value) for name, _, value in (line.partition(b": ") for line in rest)]


def value(headers: list[Header], name: bytes) -> list[bytes]:
    return [v for n, v in headers if n == name]


def test_the_request_line_and_host_are_the_replicas() -> None:
    first, headers = sent([(b"host", b"gateway.example")], target=b"/pre/generate?x=1")
    assert first == b"POST /pre/generate?x=1 HTTP/1.1"
    assert value(headers, b"host") == [b"10.0.0.1:30000"]
    assert value(headers, b"x-forwarded-host") == [b"gateway.example"]
    assert value(headers, b"x-forwarded-proto") == [b"http"]
    assert value(headers, b"content-length") == [b"42"]


@pytest.mark.parametrize(
    "name",
    [b"connection", b"keep-alive", b"proxy-authorization", b"te", b"trailer", b"transfer-encoding",
     b"upgrade", b"expect", b"cookie", b"x-gateway-hold", b"x-api-key"],
)  # fmt: skip
def test_hop_by_hop_lines_and_what_is_ours_to_answer_stay_here(name: bytes) -> None:
    _, headers = sent([(name, b"close")])
    assert value(headers, name) == []


def test_the_clients_key_is_replaced_by_the_replicas() -> None:
    _, headers = sent([(b"authorization", b"Bearer client"), (b"x-api-key", b"client")])
    assert value(headers, b"authorization") == [b"Bearer replica-key"]
    assert not any(b"client" in v for _, v in headers)


def test_without_a_replica_key_no_key_is_sent() -> None:
    _, headers = sent([(b"authorization", b"Bearer client")], key=None)
    assert value(headers, b"authorization") == []


def test_the_answer_is_asked_for_uncompressed() -> None:
    _, headers = sent([(b"accept-encoding", b"gzip, br")])
    assert value(headers, b"accept-encoding") == [b"identity"]


def test_the_clients_length_is_replaced_by_the_bodys() -> None:
    _, headers = sent([(b"content-length", b"7")])
    assert value(headers, b"content-length") == [b"42"]


def test_everything_else_crosses_as_it_is_and_in_order() -> None:
    given = [(b"traceparent", b"00-ab-cd-01"), (b"x-a", b"1"), (b"content-type", b"application/json"),
             (b"x-a", b"2"), (b"user-agent", b"caf\xe9")]  # fmt: skip
    _, headers = sent(given)
    assert [h for h in headers if h in given] == given


def test_lines_named_by_connection_stay_here() -> None:
    _, headers = sent([(b"x-hop", b"1"), (b"x-stay", b"2"), (b"connection", b"keep-alive, X-Hop")])
    assert value(headers, b"x-hop") == []
    assert value(headers, b"x-stay") == [b"2"]


def test_the_client_is_put_at_the_end_of_those_it_came_through() -> None:
    _, headers = sent([(b"x-forwarded-for", b"198.51.100.1"), (b"x-forwarded-for", b"198.51.100.2")])
    assert value(headers, b"x-forwarded-for") == [b"198.51.100.1, 198.51.100.2, 192.0.2.7"]


@pytest.mark.parametrize(("line", "expects"), [
    ((b"Expect", b"100-continue"), True), ((b"expect", b"100-CONTINUE"), True),
    ((b"expect", b"something"), False), ((b"x-expect", b"100-continue"), False),
])  # fmt: skip
def test_whether_the_client_waits_to_be_asked_for_the_body(line: Header, expects: bool) -> None:
    assert lines.Head([line], "192.0.2.7", "http").expects is expects


@pytest.mark.parametrize("given", [b"abc-123", b"x" * 128])
def test_a_clients_request_id_is_kept(given: bytes) -> None:
    assert lines.request_id({b"x-request-id": given}, "made") == given.decode()


@pytest.mark.parametrize("given", [None, b"", b"a b", b"x" * 129, b"caf\xe9", b"a\tb"])
def test_a_request_id_that_could_spoil_a_log_is_replaced(given: bytes | None) -> None:
    assert lines.request_id({} if given is None else {b"x-request-id": given}, "made") == "made"


def test_a_replicas_lines_reach_the_client_but_for_hops_cookies_and_the_id() -> None:
    given = [(b"date", b"today"), (b"server", b"uvicorn"), (b"content-type", b"x"), (b"content-length", b"3"),
             (b"vary", b"Origin"), (b"transfer-encoding", b"chunked"), (b"connection", b"close"),
             (b"keep-alive", b"5"), (b"set-cookie", b"a=b"), (b"x-request-id", b"theirs")]  # fmt: skip
    assert lines.to_client(given, "ours") == [*given[:5], (b"x-request-id", b"ours")]


def test_a_stream_has_no_length_because_beats_may_come() -> None:
    assert lines.to_client([(b"content-length", b"3")], "a", sized=False) == [(b"x-request-id", b"a")]


def test_the_first_value_of_a_header_counts() -> None:
    assert lines.value([(b"a", b"1"), (b"a", b"2")], b"a") == b"1"
    assert lines.value([], b"a") == b""
