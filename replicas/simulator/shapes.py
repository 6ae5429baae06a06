"""Bodies and events, byte-shaped as SGLang 0.5.23 writes them: same keys, same order, same spacing. Plain
functions.
"""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
QUEUE_FULL = "The request queue is full."
# SGLang's error messages leak where it is installed; this is the place in its own container image.
_SOURCE = "/sgl-workspace/sglang/python/sglang/srt/entrypoints/http_server.py"
# The functions that SGLang names there, by path.
_FUNCTIONS = {
    "/v1/chat/completions": "openai_v1_chat_completions",
    "/v1/completions": "openai_v1_completions",
    "/v1/responses": "v1_responses_request",
    "/generate": "generate_request",
    "/tokenize": "openai_v1_tokenize",
    "/detokenize": "openai_v1_detokenize",
    "/abort_request": "abort_request",
}
WRAPPED = ("/v1/responses",)  # whose errors are members of `error`, as OpenAI's are
_METADATA = {"weight_version": "default"}


def compact(value: object) -> bytes:
    """JSON as SGLang writes it nearly everywhere: no spaces, UTF-8 not escaped."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + compact(value) + b"\n\n"


def usage(prompt: int, completion: int, reasoning: int, *, reasoning_parser: bool) -> Json:
    """Token counts of one request."""
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None,
        "reasoning_tokens": reasoning,
        "completion_tokens_details": {"reasoning_tokens": reasoning} if reasoning_parser else None,
    }


def metadata(tokens: int) -> Json:
    """The last member of every non-streamed answer."""
    return {**_METADATA, "weight_versions": [{"version": "default", "start": 0, "end": tokens}]}


def chat(rid: str, created: int, model: str, choices: list[Json], used: Json, tokens: int) -> bytes:
    """A whole chat completion."""
    return compact(
        {
            "id": rid,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": choices,
            "usage": used,
            "metadata": metadata(tokens),
        }
    )


def chat_choice(
    index: int,
    content: str,
    reasoning: str | None,
    finish: str | None,
    matched: int | None,
    logprobs: Json | None = None,
) -> Json:
    """One entry of `choices` of a whole chat completion."""
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish,
        "matched_stop": matched,
    }


def text_completion(
    rid: str, created: int, model: str, choices: list[Json], used: Json, tokens: int
) -> bytes:
    """A whole text completion."""
    return compact(
        {
            "id": rid,
            "object": "text_completion",
            "created": created,
            "model": model,
            "choices": choices,
            "usage": used,
            "metadata": metadata(tokens),
        }
    )


def text_choice(index: int, text: str, finish: str | None, matched: int | None) -> Json:
    """One entry of `choices` of a text completion, streamed or not."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "matched_stop": matched}


class ChatChunks:
    """The events of one choice of a streamed chat completion. What is the same in all of them is encoded
    once.
    """

    def __init__(self, rid: str, created: int, model: str, index: int) -> None:
        self._envelope = {"id": rid, "object": "chat.completion.chunk", "created": created, "model": model}
        head = compact({**self._envelope, "choices": []})[:-2]  # cut off: ]}
        self._head = b"data: " + head + b'{"index":' + str(index).encode() + b',"delta":'
        self._content = self._head + b'{"reasoning_content":null,"content":'
        self._reasoning = self._head + b'{"reasoning_content":'

    _TAIL = b',"logprobs":null,"finish_reason":null,"matched_stop":null}]'

    def role(self) -> bytes:
        """The first event."""
        return (
            self._head + b'{"reasoning_content":null,"role":"assistant","content":""}' + self._TAIL + b"}\n\n"
        )

    def content(self, text: str, used: Json | None = None, logprobs: Json | None = None) -> bytes:
        """Some of the answer; `used` only with continuous_usage_stats."""
        tail = self._TAIL if logprobs is None else self._TAIL.replace(b"null", compact(logprobs), 1)
        return self._content + compact(text) + b"}" + tail + self._usage(used)

    def reasoning(self, text: str, used: Json | None = None) -> bytes:
        """Some of the thinking."""
        return self._reasoning + compact(text) + b"}" + self._TAIL + self._usage(used)

    def final(self, finish: str, matched: int | None) -> bytes:
        """The event that says why it ended."""
        tail = {"logprobs": None, "finish_reason": finish, "matched_stop": matched}
        return self._head + b'{"reasoning_content":null},' + compact(tail)[1:] + b"]}\n\n"

    def usage(self, used: Json) -> bytes:
        """The event after all choices, with include_usage."""
        return event({**self._envelope, "choices": [], "usage": used})

    @staticmethod
    def _usage(used: Json | None) -> bytes:
        return b"}\n\n" if used is None else b',"usage":' + compact(used) + b"}\n\n"


def text_chunk(rid: str, created: int, model: str, choice: Json | None, used: Json | None) -> bytes:
    """One event of a streamed text completion; every one has a `usage` member, unlike chat's."""
    return event(
        {
            "id": rid,
            "object": "text_completion",
            "created": created,
            "model": model,
            "choices": [] if choice is None else [choice],
            "usage": used,
        }
    )


def flat_error(message: str, kind: str = "BadRequestError", code: int = 400) -> bytes:
    """What the OpenAI endpoints answer: no `error` wrapper."""
    return compact({"object": "error", "message": message, "type": kind, "param": None, "code": code})


def stream_error(message: str, kind: str, code: int) -> bytes:
    """An error as the first event of a 200, spaces after the colons as recorded."""
    error = {"object": "error", "message": message, "type": kind, "param": None, "code": code}
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


def invalid_body(method: str, path: str, errors: list[str]) -> bytes:
    """A body that the request model refuses: a dump of pydantic's errors with a place in the source."""
    function = _FUNCTIONS.get(path, "endpoint")
    plural = "" if len(errors) == 1 else "s"
    lines = "\n".join(f"  {error}" for error in errors)
    message = (
        f"{len(errors)} validation error{plural}:\n{lines}\n\n"
        f'  File "{_SOURCE}", line 1870, in {function}\n    {method} {path} [{", ".join(errors)}]'
    )
    if path in WRAPPED:
        error = {"message": message, "type": "Bad Request", "param": None, "code": 400}
        return compact({"error": error})
    return flat_error(message, "Bad Request")


def wrong_content_type() -> bytes:
    """Anything but application/json."""
    error = (
        "{'loc': ['header', 'content-type'], 'msg': \"Unsupported Media Type: Only 'application/json' is "
        'allowed", '
        "'type': 'value_error'}"
    )
    return flat_error(f"1 validation error:\n  {error} [{error}]", "Bad Request")


def model_card(name: str, created: int, context_length: int) -> Json:
    """One entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "sglang",
        "root": name,
        "parent": None,
        "max_model_len": context_length,
    }


def unknown_model(name: str) -> bytes:
    """GET /v1/models/NAME of a model that is not served."""
    error = {
        "message": f"The model '{name}' does not exist",
        "type": "invalid_request_error",
        "param": "model",
    }
    return compact({"error": {**error, "code": "model_not_found"}})
