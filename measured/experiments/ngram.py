"""What counting reaches on the course's corpus: n-gram models and xz, the lines that a trained model has to beat.

An n-gram model predicts a token from the ``n - 1`` before it by how often each continuation occurred in the training
text. The longer the context, the less often it occurred; so each order hands a share of its probability on to the next
shorter one. Interpolated modified Kneser-Ney (Chen and Goodman 1999) is the best known way to share: it takes a little
off every count, and counts in the shorter orders not how often a token came but after how many different ones.

The context begins at the document's start, which is marked by END_OF_TEXT; that token at its end is predicted as well.
Bits are counted by document, so that a model's can be paired with them. Recorded by ``make record PART=ngrams``.
"""

import lzma
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dslib import check
from dslib.data import corpus

XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


@dataclass(frozen=True)
class Table:
    """What one order knows: of each n-gram its discounted share of its context's count, of each context what is left
    for the shorter order. A context that nothing followed leaves everything."""

    share: np.ndarray
    left: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray, contexts: np.ndarray, number: int) -> "Table":
        """From the count of each n-gram and the number of its context, of which there are ``number``."""
        n = np.bincount(np.minimum(counts, 5), minlength=5)[1:5].astype(float)  # how many n-grams came once to 4 times
        discounts = np.array([0, 0.5, 1, 1.5])  # where there are too few to estimate it
        if n.all():
            steps = np.arange(1, 4)
            estimate = steps - (steps + 1) * n[0] / (n[0] + 2 * n[1]) * n[1:] / n[:-1]
            if (0 <= estimate).all() and (estimate <= steps).all():
                discounts[1:] = estimate
        taken = np.minimum(discounts[np.minimum(counts, 3)], counts)
        total = np.bincount(contexts, counts, number)
        left = np.bincount(contexts, taken, number)
        return cls((counts - taken) / total[contexts], np.where(total > 0, left / np.maximum(total, 1), 1.0))


