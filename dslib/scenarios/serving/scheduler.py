"""The scheduler: who takes part in the next step, and with how many tokens. It knows no model and no tensor.

Every text has ``tokens``, its prompt and what was written, and ``done``, how many of them are in the cache. What is
left is its work: one token for a text that is being written, more for one that is being read. One rule for both, also
for a text that lost its blocks and begins again with ``done`` 0.

In a step each text that writes gets its one token. Reading gets what is left of ``chunk`` tokens, in order of arrival,
so that a long prompt holds nobody up for longer than a chunk. If blocks run out, the youngest text gives up its own and
waits at the front of the queue: the oldest always goes on, so the engine never stands still.

Book: ``chapters/scenarios/realtime.ipynb``. Sources: Orca (OSDI 2022) for choosing anew in every step, Sarathi-Serve
(arXiv 2403.02310) for chunks, vLLM (arXiv 2309.06180, section 4.5) for preemption by recomputing.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from dslib.check import whole
from dslib.scenarios.serving.blocks import BlockPool, chain


@dataclass(eq=False)
class Text:
    """A request on its way: ``tokens`` of prompt and answer, ``done`` of them cached, in the blocks of ``table``."""

    id: Hashable
    tokens: list[int]
    prompt_tokens: int
    salt: object = None
    done: int = 0
    table: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of its full blocks; tokens are only ever appended
    published: int = 0  # full blocks that others may find
    request: Any = None  # the engine's

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


class Scheduler:
    """First come, first served, in chunks; see the top of this file.

    Attributes:
        waiting, running: texts, in order of arrival. preempted: how often a text lost its blocks.
        shared_tokens: tokens of prompts that were found in the cache.
    """

    def __init__(self, pool: BlockPool, max_batch: int = 8, chunk: int = 256):
        whole(1, max_batch=max_batch, chunk=chunk)
        self.pool, self.max_batch, self.chunk = pool, max_batch, chunk
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []
        self.preempted = self.shared_tokens = 0

    def plan(self) -> list[tuple[Text, int]]:
        """(text, how many of its next tokens) of one step. Blocks for them are in the texts' tables."""
        work, budget = [], self.chunk
        for text in list(self.running):
            count = 1 if text.left == 1 else min(text.left, budget)
            if text in self.running and count and self._make_room(text, count):
                work.append((text, count))
                budget -= count if text.left > 1 else 0
        while self.waiting and budget and len(self.running) < self.max_batch and self._admit(self.waiting[0]):
            text = self.waiting.popleft()
            self.running.append(text)
            count = min(text.left, budget)
            self._extend(text, count)
            work.append((text, count))
            budget -= count
        return work

    def advance(self, text: Text, count: int) -> None:
        """``count`` more of its tokens are in the cache; blocks that are full now may be shared."""
        text.done += count
        full = text.done // self.pool.size
        if full > text.published:
            self._hash(text)
            for number in range(text.published, full):
                self.pool.publish(text.table[number], text.hashes[number])
            text.published = full

    def drop(self, text: Text) -> None:
        """It has ended, failed or been cancelled."""
        if text in self.running:
            self.running.remove(text)
            self._release(text)
        else:
            self.waiting.remove(text)

    def _hash(self, text: Text) -> None:
        text.hashes = chain(text.tokens, self.pool.size, text.salt, text.hashes)

    def _needed(self, text: Text, count: int) -> int:
        return -(-(text.done + count) // self.pool.size) - len(text.table)

    def _extend(self, text: Text, count: int) -> None:
        text.table += [self.pool.take() for _ in range(self._needed(text, count))]

    def _make_room(self, text: Text, count: int) -> bool:
        """Blocks for ``count`` more tokens, at the cost of the youngest if need be; False if that is this text."""
        while self.pool.free < self._needed(text, count):
            youngest = self.running.pop()
            self._release(youngest)
            self.waiting.appendleft(youngest)
            self.preempted += 1
            if youngest is text:
                return False
        self._extend(text, count)
        return True

    def _admit(self, text: Text) -> bool:
        """Share what is known of its beginning, if the rest fits as well. One token at least is left to compute: the
        next one comes from its logits."""
        size = self.pool.size
        self._hash(text)
        for chained in text.hashes[: (len(text.tokens) - 1) // size]:
            block = self.pool.share(chained)
            if block is None:
                break
            text.table.append(block)
        text.published = len(text.table)
        text.done = text.published * size
        if self.pool.free < self._needed(text, text.left):
            self._release(text)
            return False
        self.shared_tokens += text.done
        return True

    def _release(self, text: Text) -> None:
        self.pool.give_back(text.table)
        text.table, text.done, text.published = [], 0, 0
