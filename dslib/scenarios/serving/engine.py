"""The engine: requests come and go at any step, and each gets the text that it would get alone.

    engine = Engine(model, num_blocks=256)
    engine.add(Request([1, 2, 3], max_new_tokens=20))
    while engine.busy:
        for event in engine.step():                     # one pass for all that write, one for each piece that is read
            print(event.id, event.token, event.finish)

A step asks the :mod:`~dslib.scenarios.serving.scheduler` who takes part, runs the model on their next tokens, and
chooses a token for each text whose tokens are all in the cache. Sampling, seed and stop strings are each request's own,
and a request that fails does so alone.

Book: ``chapters/scenarios/realtime.ipynb``. Source: Orca (OSDI 2022), section 3.
"""

import itertools
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dslib.architecture.decoder import Decoder, inference
from dslib.architecture.generation import Sampling
from dslib.check import whole
from dslib.data.prompts import checked_prompts, completes, end_tokens
from dslib.scenarios.serving.blocks import BlockPool, PagedCache
from dslib.scenarios.serving.scheduler import Scheduler, Text


class QueueFull(Exception):
    """The engine takes no more requests for now."""


@dataclass(frozen=True)
class Request:
    """What somebody wants: arguments as those of :func:`dslib.architecture.generation.generate`, for one prompt.

    ``adapter`` is a row of the engine's ``adapters``, None for the model itself.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    eos_token_id: int | Collection[int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: Collection[str] = ()
    adapter: int | None = None


@dataclass(frozen=True)
class Event:
    """A token of a request; ``finish`` with its last one ("eos", "stop", "length"), or "cancelled" or "error"."""

    id: Hashable
    token: int | None
    finish: str | None = None
    error: str | None = None


@dataclass
class Life:
    """When things happened to a request, on the engine's clock: it ``arrived``, and each of its ``tokens``."""

    arrived: float
    tokens: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Seconds to the first token, waiting included."""
        return self.tokens[0] - self.arrived

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next: inter-token latencies."""
        return [after - before for before, after in itertools.pairwise(self.tokens)]


