"""Exercises of ``chapters/scenarios/realtime.ipynb``."""

from collections.abc import Callable, Sequence

from measured.exercises import exercise, named
from measured.exercises._serving import KINDS, Engine

P, Q, R = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]
PAIRS = [[*P, *Q, 20], [*R, *Q, 21], [*P, *Q], [*P, 22, 23], [*R, *Q, 24], [*P, *Q], [*P, 22, 23, 25], [*R, *Q]]
RELATIVES = [*PAIRS, [*P, *Q, *R], [*R, *Q, *R, 26]]
STRANGERS = [[30 * n + at for at in range(9)] for n in range(1, 9)]
ROOMY, CROWDED = 40, 6


def _has_error(serve, prompts=RELATIVES, memories=(ROOMY, CROWDED), texts=True, free=True) -> int:
    """The reference and, by its options, the usual ways to test too little."""
    asked = [(2 * n, prompt, 7) for n, prompt in enumerate(prompts)]
    wanted = [serve([(0, *one)], ROOMY)[0][0] for _, *one in asked]
    found = [(*serve(asked, blocks), blocks) for blocks in memories]
    return int(any((texts and made != wanted) or (free and left != blocks) for made, left, blocks in found))


@exercise(
    "realtime/has-error",
    cases=named("serve", *([Engine(number)] for number in range(len(KINDS)))),
    mistakes="""
        _has_error(serve, prompts=STRANGERS, memories=(ROOMY,))
            Your requests find nothing: prompts that have no prefix in common, in a memory with room for all. Let
            prompts begin alike, and let blocks run out.
        _has_error(serve, prompts=STRANGERS)
            Blocks run out, but no two prompts begin alike: then nothing is shared, and what goes wrong in sharing is
            not seen.
        _has_error(serve, memories=(ROOMY,))
            Prompts share prefixes, but there is room for all: no text ever loses its blocks, and no block is used
            again. Let it run out.
        _has_error(serve, prompts=PAIRS)
            Your prompts have two blocks in common at most. A hash of a block's tokens and its parent's *tokens* passes
            then: let the same two blocks stand behind another first one.
        _has_error(serve, free=False)
            You compare texts only. A block that is not given back changes no text until nothing fits any more: count
            the free ones at the end.
        _has_error(serve, texts=False)
            You count blocks only. Compare the texts as well, each with what the engine writes when it is alone.
        1 - _has_error(serve)
            The other way round: 1 for an engine that has an error.
    """,
    hint="Send prompts that begin alike, some wholly known, some with the same tokens behind another prefix; once "
    "with room for all and once with blocks for two. Compare each text with that of a call of its own, and the free "
    "blocks with all.",
)
def has_error(serve: Callable[[Sequence[tuple[int, list[int], int]], int], tuple[list[list[int]], int]]) -> int:
    """1 if the engine has an error, 0 if it serves every request as if it were alone, and loses no block.

    Args:
        serve: takes requests (step of arrival, prompt, tokens of the answer) and how many blocks of four tokens there
            are; gives the answers, and how many blocks are free afterwards. Every call begins anew.
    """
    return _has_error(serve)


FINE, LEAKED, UNSAFE = 0, 1, 2


def _audit(
    holders, tables, free,
    leaks: Callable = lambda counted, held, is_free: not is_free and (counted > held or not held),
    risks: Callable = lambda counted, held, is_free: held > 0 and (is_free or counted < held),
) -> list[int]:  # fmt: skip
    found = []
    for block, counted in enumerate(holders):
        state = counted, sum(block in table for table in tables), block in free
        found.append(UNSAFE if risks(*state) else LEAKED if leaks(*state) else FINE)
    return found


