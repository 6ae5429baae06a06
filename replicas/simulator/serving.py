"""The requests being served: into the engine, out as bytes, and all the ways in which one can end."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from . import shapes
from .answers import Answer, Choice
from .asking import Ask, parse
from .connection import Exchange
from .dialects import DIALECTS
from .engine import Sequence
from .invalid import Refused
from .reply import Reply

if TYPE_CHECKING:
    from .server import Simulator


class Serving:
    """Mutable: `live` (the unfinished answers by the rid of each of their sequences) and `answered` (a
    count).
    """

    def __init__(self, sim: Simulator) -> None:
        self._sim = sim
        self._config = sim.config
        self._parser = sim.config.reasoning_parser is not None
        self._reply = Reply.make(sim.config.reply, reasoning=self._parser)
        self.live: dict[str, Answer] = {}
        self.answered = 0

    def generate(self, exchange: Exchange) -> None:
        """One request to a generating endpoint: check it, queue it; the answer follows as the tokens come."""
        sim, faults = self._sim, self._sim.faults
        content_type = exchange.headers.get("content-type", "")
        ask = parse(exchange.path, content_type, bytes(exchange.body), self._config.context_length)
        if faults.take("drop"):
            exchange.connection.cut()
            return
        if ask.rid is not None and ask.rid in self.live:
            raise Refused(400, shapes.flat_error(f"Duplicate request ID detected: {ask.rid}"))
        if sim.engine.full or faults.take("queue_full"):
            sim.stats.refused += 1
            _refuse(exchange, ask)
            return
        marker = ask.user or exchange.headers.get("x-request-id")
        answer = Answer.make(ask, exchange, self._reply, parser=self._parser, marker=marker)
        sim.stats.arrived(answer)
        if faults.hang_after_requests is not None and sim.stats.runs_total > faults.hang_after_requests:
            faults.hang_after_requests = None
            sim.hang()
        for choice in answer.choices:
            self.live[choice.sequence.rid] = answer
            sim.engine.add(choice.sequence)
        self._levels()
        exchange.on_gone = lambda: self._gone(answer)
        exchange.on_writable = lambda: self._flush(answer)
        sim.runner.kick()

    def abort(self, given: str | None) -> None:
        """POST /abort_request: None: all; else, if a request has that very rid, every one whose rid *starts*
        so (the tokenizer manager looks for the whole, the scheduler for the beginning). The victims' answers
        end properly.
        """
        if given is not None and given not in self.live:
            return
        for rid, answer in list(self.live.items()):
            if given is not None and not rid.startswith(given):
                continue
            for choice in answer.choices:
                if choice.sequence.rid == rid and choice.sequence.finish is None:
                    self._abort(choice.sequence)
                    self._advance(choice)
        self._levels()

    def stepped(self, sequences: list[Sequence]) -> None:
        """The engine made a step: these have one token more."""
        self._sim.reports.stepped(len(sequences))
        for sequence in sequences:
            self._advance(sequence.owner)
            if self._sim.silent:
                return
        self._levels()

    def crashed(self) -> None:
        """The end of everything: nobody gets an answer any more."""
        for answer in set(self.live.values()):
            self._end(answer, "crashed")

    def _advance(self, choice: Choice) -> None:
        """One more token of one choice, or its end."""
        answer = choice.answer
        choice.ended = choice.sequence.finish is not None
        if answer.first_ns is None and choice.sequence.generated:
            answer.first_ns = time.monotonic_ns()
            self._sim.reports.first_token(
                streaming=answer.ask.stream, seconds=(answer.first_ns - answer.arrived_ns) / 1e9
            )
        if answer.gone and answer.ask.stream and not answer.over:
            # The first token wakes the task that waits for it; it makes its response and finds the client
            # gone.
            self._drop(answer)
            return
        if answer.ask.stream:
            self._stream(choice)
        if answer.over:
            self._complete(answer)
        self._sim.tripped(choice.sequence.generated, self.answered)

    def _stream(self, choice: Choice) -> None:
        answer, sequence = choice.answer, choice.sequence
        exchange = answer.exchange
        due = sequence.generated - choice.sent >= self._config.stream_interval or choice.sent == 0
        if sequence.finish is None and not (due and exchange.connection.writable):
            return  # a client that does not read gets the tokens together later
        if not answer.started:
            answer.started = True
            exchange.start(DIALECTS[answer.ask.path].headers)
            self._sim.stats.answering(answer)
        elif sequence.finish is None and self._sim.faults.take("tear"):
            for event in DIALECTS[answer.ask.path].events(choice):
                exchange.tear(event)
            return
        for event in DIALECTS[answer.ask.path].events(choice):
            exchange.chunk(event)

    def _flush(self, answer: Answer) -> None:
        for choice in answer.choices:
            if choice.sequence.finish is None and choice.sequence.generated > choice.sent:
                self._stream(choice)

    def _complete(self, answer: Answer) -> None:
        exchange = answer.exchange
        dialect = DIALECTS[answer.ask.path]
        aborted = any(choice.sequence.finish == "abort" for choice in answer.choices)
        self._end(answer, "aborted" if aborted else "disconnected" if answer.gone else "complete")
        self.answered += 1
        if answer.ask.stream:
            for event in dialect.closing(answer):
                exchange.chunk(event)
            if dialect.end:
                exchange.chunk(dialect.end)
            exchange.end()
        else:
            exchange.respond(200, dialect.body(answer))
            self._sim.stats.answering(answer)

    def _gone(self, answer: Answer) -> None:
        """The client left: seen at once in mid-stream, else by the next look, one each `disconnect_poll`
        s.
        """
        if self._sim.silent:
            return
        answer.gone = True
        self._sim.stats.disconnected.append(answer.rid)
        if answer.started:
            self._drop(answer)
            return
        poll = self._config.disconnect_poll
        waited = (time.monotonic_ns() - answer.arrived_ns) / 1e9
        next_look = (math.floor(waited / poll) + 1) * poll if poll > 0 else waited
        self._sim.later(next_look - waited, lambda: self._drop(answer))

    def _drop(self, answer: Answer) -> None:
        """Abort a request that nobody waits for."""
        if answer.finished_ns is not None:
            return
        for choice in answer.choices:
            if choice.sequence.finish is None:
                self._abort(choice.sequence)
        self._end(answer, "disconnected")
        self._levels()

    def _abort(self, sequence: Sequence) -> None:
        self._sim.engine.abort(sequence)
        self._sim.stats.aborted.append(sequence.rid)

    def _end(self, answer: Answer, end: str) -> None:
        """It is over, one way or the other: out of the books."""
        answer.finished_ns = time.monotonic_ns()
        for choice in answer.choices:
            self.live.pop(choice.sequence.rid, None)
        self._sim.stats.ended(answer, end)
        self._sim.reports.ended(
            streaming=answer.ask.stream,
            aborted=end != "complete",
            prompt_tokens=sum(answer.ask.prompts),
            tokens=answer.generated,
            seconds=(answer.finished_ns - answer.arrived_ns) / 1e9,
        )

    def _levels(self) -> None:
        self._sim.stats.running = self._sim.engine.running_count
        self._sim.stats.queued = len(self._sim.engine.waiting)


def _refuse(exchange: Exchange, ask: Ask) -> None:
    """The queue is full: 503 for a plain request, but 200 and an error as the first event for a stream."""
    if not ask.stream:
        exchange.respond(503, shapes.flat_error(shapes.QUEUE_FULL, "503", 503))
        return
    exchange.start()
    exchange.chunk(shapes.stream_error(shapes.QUEUE_FULL, "SERVICE_UNAVAILABLE", 503))
    exchange.chunk(shapes.DONE)
    exchange.end()