class Engine:
    """Serves one model; see the top of this file.

    Args:
        num_blocks, block_size: of the cache. max_batch: texts that take part in one step at most. chunk: tokens of
            prompts that are read in one step. max_waiting: requests that may wait; None for any number.
        tokenizer: with a ``decode``, for stop strings. adapters: something whose ``rows`` says which adapter each row
            of the next pass has (:class:`dslib.migration.multi_lora.PerRow`). clock: seconds.

    Attributes:
        lives: of every request, by id. steps: taken so far. batch: how many texts took part in each.
    """

    def __init__(
        self, model: Decoder, num_blocks: int = 256, block_size: int = 16, *, max_batch: int = 8, chunk: int = 256,
        max_waiting: int | None = None, tokenizer: Any = None, adapters: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        weight = model.embed_tokens.weight
        self.model, self.tokenizer, self.adapters, self.clock = model, tokenizer, adapters, clock
        self.scheduler = Scheduler(BlockPool(num_blocks, block_size), max_batch, chunk)
        self.cache = PagedCache(model.config, num_blocks, block_size, dtype=weight.dtype, device=weight.device)
        if max_waiting is not None:
            whole(1, max_waiting=max_waiting)
        self.max_waiting, self.lives, self.batch = max_waiting, {}, []
        self._texts: dict[Hashable, Text] = {}
        self._numbers, self._events = itertools.count(), []

    @property
    def busy(self) -> bool:
        return bool(self._texts or self._events)

    @property
    def steps(self) -> int:
        return len(self.batch)

    def add(self, request: Request, id: Hashable = None) -> Hashable:
        """Take a request, and give its id.

        Raises:
            QueueFull: ``max_waiting`` requests wait already.
            ValueError: as ``generate`` does; a request that would not fit into the blocks even alone; an id in use.
        """
        if self.max_waiting is not None and len(self.scheduler.waiting) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests wait already")
        whole(1, max_new_tokens=request.max_new_tokens)
        config, pool = self.model.config, self.scheduler.pool
        [tokens] = checked_prompts(config, [request.prompt], request.max_new_tokens, 0)
        most, room = len(tokens) + request.max_new_tokens - 1, pool.num_blocks * pool.size  # the last one is not fed
        if most > room:
            raise ValueError(
                f"prompt: it and its answer take {most} tokens, more than the {room} of all blocks together"
            )
        if request.stop and self.tokenizer is None:
            raise ValueError(f"stop: got {request.stop!r}, but the engine was made without a tokenizer")
        if request.adapter is not None and not 0 <= request.adapter < getattr(self.adapters, "count", 0):
            raise ValueError(f"adapter: got {request.adapter}, the engine has {getattr(self.adapters, 'count', 0)}")
        ends = end_tokens(request.eos_token_id, config.vocab_size)
        id = next(self._numbers) if id is None else id
        if id in self._texts:
            raise ValueError(f"id: {id!r} is in use by a request that has not ended")
        generator = torch.Generator(self.model.embed_tokens.weight.device).manual_seed(request.seed)
        text = Text(id, tokens, len(tokens), salt=request.adapter, request=(request, ends, generator))
        self._texts[id], self.lives[id] = text, Life(self.clock())
        self.scheduler.waiting.append(text)
        return id

    def cancel(self, id: Hashable) -> bool:
        """Stop a request and give its blocks back; False if there is none of this id, or no longer."""
        if id not in self._texts:
            return False
        self._end(id, "cancelled")
        return True

    def step(self) -> list[Event]:
        """One step; what it brought, in order. Nothing to do is no step."""
        work = self.scheduler.plan()
        writes = [text for text, _ in work if text.left == 1]
        passes = [(writes, 1)] if writes else []
        passes += [([text], count) for text, count in work if text.left > 1]
        for texts, count in passes:
            self._pass(texts, count)
        if work:
            self.batch.append(len(work))
        events, self._events = self._events, []
        return events

    def run(self) -> dict[Hashable, list[int]]:
        """Step until nobody is left; the new tokens of each request. An error of one is raised: RuntimeError."""
        found: dict[Hashable, list[int]] = {id: [] for id in self._texts}
        while self.busy:
            for event in self.step():
                if event.finish == "error":
                    raise RuntimeError(f"request {event.id!r}: {event.error}")
                if event.token is not None:
                    found[event.id].append(event.token)
        return found

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of one request as they come; whoever stops early cancels it. Requests that were added before go on
        beside it, and the next :meth:`step` gives their events.
        """
        id, others, finish = self.add(request), [], None
        try:
            while finish is None:
                events = self.step()
                others += [event for event in events if event.id != id]
                for event in (event for event in events if event.id == id):
                    finish = event.finish
                    if finish == "error":
                        raise RuntimeError(f"request {id!r}: {event.error}")
                    yield event.token
        finally:
            if self.cancel(id):
                self._events.pop()
            self._events = others + self._events

    def _pass(self, texts: list[Text], count: int) -> None:
        """The next ``count`` tokens of these texts through the model, and a token for each that is ready for one."""
        device = self.model.embed_tokens.weight.device
        ids = torch.tensor([text.tokens[text.done : text.done + count] for text in texts], device=device)
        first = torch.tensor([[text.done] for text in texts], device=device)
        positions = first + torch.arange(count, device=device)  # (B, T)
        last = torch.full((len(texts), 1), count - 1, device=device)
        try:
            self.cache.show([text.table for text in texts])
            if self.adapters is not None:
                self.adapters.rows = [text.salt for text in texts]
            with inference(self.model):
                logits = self.model(ids, self.cache, positions, last)[:, 0]  # (B, V)
        except Exception as error:  # whatever a model may raise: those of this pass end, others go on
            for text in texts:
                self._end(text.id, "error", f"{type(error).__name__}: {error}")
            return
        finally:
            if self.adapters is not None:
                self.adapters.rows = None
        for row, text in enumerate(texts):
            self.scheduler.advance(text, count)
            if text.left == 0:
                self._choose(text, logits[row : row + 1])

    def _choose(self, text: Text, logits: torch.Tensor) -> None:
        request, ends, generator = text.request
        written = None
        if request.sampling.repetition_penalty != 1:
            written = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            written[0, text.tokens] = True
        try:
            with torch.inference_mode():
                token = int(request.sampling.choose(logits, [generator], written))
        except ValueError as error:  # NaN logits: of this text alone
            self._end(text.id, "error", str(error))
            return
        text.tokens.append(token)
        self.lives[text.id].tokens.append(self.clock())
        stopped = request.stop and completes(tuple(request.stop), text.tokens, self.tokenizer)
        long = len(text.tokens) - text.prompt_tokens == request.max_new_tokens
        finish = "eos" if token in ends else "stop" if stopped else "length" if long else None
        if finish is None:
            self._events.append(Event(text.id, token))
        else:
            self._end(text.id, finish, token=token)

    def _end(self, id: Hashable, finish: str, error: str | None = None, token: int | None = None) -> None:
        self.scheduler.drop(self._texts.pop(id))
        self._events.append(Event(id, token, finish, error))
