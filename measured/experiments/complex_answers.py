"""Several answers to a problem that can be checked: sums, by SmolLM2, drawn by the serving engine.

A sum has one right answer and many wrong ones, nobody needs a judge, and a model of 135 million parameters is right now
and then. Each is asked in two ways: for the result at once, or *worked*, with one step after another, which takes
several times the tokens of an answer. So one can ask more often, or let it write more, for the same tokens.

Recorded by ``make record PART=complex``. Book: ``chapters/scenarios/complex.ipynb``.
"""

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from dslib import fast
from dslib.architecture.generation import Sampling
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.check import one_of, whole
from dslib.fast.scoring import Row, log_likelihoods
from dslib.scenarios.realtime import Engine, Request

WAYS = ("at once", "worked")


def written(numbers: Sequence[int], way: str) -> str:
    """A sum and its answer as text: ``3 + 8 + 5 = 16``, or worked: ``3 + 8 + 5: 3 + 8 = 11. 11 + 5 = 16``."""
    if way == "at once":
        return f"{question(numbers, way)} {sum(numbers)}"
    steps = [f"{sum(numbers[:at])} + {number} = {sum(numbers[: at + 1])}" for at, number in enumerate(numbers) if at]
    return f"{question(numbers, way)} {'. '.join(steps)}"


def question(numbers: Sequence[int], way: str) -> str:
    """What stands before the answer: ``3 + 8 + 5 =``, or ``3 + 8 + 5:`` where it is worked."""
    one_of(WAYS, way=way)
    return " + ".join(map(str, numbers)) + (" =" if way == "at once" else ":")


def read(line: str) -> int | None:
    """The result in what a model wrote behind the question: the number that ends the line; None where none does."""
    found = re.search(r"(?:^|=)\s*(\d+)\s*$", line.strip().rstrip("."))
    return int(found.group(1)) if found else None


def problems(count: int, terms: int = 3, digits: int = 1, seed: int = 0) -> list[list[int]]:
    """``count`` different sums of so many numbers of so many digits."""
    whole(1, count=count, digits=digits)
    whole(2, terms=terms)
    dice, found = random.Random(seed), {}
    while len(found) < count:
        found[tuple(dice.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(terms))] = None
    return [list(numbers) for numbers in found]


def prompt(numbers: Sequence[int], way: str, shots: Sequence[Sequence[int]]) -> str:
    """Solved examples, one a line, and the question."""
    return "\n".join([*(written(one, way) for one in shots), question(numbers, way)])


@cache
def _model():
    model, tokenizer = load_smollm2()
    fast.prepare(model)
    return model, tokenizer


def answers(
    way: str = "at once", count: int = 40, n: int = 16, temperature: float = 0.8, terms: int = 3, digits: int = 1,
    shots: int = 4, slots: int = 32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """``n`` drawn answers to each of ``count`` sums, and the greedy one; each with a seed of its own.

    Returns lists, one entry a problem: ``truth``; ``answers``, n numbers (None: could not be read); ``scores``, of each
    answer the mean log-probability of a token, by the model without temperature; ``tokens`` of each; ``greedy`` and
    ``greedy_tokens``.
    """
    whole(1, n=n, shots=shots, slots=slots)
    asked = problems(count + shots, terms, digits, seed)
    asked, shown = asked[shots:], asked[:shots]
    model, tokenizer = _model()
    ids = [tokenizer(prompt(one, way, shown)).input_ids for one in asked]
    limit = 4 + len(tokenizer(written([10**digits - 1] * terms, way)).input_ids)
    engine = Engine(model, num_blocks=2048, max_batch=slots, tokenizer=tokenizer)
    drawn = Sampling(temperature=temperature)
    for number, tokens in enumerate(ids):
        options = {"max_new_tokens": limit, "stop": ("\n",), "eos_token_id": tokenizer.eos_token_id}
        engine.add(Request(tokens, **options), (number, -1))
        for draw in range(n):
            chance = {"sampling": drawn, "seed": (1000 * seed + number) * 1000 + draw}
            engine.add(Request(tokens, **options, **chance), (number, draw))
    texts = engine.run()

    def result(key: tuple[int, int]) -> int | None:
        line, ended, _ = tokenizer.decode(texts[key]).replace(tokenizer.eos_token, "\n").partition("\n")
        return read(line) if ended else None  # cut short: nobody knows where it would have ended

    each = [[(number, draw) for draw in range(n)] for number in range(count)]
    rows = [Row(tokens, [texts[key] for key in keys]) for tokens, keys in zip(ids, each, strict=True)]
    return {
        "truth": [sum(numbers) for numbers in asked],
        "answers": [[result(key) for key in keys] for keys in each],
        "scores": [
            [round(score / len(texts[key]), 4) for score, key in zip(row, keys, strict=True)]
            for row, keys in zip(log_likelihoods(model, rows).tolist(), each, strict=True)
        ],
        "tokens": [[len(texts[key]) for key in keys] for keys in each],
        "greedy": [result((number, -1)) for number in range(count)],
        "greedy_tokens": [len(texts[number, -1]) for number in range(count)],
    }
