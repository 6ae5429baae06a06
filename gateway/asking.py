"""One streaming chat completion as a client sends it, judged as a client would judge it."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

QUESTION = 'How many times does the letter R occur in "strawberry"?'
MAX_TOKENS = 64


class Asking(threading.Thread):
    """Over plain HTTP, for as long as it takes. `first`: a piece of the answer came, `pieces`: how many;
    `over`: it has ended, and `error` is "" only if it was whole: `[DONE]` came, and text before it."""

    def __init__(self, url: str, model: str) -> None:
        super().__init__(daemon=True)
        self.first, self.over = threading.Event(), threading.Event()
        self.error, self.pieces = "", 0
        self._url, self._model = url, model

    def run(self) -> None:
        try:
            self.error = self._ask()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        self.over.set()

    def _ask(self) -> str:
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": self._model, "messages": messages, "max_tokens": MAX_TOKENS, "stream": True}
        with (
            httpx.Client(trust_env=False, timeout=None) as http,
            http.stream("POST", f"{self._url}/v1/chat/completions", json=body) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                return f"{answer.status_code} {_message(answer.text)}"
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return "" if self.pieces else "it ended without a word"
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return str(event["error"].get("message", event["error"]))
                    self._take(event)
        return "the stream ended without [DONE]"

    def _take(self, event: dict[str, Any]) -> None:
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            if delta.get("reasoning_content") or delta.get("content"):  # not a beat
                self.pieces += 1
                self.first.set()


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text[:200]