@exercise(
    "realtime/leaked",
    cases=named(
        "holders tables free",
        ([1, 2, 0, 0, 0], [[1], [4, 0, 1]], [2, 3, 0]),
        ([0, 0, 1, 1, 1, 0, 2, 0], [[4], [3], [4], [6, 1]], [5, 7, 0]),
        ([1, 0, 1, 1, 3, 0], [[4, 2], [4]], [5]),
        ([2, 0, 3, 1, 1, 2, 0, 0], [[2, 4], [0, 3, 5], [5], [0, 4, 2]], [6, 7, 1]),
        ([1, 1, 1, 0, 2, 0, 1], [[1], [3, 6, 4]], [5]),
    ),
    mistakes="""
        _audit(holders, tables, free, leaks=lambda counted, held, is_free: counted > 0 and not held)
            A block may leak although some text has it: counted twice, held once, it never comes to 0. And one may be
            lost with a count of 0, if it is not in the free list.
        _audit(holders, tables, free, leaks=lambda counted, held, is_free: counted > held)
            One kind of leak is missing: a block that nobody holds, with a count of 0, and that is not in the free list.
        _audit(holders, tables, free, risks=lambda counted, held, is_free: held > 0 and is_free)
            One kind of unsafe is missing: two texts have the block, and the count says one. When the first lets go, it
            is free, and the other still reads it.
        _audit(holders, tables, free, risks=lambda counted, held, is_free: counted < held)
            One kind of unsafe is missing: a block with a right count that is in the free list all the same.
        _audit(holders, tables, free, risks=lambda counted, held, is_free: held > 1)
            A block in several tables is not at fault: sharing is what blocks are for. It is unsafe if its count is
            below that.
        [(0, 2, 1)[state] for state in _audit(holders, tables, free)]
            1 is leaked, 2 is unsafe.
        [min(state, 1) for state in _audit(holders, tables, free)]
            Leaked and unsafe are different: the first wastes memory, the second destroys a text.
    """,
    hint="For every block, count in how many tables it is. Then compare three things: that number, the count of "
    "holders, and whether it is in the free list.",
)
def audit(holders: Sequence[int], tables: Sequence[Sequence[int]], free: Sequence[int]) -> list[int]:
    """Of each block: 0 if all is well, 1 if it is leaked, 2 if it is unsafe.

    Args:
        holders: of each block, how many texts have it, as the pool counts. tables: of all living texts. free: blocks.
    """
    return _audit(holders, tables, free)


def _evicted(parents, used, need, key: Callable = lambda age, deep, block: (age, -deep)) -> list[int]:
    deep: dict[int | None, int] = {None: -1}

    def depth(block: int | None) -> int:
        if block not in deep:
            deep[block] = depth(parents[block]) + 1
        return deep[block]

    return sorted(range(len(used)), key=lambda block: key(used[block], depth(block), block))[:need]


@exercise(
    "realtime/evict",
    cases=named(
        "parents used need",
        ([None, 0, 1, 2], [5, 5, 5, 5], 2),
        ([3, 0, None, 2, 3, 4], [4, 4, 9, 9, 9, 9], 5),
        ([None, 0, 0, 2, None, 4, 1], [8, 3, 8, 8, 5, 5, 3], 6),
        ([2, 0, None, 5, 3, None, 2], [3, 3, 7, 6, 6, 6, 7], 3),
        ([None, None, 1, 2, 0, 4, 5, 2], [4, 6, 6, 6, 4, 4, 4, 2], 7),
    ),
    mistakes="""
        _evicted(parents, used, need, lambda age, deep, block: age)
            Of the blocks given back in one step, you take those with the lowest numbers. Which of them can still be
            found when another one is gone?
        _evicted(parents, used, need, lambda age, deep, block: (age, deep))
            You take the front of a chain first: what follows it stays in memory, and nobody finds it.
        _evicted(parents, used, need, lambda age, deep, block: (age, -block))
            The numbers of the blocks say nothing about their order in a chain: follow `parents`.
        _evicted(parents, used, need, lambda age, deep, block: (-deep, age))
            The longest unused comes first, however deep it stands; depth decides only within one step.
        _evicted(parents, used, need, lambda age, deep, block: (-age, -deep))
            You take what was used last.
        sorted(_evicted(parents, used, need))
            The right blocks, but the order is asked for as well.
        _evicted(parents, used, len(used))
            Only `need` blocks are overwritten.
    """,
    hint="For every block, count how many stand before it in its chain. Sort by the step of last use, and within a "
    "step by that count, the largest first.",
)
def evict(parents: Sequence[int | None], used: Sequence[int], need: int) -> list[int]:
    """The blocks that are overwritten, in order, when all are free and all can be found.

    Args:
        parents: of each block the one before it in its chain, None at the front. used: the step in which the last text
            that held it ended; never earlier than that of a block behind it. need: how many blocks are taken.
    """
    return _evicted(parents, used, need)


