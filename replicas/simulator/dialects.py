"""From tokens to bytes: what each generating endpoint says of an Answer."""

from __future__ import annotations

import time
from typing import Protocol

from . import shapes
from .answers import Answer, Choice
from .engine import Sequence
from .messages import Messages
from .responses import Responses

EOS = 1  # token id that ends a DeepSeek-R1 answer; comes as matched_stop


def matched(sequence: Sequence) -> int | None:
    """`matched_stop`: the id of the end token, if that is what ended it."""
    return EOS if sequence.finish == "stop" else None


class Dialect(Protocol):
    """How one endpoint says things. `end`: what closes a stream; `headers`: of a stream, whole lines."""

    end: bytes
    headers: bytes

    def events(self, choice: Choice) -> list[bytes]:
        """The events that are due now that `choice` has more tokens, or has finished."""

    def closing(self, answer: Answer) -> list[bytes]:
        """The events between the last choice's end and [DONE]."""

    def body(self, answer: Answer) -> bytes:
        """The whole answer at once."""


class Chat:
    """/v1/chat/completions."""

    end, headers = shapes.DONE, b""

    def events(self, choice: Choice) -> list[bytes]:
        answer, sequence, chunks = choice.answer, choice.sequence, choice.chunks
        events = []
        if chunks is None:
            chunks = choice.chunks = shapes.ChatChunks(
                sequence.rid, answer.created, answer.ask.model, choice.index
            )
            events.append(chunks.role())
        if choice.sent < sequence.generated:
            used = answer.usage([choice]) if answer.ask.continuous_usage else None
            if answer.parser and answer.ask.separate_reasoning:
                thinking, text = answer.reply.split(choice.sent, sequence.generated)
                if thinking:
                    events.append(chunks.reasoning(thinking, used))
            else:
                text = answer.reply.text(choice.sent, sequence.generated)
            if text:
                events.append(chunks.content(text, used, logprobs(choice, choice.sent)))
            choice.sent = sequence.generated
        if sequence.finish is not None:
            events.append(chunks.final(sequence.finish, matched(sequence)))
        return events

    def closing(self, answer: Answer) -> list[bytes]:
        chunks = answer.choices[0].chunks
        return [chunks.usage(answer.usage())] if answer.ask.include_usage and chunks is not None else []

    def body(self, answer: Answer) -> bytes:
        choices = []
        for choice in answer.choices:
            sequence = choice.sequence
            thinking: str | None = None
            if answer.parser and answer.ask.separate_reasoning:
                thinking, text = answer.reply.split(0, sequence.generated)
            else:
                text = answer.reply.text(0, sequence.generated)
            choices.append(
                shapes.chat_choice(
                    choice.index,
                    text,
                    thinking or None,
                    sequence.finish,
                    matched(sequence),
                    logprobs(choice, 0),
                )
            )
        return shapes.chat(
            answer.rid,
            answer.created,
            answer.ask.model,
            choices,
            answer.usage(),
            answer.choices[0].sequence.generated,
        )


class Completions:
    """/v1/completions."""

    end, headers = shapes.DONE, b""

    def events(self, choice: Choice) -> list[bytes]:
        answer, sequence = choice.answer, choice.sequence
        text = answer.reply.text(choice.sent, sequence.generated)
        choice.sent = sequence.generated
        entry = shapes.text_choice(choice.index, text, sequence.finish, matched(sequence))
        used = answer.usage([choice]) if answer.ask.continuous_usage else None
        return [shapes.text_chunk(sequence.rid, answer.created, answer.ask.model, entry, used)]

    def closing(self, answer: Answer) -> list[bytes]:
        if not answer.ask.include_usage:
            return []
        used = {name: count for name, count in answer.usage().items() if count is not None}
        return [shapes.text_chunk(answer.rid, answer.created, answer.ask.model, None, used)]

    def body(self, answer: Answer) -> bytes:
        choices = []
        for choice in answer.choices:
            text = answer.reply.text(0, choice.sequence.generated)
            choices.append(
                shapes.text_choice(choice.index, text, choice.sequence.finish, matched(choice.sequence))
            )
        return shapes.text_completion(
            answer.rid,
            answer.created,
            answer.ask.model,
            choices,
            answer.usage(),
            answer.choices[0].sequence.generated,
        )


