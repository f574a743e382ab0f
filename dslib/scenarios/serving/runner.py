"""An engine in a thread of its own: requests come and go between two steps, and events go to who waits for them.

    while True:
        do what was asked for meanwhile (add, cancel); wait for it if there is nothing to write
        for event in engine.step():
            put it into the inbox of its answer

Only this thread touches the engine. Whoever asks gets a future; an :class:`Answer` collects events on the event loop of
the server, which never waits for a step.

Book: ``chapters/scenarios/load.ipynb``.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dslib.scenarios.serving.engine import Engine, Event, Life, Request


class Answer:
    """The events of some requests, (number of the request, event), as they come. Closing it cancels what goes on."""

    def __init__(self, runner: "Runner"):
        self.runner, self.loop = runner, asyncio.get_running_loop()
        self.open: dict[Hashable, int] = {}  # id of a request whose end was not read yet -> its number
        self.inbox: asyncio.Queue[Event] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self.open:
            event = await self.inbox.get()
            yield (self.open.pop if event.finish else self.open.get)(event.id), event

    def close(self) -> None:
        for id in self.open:
            self.runner.call(self.runner.engine.cancel, id)


class Runner:
    """See the top of this file. ``meters`` counts."""

    def __init__(self, engine: Engine):
        self.engine, self.meters = engine, Meters(engine)
        self._answers: dict[Hashable, Answer] = {}
        self._todo: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After the step that runs; what has not ended then is lost."""
        self._todo.put(None)
        self._thread.join()

    def call(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """Let the engine's thread do this between two steps."""
        future: Future = Future()
        self._todo.put((future, work, arguments))
        return future

    def add(self, requests: Sequence[Request], answer: Answer) -> None:
        """All of them or none, for :meth:`call`. Errors as ``engine.add``."""
        try:
            for number, request in enumerate(requests):
                id = self.engine.add(request)
                answer.open[id], self._answers[id] = number, answer
        except Exception:
            answer.close()
            raise
        for request in requests:
            self.meters.read.inc(len(request.prompt))

    def _run(self) -> None:
        while True:
            while not self.engine.busy or not self._todo.empty():
                if (task := self._todo.get()) is None:
                    return
                future, work, arguments = task
                try:
                    future.set_result(work(*arguments))
                except Exception as error:
                    future.set_exception(error)
            try:
                for event in self.engine.step():
                    self._tell(event)
            except Exception as error:  # the engine ends requests whose pass fails; this is a fault of its own
                logging.exception("a step failed; its requests are given up")
                for id in list(self._answers):
                    self.engine.cancel(id)
                    self._tell(Event(id, None, "error", f"{type(error).__name__}: {error}"))
            self.engine.batch.clear()  # it would grow for ever

    def _tell(self, event: Event) -> None:
        if (answer := self._answers.get(event.id)) is None:  # of a step that failed, and told already
            return
        self.meters.saw(event, self.engine.lives[event.id])
        if event.finish:
            del self._answers[event.id], self.engine.lives[event.id]
        answer.loop.call_soon_threadsafe(answer.inbox.put_nowait, event)


class Meters:
    """Counts in the format of Prometheus. Times are seconds on the engine's clock, from a request's arrival on."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        waits = [0.005 * 2**n for n in range(14)]  # 5 ms to 41 s

        def histogram(name: str, said: str) -> Histogram:
            return Histogram(f"dslib_{name}_seconds", said, registry=self.registry, buckets=waits)

        def counter(name: str, said: str, *labels: str) -> Counter:
            return Counter(f"dslib_{name}", said, labels, registry=self.registry)

        self.first = histogram("time_to_first_token", "Arrival to first token.")
        self.gap = histogram("inter_token_latency", "One token to the next.")
        self.all = histogram("request", "Arrival to last token.")
        self.read, self.written = counter("prompt_tokens", "Tokens read."), counter("generation_tokens", "Written.")
        self.ended = counter("requests", "Requests that ended, by how.", "finish")
        scheduler, pool = engine.scheduler, engine.scheduler.pool
        for name, said, value in (
            ("requests_running", "In the batch.", lambda: len(scheduler.running)),
            ("requests_waiting", "In the queue.", lambda: len(scheduler.waiting)),
            ("cache_usage_ratio", "Blocks that somebody holds.", lambda: 1 - pool.free / pool.num_blocks),
            ("preemptions", "Texts that lost their blocks, so far.", lambda: scheduler.preempted),
            ("shared_tokens", "Tokens of prompts found in the cache, so far.", lambda: scheduler.shared_tokens),
        ):
            Gauge(f"dslib_{name}", said, registry=self.registry).set_function(value)

    def saw(self, event: Event, life: Life) -> None:
        """A token, an end, or both; ``life`` knows of it already."""
        if event.token is not None:
            self.written.inc()
            if len(life.tokens) == 1:
                self.first.observe(life.first_token)
            else:
                self.gap.observe(life.tokens[-1] - life.tokens[-2])
        if event.finish:
            self.ended.labels(event.finish).inc()
            if life.tokens:
                self.all.observe(life.tokens[-1] - life.arrived)