def _gaps(prompts, chunk, fixed, per_token, at_once=False, each=False) -> list[float]:
    """Seconds of every step until all prompts are read; ``each``: the chunk is each prompt's and not the step's."""
    clock, coming, unread, found = 0.0, list(prompts), [], []
    while coming or any(unread):
        while coming and (at_once or coming[0][0] <= clock):
            unread.append(coming.pop(0)[1])
        budget, read = chunk, 0
        for number, tokens in enumerate(unread):
            count = min(tokens, chunk if each else budget)
            unread[number] -= count
            budget -= count
            read += count
        found.append(fixed + per_token * read)
        clock += found[-1]
    return found


def _largest(
    prompts, chunks, fixed, per_token, limit, allowed, never, mean=False, stalls=False, busy=False, choose=max, **run
):
    """The reference and, by its options, the usual ways to get it wrong."""

    def fits(gaps: list[float]) -> bool:
        long, counted = sum(gap > limit for gap in gaps), sum(gap > fixed for gap in gaps) if busy else len(gaps)
        short = sum(gaps) <= limit * len(gaps) if mean else long <= allowed * counted
        return short and (stalls or max(gaps) <= never)

    return choose((c for c in chunks if fits(_gaps(prompts, c, fixed, per_token, **run))), default=None)


@exercise(
    "realtime/chunk",
    cases=named(
        "prompts chunks fixed per_token limit allowed never",
        ([(0.9237, 700), (0.9249, 300), (0.9249, 90)], [64, 1024, 128, 256], 0.05, 0.0004, 0.09013, 0.2, 0.1352),
        ([(0.0011, 40), (1.101, 700), (1.101, 90)], [128, 256, 32, 512, 64], 0.05, 0.0004, 0.09013, 0.0, 0.36052),
        (
            [(0.0, 40), (0.0008, 40), (1.0243, 40), (1.3312, 90)],
            [1024, 32, 64, 512, 128],
            0.05,
            0.0002,
            0.05813,
            0.2,
            0.08719,
        ),
        ([(0.0, 700), (0.2475, 90)], [32, 256, 64, 512], 0.02, 0.001, 0.29013, 0.2, 8.7039),
        ([(0.0, 90), (0.0009, 40), (0.002, 300)], [32, 512, 256, 64], 0.03, 0.001, 0.07013, 0.0, 0.07013),
        ([(0.0, 40), (0.2403, 90)], [64, 256, 1024, 512], 0.03, 0.0004, 0.08613, 0.0, 2.5839),
        ([(0.0009, 90), (0.3375, 40)], [1024, 256, 128, 512], 0.05, 0.0002, 0.07013, 0.2, 0.28052),
    ),
    mistakes="""
        max((c for c in chunks if fixed + per_token * c <= min(limit, never)), default=None)
            That is the largest chunk whose *every* full step keeps the limit. Some gaps may be longer, and a prompt
            shorter than the chunk makes a shorter step: play the trace.
        _largest(prompts, chunks, fixed, per_token, limit, allowed, never, choose=min)
            The smallest that fits. The largest is asked for: it reads a prompt in the fewest steps.
        _largest(prompts, chunks, fixed, per_token, limit, allowed, never, mean=True)
            The mean gap is within the limit. Asked is how many gaps are longer than it.
        _largest(prompts, chunks, fixed, per_token, limit, allowed, never, stalls=True)
            No gap may be longer than `never`. A share alone does not see one long stall among many short gaps.
        _largest(prompts, chunks, fixed, per_token, limit, 0, never)
            A share of the gaps may be longer than the limit.
        _largest(prompts, chunks, fixed, per_token, limit, allowed, never, at_once=True)
            You read prompts before they have arrived.
        _largest(prompts, chunks, fixed, per_token, limit, allowed, never, each=True)
            The chunk is that of a step, for all prompts together, and not of each prompt.
        _largest(prompts, chunks, fixed, per_token, limit, allowed, never, busy=True)
            Steps that read nothing are gaps as well.
    """,
    hint="Play the trace for each chunk: a clock, what has arrived and is not read, and a list of gaps. Then count.",
)
def largest_chunk(
    prompts: Sequence[tuple[float, int]], chunks: Sequence[int], fixed: float, per_token: float, limit: float,
    allowed: float, never: float,
) -> int | None:  # fmt: skip
    """The largest chunk with which at most a share ``allowed`` of the gaps exceeds ``limit``, and none ``never``.

    Args:
        prompts: (second of arrival, tokens), in order. chunks: to choose from.
        fixed, per_token: seconds of a step, and of each token that it reads.
    """
    return _largest(prompts, chunks, fixed, per_token, limit, allowed, never)
