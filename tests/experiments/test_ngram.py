"""Kneser-Ney by counting arrays against the same by dictionaries, and what must hold of any probability."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from dslib.data.text import moby_dick
from measured.experiments import ngram

END = 256


def as_bytes(*texts):
    return [np.array([*text.encode(), END]) for text in texts]


NOVEL = moby_dick()
TRAIN = as_bytes(*(NOVEL[start : start + 700] for start in range(0, 14_000, 700)))
HELD_OUT = as_bytes(NOVEL[20_000:20_400], "", "Queequeg — naïve", NOVEL[:40])


def by_dictionaries(documents, order):
    """The probability of a token after a context, written as in Chen and Goodman's paper: one dictionary a count."""
    counts = [Counter() for _ in range(order + 1)]
    before = [defaultdict(set) for _ in range(order + 1)]
    for document in documents:
        padded = (END, *document.tolist())
        for end in range(1, len(padded) + 1):
            for n in range(1, min(order, end) + 1):
                gram = padded[end - n : end]
                if gram != (END,) or end > 1:  # the mark at the start is never predicted
                    counts[n][gram] += 1
                if end > n:
                    before[n][gram].add(padded[end - n - 1])
    tables = {}
    for n in range(1, order + 1):
        spread = {gram: len(before[n][gram]) or count for gram, count in counts[n].items()}
        for kind, table in (("raw", counts[n]), ("spread", spread)):
            n1, n2, n3, n4 = (sum(count == c for count in table.values()) for c in (1, 2, 3, 4))
            cuts = [0.5, 1, 1.5]  # where there are too few n-grams, as of single bytes, to estimate it from
            if n1 and n2 and n3 and n4:
                y = n1 / (n1 + 2 * n2)
                estimate = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
                cuts = estimate if all(0 <= cut <= i for i, cut in enumerate(estimate, 1)) else cuts
            followers = defaultdict(list)
            for gram, count in table.items():
                followers[gram[:-1]].append(count)
            tables[kind, n] = table, cuts, followers

    def probability(token, context, longest=True):
        table, cuts, followers = tables["raw" if longest else "spread", len(context) + 1]
        lower = probability(token, context[1:], False) if context else 1 / 257
        if not (found := followers.get(context)):
            return lower
        count, left = table.get((*context, token), 0), sum(cuts[min(c, 3) - 1] for c in found)
        return (count - (cuts[min(count, 3) - 1] if count else 0) + left * lower) / sum(found)

    return lambda token, context: probability(token, context, len(context) == order - 1)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_same_as_by_dictionaries(order):
    model, plain = ngram.KneserNey(TRAIN, order, 257), by_dictionaries(TRAIN, order)
    wanted = []
    for document in HELD_OUT:
        padded = (END, *document.tolist())
        wanted += [-np.log2(plain(padded[at], padded[max(0, at - order + 1) : at])) for at in range(1, len(padded))]
    np.testing.assert_allclose(model.bits(HELD_OUT)[-1], wanted, rtol=1e-9)


def test_probabilities_of_the_whole_vocabulary_sum_to_one():
    model = ngram.KneserNey(TRAIN, 4, 257)
    for context in ("", "t", "the wh", "qzx", NOVEL[:9]):
        tokens = [np.array([*context.encode(), token]) for token in range(256)]
        tokens.append(np.array([*context.encode(), END]))
        tokens = [np.array([*row, END]) for row in tokens]
        bits = model.bits(tokens)[:, len(context.encode()) :: len(context.encode()) + 2]
        np.testing.assert_allclose((2.0**-bits).sum(-1), 1, rtol=1e-9)


def test_shorter_orders_are_those_trained_alone_and_longer_ones_help():
    bits = ngram.KneserNey(TRAIN, 4, 257).bits(HELD_OUT)
    for order in (1, 2, 3):
        np.testing.assert_allclose(bits[order - 1], ngram.KneserNey(TRAIN, order, 257).bits(HELD_OUT)[-1])
    assert (np.diff(bits.mean(-1)) < 0).all()


def test_bits_by_document_and_their_interval():
    bits = ngram.KneserNey(TRAIN, 2, 257).bits(HELD_OUT)
    rows = ngram.by_document(bits, HELD_OUT)
    assert rows.shape == (2, len(HELD_OUT)) and np.allclose(rows.sum(-1), bits.sum(-1))
    assert np.allclose(rows[:, 1], bits[:, len(HELD_OUT[0])])  # the empty text is its end token alone
    value, low, high = ngram.rate(np.array([10.0, 30.0, 20.0]), np.array([10, 20, 10]))
    assert value == 1.5 and 1 <= low < 1.5 < high <= 2


def test_the_recorded_function_at_a_small_size():
    made = ngram.ngram_baselines(order=2, every=150)
    for split in ("validation", "test"):
        row = made[split]
        assert len(row["documents"]) == len(row["bytes"]) == len(row["bits"]["1"]) == len(row["bits"]["2"])
        (one, *_), (two, low, high) = (row["bits_per_byte"][order]["all"] for order in "12")
        assert 1 < low <= two <= high < one < 4
    xz = ngram.xz_rate("test", every=150)
    assert xz["bytes"] < xz["train_bytes"] and 1 < xz["bits_per_byte"] < 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ngram.KneserNey(TRAIN, 0, 257), "order: got 0"),
        (lambda: ngram.KneserNey(TRAIN, 2, 100), "documents: got token 256, expected ids from 0 and below 100"),
        (lambda: ngram.KneserNey([], 2, 257), "documents: got 0"),
        (lambda: ngram.KneserNey([np.array([], int)], 2, 257), "one of them empty"),
        (lambda: ngram.KneserNey(as_bytes("ab"), 5, 257), "order: got 5, expected at most 4"),
        (lambda: ngram.ngram_baselines(every=0), "every: got 0"),
    ],
)
def test_what_cannot_be_counted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
