"""What clients are told of a replica's errors: in the shape they know, and nothing of its insides."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import openai
from gateway.errors import NotTaken, Refused, ServicePaused

from .scripted import recorded

MESSAGES = openai.ENDPOINTS[b"/v1/messages"]
SEEDED = settings(deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("err-bad-json.http", 400, "JSON decode error"),
        ("err-bad-tool-choice.http", 400, "Tools cannot be empty"),
        ("err-embeddings.http", 400, "does not appear to be an embedding model"),
        ("err-empty-body.http", 400, "Field required"),
        ("err-empty-messages.http", 400, "Messages cannot be empty."),
        ("err-image.http", 400, "unsupported content type 'image_url'"),
        ("err-json-array.http", 500, "Internal Server Error"),
        ("err-max-tokens-too-big.http", 400, "maximum context length of 2048 tokens"),
        ("err-n0.http", 400, "range() arg 3 must not be zero"),
        ("err-no-ctype.http", 400, "Only 'application/json' is allowed"),
        ("err-temperature.http", 400, "non-negative finite number"),
        ("err-too-long-stream.raw", 400, "is longer than the model's context length"),
        ("get-not_found.http", 404, "Not Found"),
        ("get-chat-405.http", 405, "Method Not Allowed"),
        ("get-v1_models_unknown.http", 404, "tiny"),
    ],
)
def test_every_error_of_sglang_becomes_openais_shape(name: str, status: int, says: str) -> None:
    code, body = recorded(name)
    assert code == status
    error = openai.refused(code, body)
    assert isinstance(error, Refused)
    assert error.status == status
    shape = json.loads(openai.error_body(error))
    assert set(shape) == {"error"}
    assert set(shape["error"]) == {"message", "type", "param", "code"}
    assert shape["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert isinstance(shape["error"]["code"], str)
    if name != "get-v1_models_unknown.http":
        assert says in shape["error"]["message"]
    assert "/sgl-workspace" not in shape["error"]["message"]
    assert ".py" not in shape["error"]["message"]


def test_a_code_and_a_param_of_the_replica_are_kept_when_they_have_names() -> None:
    error = openai.refused(*recorded("get-v1_models_unknown.http"))
    assert (error.code, error.param) == ("model_not_found", "model")


def test_a_full_queue_may_be_tried_elsewhere() -> None:
    error = openai.refused(*recorded("queue-full-nonstream.raw"))
    assert isinstance(error, NotTaken)
    assert (error.message, error.retry_after) == ("The request queue is full.", 5)
    assert isinstance(openai.refused(503, b""), NotTaken)


@pytest.mark.parametrize("status", [401, 403])
def test_a_replica_that_refuses_our_key_is_not_the_clients_fault(status: int) -> None:
    error = openai.refused(status, b'{"error":"Unauthorized"}')
    assert (error.status, error.code) == (502, "replica_unauthorized")
    assert "--replica-api-key" in error.message


def test_a_redirect_of_the_replica_is_no_answer_for_the_client() -> None:
    assert openai.refused(307, b"").status == 502


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "The replica answered 500."),
        (b"<h1>Bad Gateway</h1>", "<h1>Bad Gateway</h1>"),
        (b"[1, 2]", "[1, 2]"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"error":{"message":["a", 1]}}', '["a", 1]'),
        (b'{"error":17}', '{"error": 17}'),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b"[" * 100_000, "["),
        (b'{"message":"\\ud800"}', "\ud800"),
        (b"\xff\xfe", "\ufffd"),
    ],
)
def test_an_error_body_of_any_shape_is_read_as_well_as_possible(body: bytes, says: str) -> None:
    error = openai.refused(500, body)
    assert error.message.startswith(says)
    assert json.loads(openai.error_body(error))["error"]["message"] == error.message


def test_an_error_says_which_model_code_a_number_is_not_a_code() -> None:
    error = openai.refused(400, b'{"message":"x","code":"400","param":["a"]}')
    assert (error.code, error.param) == ("invalid_request", None)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ('boom File "/opt/x/y.py", line 12, in f: why', "boom: why"),
        ("no such file: '/root/.cache/hub/x.json'", "no such file: ''"),
        ("see /usr/lib", "see"),
        ("and/or both, image/png", "and/or both, image/png"),
        ("input/output/total", "input/output/total"),
        ("https://example.org/a/b says no", "https://example.org/a/b says no"),
        ("a\n  b\tc", "a b c"),
    ],
)
def test_paths_of_the_replica_are_taken_out_of_its_messages_and_nothing_else(message: str, says: str) -> None:
    assert openai.scrub(message) == says


def test_a_message_is_at_most_2000_characters() -> None:
    assert len(openai.scrub("x" * 5000)) == 2000


def test_anthropics_clients_get_their_own_shape() -> None:
    body = json.loads(openai.error_body(ServicePaused("no"), MESSAGES))
    assert body["type"] == "error"
    assert body["error"]["message"] == "no"
    frame = openai.error_frame(ServicePaused("no"), MESSAGES)
    assert frame.startswith(b"event: error\ndata: {")


@pytest.mark.parametrize("endpoint", openai.ENDPOINTS.values(), ids=lambda e: e.path)
@SEEDED
@given(message=st.text())
def test_an_error_event_is_one_event_that_holds_the_error(endpoint: openai.Endpoint, message: str) -> None:
    frame = openai.error_frame(ServicePaused(message), endpoint)
    assert openai.first_event_end(frame) == len(frame)
    data = json.loads(frame[frame.index(b"data: ") + 6 :])
    assert (data if endpoint.typed_errors else data["error"])["message"] == message
    assert not openai.is_complete(frame, endpoint)