class Generate:
    """/generate, SGLang's own: each event holds the whole text so far."""

    end, headers = shapes.DONE, b""

    def events(self, choice: Choice) -> list[bytes]:
        choice.sent = choice.sequence.generated
        return [shapes.event(self._entry(choice))]

    def closing(self, answer: Answer) -> list[bytes]:
        return []

    def body(self, answer: Answer) -> bytes:
        entries = [self._entry(choice) for choice in answer.choices]
        return shapes.compact(entries[0] if len(entries) == 1 else entries)

    @staticmethod
    def _entry(choice: Choice) -> shapes.Json:
        sequence, answer = choice.sequence, choice.answer
        finish: shapes.Json | None = None
        if sequence.finish == "length":
            finish = {"type": "length", "length": sequence.generated}
        elif sequence.finish == "stop":
            finish = {"type": "stop", "matched": EOS}
        elif sequence.finish == "abort":
            finish = {
                "type": "abort",
                "message": "Aborted by AbortReq.",
                "status_code": None,
                "err_type": None,
            }
        end = finish is not None
        began, first, now = answer.arrived_ns, answer.first_ns or 0, time.monotonic_ns()
        clock = time.time() - now / 1e9  # of the wall, when the other one said 0
        info: shapes.Json = {
            "id": sequence.rid,
            "finish_reason": finish,
            "prompt_tokens": sequence.prompt_tokens,
            "weight_version": "default",
            "num_retractions": sequence.retractions,
            "storage_prefetch_wait": 0.0,
            "storage_staging_wait": 0.0,
            "forward_entry_time": began / 1e9,
            "prefill_finished_time": first / 1e9,
            "queue_time": 0.0,
            "reasoning_tokens": 0,
            "completion_tokens": sequence.generated,
            "cached_tokens": 0,
        }
        if end:
            info["weight_versions"] = [{"version": "default", "start": 0, "end": sequence.generated}]
        info["cached_tokens_details"] = {"device": 0, "host": 0}
        info["dp_rank"] = None
        if end:
            info["e2e_latency"] = (now - began) / 1e9
            info["request_received_ts"] = clock + began / 1e9
            info["first_token_latency"] = (first - began) / 1e9
            info["api_server_dispatch_finish_ts"] = clock + began / 1e9
            info["request_finished_ts"] = clock + now / 1e9
            info["decode_throughput"] = sequence.generated / max(1e-9, (now - began) / 1e9)
        if not answer.started or choice.sent <= 1 or end:
            info["response_sent_to_client_ts"] = clock + now / 1e9
        ids = list(range(100, 100 + sequence.generated))
        return {"text": answer.reply.text(0, sequence.generated), "output_ids": ids, "meta_info": info}


def logprobs(choice: Choice, start: int) -> shapes.Json | None:
    """Of the tokens from `start` on, if they were asked for: certain of each, as a greedy model nearly is."""
    alternatives = choice.answer.ask.logprobs
    if alternatives is None:
        return None
    found = []
    for index in range(start, choice.sequence.generated):
        token = choice.answer.reply.text(index, index + 1)
        entry: shapes.Json = {"token": token, "bytes": list(token.encode()), "logprob": 0.0}
        others = [{**entry, "logprob": -20.0 * rank} for rank in range(alternatives)]
        found.append({**entry, "top_logprobs": others})
    return {"content": found}


DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": Chat(),
    "/v1/completions": Completions(),
    "/generate": Generate(),
    "/v1/messages": Messages(),
    "/v1/responses": Responses(),
}