class KneserNey:
    """Interpolated modified Kneser-Ney of orders 1 to ``order``, trained at once: they share the shorter orders.

    Args:
        documents: token ids, each document with its end token last, which also begins it.
        vocabulary: ids are below it; every one of them keeps a probability in every context.
    """

    def __init__(self, documents: Sequence[np.ndarray], order: int, vocabulary: int):
        check.whole(1, order=order, vocabulary=vocabulary)
        self.order, self.vocabulary = order, vocabulary
        tokens, place = self._stream(documents)
        if place.max() < order - 1:
            raise ValueError(f"order: got {order}, expected at most {place.max() + 1}, by the longest document")
        self.keys: list[np.ndarray] = []  # sorted, of orders 2 on: number of the context * vocabulary + token
        self.raw: list[Table] = []  # from how often an n-gram came: for the longest order
        self.spread: list[Table] = []  # from after how many tokens it came: for the shorter ones
        ids, contexts = tokens, np.zeros(vocabulary, np.int64)
        counts, number = np.bincount(tokens[1:], minlength=vocabulary), 1
        for k in range(1, order + 1):
            self.raw.append(Table.of(counts, contexts, number))
            if k == order:
                break
            inside = np.flatnonzero(place >= k)
            longer = ids[inside - 1] * vocabulary + tokens[inside]  # ids[t]: which n-gram ends at t
            keys, first, inverse, longer_counts = np.unique(longer, True, True, True)
            before = np.bincount(ids[inside[first]], minlength=len(counts))
            if k > 1:  # nothing stands before a document's start: what begins there counts as often as it came
                before += np.bincount(ids[place == k - 1], minlength=len(counts))
            self.spread.append(Table.of(before, contexts, number))
            self.keys.append(keys)
            contexts, number, counts = keys // vocabulary, len(counts), longer_counts
            ids = np.full(len(tokens), -1)
            ids[inside] = inverse

    def bits(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Bits of every token, documents one after the other: (order, tokens), a row for each order from 1."""
        tokens, place = self._stream(documents)
        ids, found = tokens, []
        lower = self.raw[0].left[0] / self.vocabulary  # of the empty context: the same for every token
        found.append(self.raw[0].share[tokens] + lower)
        if self.order > 1:
            lower = self.spread[0].share[tokens] + self.spread[0].left[0] / self.vocabulary
        for k, keys in enumerate(self.keys, 2):
            context = np.where(place >= k - 1, np.roll(ids, 1), -1)
            wanted = context * self.vocabulary + tokens
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            known = (context >= 0) & (keys[at] == wanted)
            for table in (self.raw[k - 1], *self.spread[k - 1 : k]):  # the longest order has no spread
                mixed = np.where(known, table.share[at], 0) + table.left[np.maximum(context, 0)] * lower
                mixed = np.where(context >= 0, mixed, lower)
                if table is self.raw[k - 1]:
                    found.append(mixed)
            lower, ids = mixed, np.where(known, at, -1)
        return -np.log2(np.stack(found)[:, 1:])

    def _stream(self, documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All documents behind one end token, and of each token its place; 0 stands before a document's first one."""
        if not len(documents) or not all(map(len, documents)):
            raise ValueError(f"documents: got {len(documents)}, one of them empty, expected at least one with tokens")
        tokens = np.concatenate([documents[0][-1:], *documents]).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise ValueError(f"documents: got token {tokens.max()}, expected ids from 0 and below {self.vocabulary}")
        return tokens, np.concatenate([[0], *(np.arange(1, len(document) + 1) for document in documents)])


def by_document(bits: np.ndarray, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Sums over each document: (..., tokens) to (..., documents)."""
    return np.add.reduceat(bits, np.cumsum([0, *map(len, documents)])[:-1], axis=-1)


def rate(bits: np.ndarray, sizes: np.ndarray, resamples: int = 2000, seed: int = 0) -> list[float]:
    """Bits a byte over all documents, and the middle 95 % when documents are drawn again with replacement."""
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(resamples, len(sizes)))
    low, high = np.quantile(bits[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
    return [round(float(value), 4) for value in (bits.sum() / sizes.sum(), low, high)]


def ngram_baselines(order: int = 6, every: int = 1) -> dict:
    """Orders 1 to ``order`` on validation and test, trained on train; ``every`` n-th document only.

    Returns a mapping for each held-out split: ``documents`` as ``source/id`` with their ``bytes``, ``bits`` (a list for
    each order, one number a document, in that order), and ``bits_per_byte`` for each order, of all and by source, each
    with its interval over documents.
    """
    check.whole(1, order=order, every=every)
    train = corpus.load("train")[::every]
    model = KneserNey(corpus.encode(document.text for document in train), order, corpus.VOCABULARY)
    result = {}
    for split in ("validation", "test"):
        documents = corpus.load(split)[::every]
        tokens = corpus.encode(document.text for document in documents)
        sizes = np.array([len(document.text.encode()) for document in documents])
        bits = by_document(model.bits(tokens), tokens)
        sources = np.array([document.source for document in documents])
        rows = {"all": sources != ""} | {source: sources == source for source in dict.fromkeys(sources.tolist())}
        result[split] = {
            "documents": [f"{document.source}/{document.id}" for document in documents],
            "bytes": sizes.tolist(),
            "bits": {str(k + 1): bits[k].round(1).tolist() for k in range(order)},
            "bits_per_byte": {
                str(k + 1): {name: rate(bits[k][chosen], sizes[chosen]) for name, chosen in rows.items()}
                for k in range(order)
            },
        }
    return result


def xz_rate(split: str, every: int = 1) -> dict:
    """By how much one archive of train and ``split`` is longer than one of train: ``bits_per_byte`` of the split."""
    check.whole(1, every=every)
    train, held_out = (
        "\0".join([*(document.text for document in corpus.load(name)[::every]), ""]).encode()
        for name in ("train", split)
    )
    alone, both = (len(lzma.compress(text, filters=XZ)) for text in (train, train + held_out))
    return {
        "bytes": len(held_out),
        "train_bytes": len(train),
        "bits_per_byte": round(8 * (both - alone) / len(held_out), 3),
    }
