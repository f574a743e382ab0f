"""Small engines for the exercise on tests, right ones and wrong ones, with arithmetic in place of a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

SLOTS, SIZE, CHUNK, IDLE, STEPS = 8, 4, 4, 5, 1000
KINDS = ("right", "shares nothing", "parent", "whole", "stale", "freed", "not read again", "leaks", "grandparent")


@dataclass
class _Text:
    tokens: list[int]
    end: int
    done: int = 0
    table: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


class _Serving:
    """The page's engine with arithmetic in place of a model: a token's number mixes all that its text has in the cache,
    and gives the next token. ``kind`` says what is wrong with it, if anything."""

    def __init__(self, kind: str, blocks: int):
        self.kind, self.free, self.holders = kind, list(range(blocks)), [0] * blocks
        self.kept: dict[int, int] = {}  # of each place the number of its token
        self.block_of: dict[tuple, int] = {}
        self.waiting: list[_Text] = []
        self.running: list[_Text] = []

    def names(self, tokens: list[int]) -> list[tuple]:
        ends = range(SIZE, len(tokens) + 1, SIZE)
        seen = {"parent": SIZE, "grandparent": 2 * SIZE}.get(self.kind, len(tokens))  # by a block's name
        return [tuple(tokens[max(0, end - seen) : end]) for end in ends]

    def missing(self, text: _Text, count: int) -> int:
        return -(-(text.done + count) // SIZE) - len(text.table)

    def grow(self, text: _Text, count: int) -> None:
        for _ in range(self.missing(text, count)):
            block = self.free.pop(0)
            if self.kind != "stale":
                self.block_of = {name: other for name, other in self.block_of.items() if other != block}
            self.holders[block] = 1
            text.table.append(block)

    def release(self, text: _Text) -> None:
        lost = self.kind == "leaks" and len(text.tokens) == text.end and text.done % SIZE == 0
        for block in reversed(text.table[:-1] if lost else text.table):
            self.holders[block] = 0 if self.kind == "freed" else self.holders[block] - 1
            if self.holders[block] <= 0 and block not in self.free:
                self.free.append(block)
        text.table, text.done = [], text.done if self.kind == "not read again" else 0

    def admit(self, text: _Text) -> bool:
        for name in self.names(text.tokens if self.kind == "whole" else text.tokens[:-1]):
            block = self.block_of.get(name)
            if block is None or self.kind == "shares nothing":
                break
            self.free = [other for other in self.free if other != block]
            self.holders[block] += 1
            text.table.append(block)
        text.done = max(text.done, len(text.table) * SIZE)
        fits = self.missing(text, text.left) <= len(self.free)
        if not fits:
            self.release(text)
        return fits

    def room(self, text: _Text, count: int) -> bool:
        while self.missing(text, count) > len(self.free):
            youngest = self.running.pop()
            self.release(youngest)
            self.waiting.insert(0, youngest)
            if youngest is text:
                return False
        self.grow(text, count)
        return True

    def step(self) -> int:
        """Returns how many tokens were fed."""
        work, budget = [], CHUNK
        for text in list(self.running):
            count = 1 if text.left == 1 else min(text.left, budget)
            if text in self.running and count and self.room(text, count):
                work.append((text, count))
                budget -= count * (text.left > 1)
        while self.waiting and budget and len(self.running) < SLOTS and self.admit(self.waiting[0]):
            self.running.append(self.waiting.pop(0))
            count = min(self.running[-1].left, budget)
            self.grow(self.running[-1], count)
            work.append((self.running[-1], count))
            budget -= count
        for text, count in work:
            self.feed(text, count)
        return sum(count for _, count in work)

    def feed(self, text: _Text, count: int) -> None:
        for token in text.tokens[text.done : text.done + count]:
            places = [text.table[at // SIZE] * SIZE + at % SIZE for at in range(text.done + 1)]
            number = 1
            for seen in [self.kept.get(place, 0) for place in places[:-1]] + [token]:
                number = (31 * number + seen) % 1_000_003
            self.kept[places[-1]] = number
            text.done += 1
        if count and not text.left:
            text.tokens.append(number % 97)
        for block, name in zip(text.table, self.names(text.tokens[: text.done]), strict=False):
            if block not in self.block_of.values() or self.kind == "stale":
                self.block_of.setdefault(name, block)
        if len(text.tokens) == text.end:
            self.running.remove(text)
            self.release(text)


@dataclass(frozen=True)
class Engine:
    """``serve`` of the exercise: the engine of this number."""

    number: int

    def __call__(self, requests: Sequence[tuple[int, list[int], int]], blocks: int) -> tuple[list[list[int]], int]:
        serving, texts = _Serving(KINDS[self.number], blocks), []
        for _, prompt, count in requests:
            if not prompt or count < 1 or len(prompt) + count - 1 > blocks * SIZE:
                raise ValueError(f"a request of {len(prompt)} + {count} tokens: expected 1 + 1 to {blocks * SIZE} + 1")
            texts.append(_Text(list(prompt), len(prompt) + count))
        last, idle = max((at for at, *_ in requests), default=0), 0
        for step in range(last + STEPS):
            serving.waiting += [text for text, (at, *_) in zip(texts, requests, strict=True) if at == step]
            idle = 0 if serving.step() else idle + 1
            if step >= last and idle > IDLE:
                break  # all is done, or it stands still
        made = [text.tokens[len(prompt) :] for text, (_, prompt, _) in zip(texts, requests, strict=True)]
        return made, len(serving.free)
