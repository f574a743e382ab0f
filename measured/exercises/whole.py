"""Exercises of ``chapters/architecture/whole.ipynb``. Shapes: B rows, T tokens; N places, D documents."""

from statistics import fmean

import torch
from torch import Tensor

from measured.exercises import exercise, named


def _ids(*shape: int, seed: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def _information(label: Tensor, chosen: Tensor) -> float:
    """Bits that labels (N,) tell about one of the experts chosen, (N, k)."""
    joint = torch.zeros(int(label.max()) + 1, int(chosen.max()) + 1, dtype=torch.float64)
    pairs = label.repeat_interleave(chosen.shape[1]), chosen.flatten()
    joint.index_put_(pairs, torch.ones(len(pairs[0]), dtype=torch.float64), accumulate=True)
    p = joint / joint.sum()
    return (p * (p / (p.sum(0) * p.sum(1, keepdim=True))).log2()).nansum().item()


def _over_places(sources: Tensor, document: Tensor, chosen: Tensor, orders: Tensor) -> list[float]:
    return [_information(sources[document[order]], chosen) for order in orders]


def _over_documents(sources: Tensor, document: Tensor, chosen: Tensor, orders: Tensor) -> list[float]:
    return [_information(sources[order][document], chosen) for order in orders]


def _corpus(documents: int, sources: int, places: int, experts: int, k: int, shuffles: int, seed: int) -> tuple:
    """Documents that each have a taste for some experts; sources of several documents that have none of their own."""
    g = torch.Generator().manual_seed(seed)
    document = torch.randint(documents, (places,), generator=g).sort().values
    taste = 2 * torch.randn(documents, experts, generator=g)[document]
    chosen = (taste + torch.randn(places, experts, generator=g)).topk(k).indices
    orders = (torch.stack([torch.randperm(n, generator=g) for _ in range(shuffles)]) for n in (places, documents))
    return torch.arange(documents) % sources, document, chosen, *orders


@exercise(
    "whole/shuffles",
    cases=named(
        "sources document chosen places documents",
        _corpus(4, 2, 12, 3, 1, 2, seed=1),
        _corpus(9, 3, 90, 6, 2, 5, seed=2),
        _corpus(66, 8, 1320, 16, 4, 3, seed=3),
    ),
    tolerance=1e-3,  # who counts in float32 is right as well
    mistakes="""
        by_chance(sources, document, chosen, places, documents)[::-1]
            The two have changed places: first sources shuffled over places, then over documents.
        [_information(sources[document], chosen)] * 2
            Nothing is shuffled here: that is what the real labels tell.
        [_information(sources[document], chosen) - x for x in by_chance(sources, document, chosen, places, documents)]
            That is the real value less chance. Chance itself is asked for.
        [_over_places(sources, document, chosen, places)[0], _over_documents(sources, document, chosen, documents)[0]]
            That is the first shuffle alone. Take the mean over all of them.
        [max(_over_places(sources, document, chosen, places)),
        max(_over_documents(sources, document, chosen, documents))]
            That is the largest of the shuffles, which a test would use. To subtract, take their mean.
        [0.693147 * x for x in by_chance(sources, document, chosen, places, documents)]
            That is in nats. A bit is ln 2 = 0.693 nats.
        [_information(torch.cat([sources[document[o]] for o in places]), chosen.repeat(len(places), 1)),
        _information(torch.cat([sources[o][document] for o in documents]), chosen.repeat(len(documents), 1))]
            You pooled the shuffles in one table. That averages chance away: take the information of each shuffle, then
            the mean.
    """,
    hint="A place's source is sources[document]. Shuffle that over places; or shuffle `sources` before documents hand "
    "them to their places. Take the information of each shuffle, then the mean of each kind.",
)
def by_chance(sources: Tensor, document: Tensor, chosen: Tensor, places: Tensor, documents: Tensor) -> list[float]:
    """Mean bits about ``chosen`` (N, k), sources (D,) shuffled over places (S, N) and over documents (S, D)."""
    return [
        fmean(_over_places(sources, document, chosen, places)),
        fmean(_over_documents(sources, document, chosen, documents)),
    ]


def _parts(rows: Tensor, depth: int) -> list[Tensor]:
    length = rows.shape[1] - depth - 1
    return [rows[:, k : k + length] for k in range(depth + 2)]


def _chain(rows: Tensor, depth: int, reads: int = 1, wanted: int = 1) -> Tensor:
    """Number k reads from place ``reads`` k on, and its targets lie ``wanted`` places behind k."""
    parts = _parts(rows, depth)
    return torch.stack([torch.stack((parts[reads * k], parts[k + wanted])) for k in range(depth + 1)])


@exercise(
    "whole/chain",
    cases=named(
        "rows depth",
        (torch.arange(100, 109)[None], 1),
        (torch.arange(20).view(2, 10), 2),
        (_ids(3, 12, seed=5, below=50), 3),
        (torch.arange(6)[None], 0),
    ),
    mistakes="""
        _chain(rows, depth, reads=0)
            Every module gets the same ids here. Module k reads the token that the one before it predicted: the ids move
            along by one with every module.
        _chain(rows, depth, wanted=0)
            Your targets are what is read. They have to lie one place further.
        _chain(rows, depth + 1)[:-1]
            That is a place fewer than there could be: the last target may be the last token of the row.
        _chain(rows, depth)[1:]
            The decoder itself is missing: it comes first, as number 0.
        _chain(rows, depth).flip(1)
            Ids and targets have changed places.
    """,
    hint="With D modules, B rows of L ids leave T = L - D - 1 places. Number k reads ids from place k on, and its "
    "targets are those from place k + 1 on.",
)
def chain(rows: Tensor, depth: int) -> Tensor:
    """(depth + 1, 2, B, T): ids and targets of the decoder and of ``depth`` prediction modules behind it."""
    return _chain(rows, depth)


def _gated(hidden_size: int, inner: int) -> int:
    return 3 * hidden_size * inner


_SHAPE = "hidden_size vocab_size layers dense_layers attention dense_inner experts top_k expert_inner shared"


@exercise(
    "whole/active",
    cases=named(
        _SHAPE,
        (256, 4096, 5, 1, 180_224, 384, 16, 4, 48, 1),
        (64, 1000, 3, 0, 9000, 128, 8, 2, 32, 2),
        (64, 1000, 4, 4, 9000, 128, 8, 2, 32, 0),
        (7168, 129_280, 61, 3, 187_105_280, 18_432, 256, 8, 2048, 1),
    ),
    mistakes="""
        layers * attention + dense_layers * _gated(hidden_size, dense_inner) + (layers - dense_layers) *
        (hidden_size * experts + (experts + shared) * _gated(hidden_size, expert_inner)) + vocab_size * hidden_size
            That is every weight. A token is multiplied by those of its top_k experts only.
        layers * attention + dense_layers * _gated(hidden_size, dense_inner) + (layers - dense_layers) *
        (hidden_size * experts + top_k * _gated(hidden_size, expert_inner)) + vocab_size * hidden_size
            The shared experts are missing; every token goes through them.
        layers * attention + dense_layers * _gated(hidden_size, dense_inner) + (layers - dense_layers) *
        (top_k + shared) * _gated(hidden_size, expert_inner) + vocab_size * hidden_size
            The router is missing. To choose, a token is multiplied by one row for each expert, also of those that it
            does not choose.
        layers * attention + dense_layers * _gated(hidden_size, dense_inner) + (layers - dense_layers) *
        (hidden_size * experts + (top_k + shared) * _gated(hidden_size, expert_inner)) + 2 * vocab_size * hidden_size
            The embedding is looked up, one row a token, and multiplied by nothing. The head is what is multiplied by.
        layers * attention + dense_layers * _gated(hidden_size, dense_inner) + (layers - dense_layers) *
        (hidden_size * experts + (top_k + shared) * _gated(hidden_size, expert_inner))
            The head is missing: its logits are a product with one row for each token of the vocabulary.
        layers * (attention + hidden_size * experts + (top_k + shared) * _gated(hidden_size, expert_inner)) +
        vocab_size * hidden_size
            The first layers have one dense MLP each, and no experts.
        layers * attention + dense_layers * 2 * hidden_size * dense_inner + (layers - dense_layers) *
        (hidden_size * experts + (top_k + shared) * 2 * hidden_size * expert_inner) + vocab_size * hidden_size
            A SwiGLU has three matrices: gate, up and down.
    """,
    hint="Layer by layer: attention; then one dense MLP, or a router and the experts that a token goes through. And "
    "the head, once.",
)
def active(
    hidden_size: int, vocab_size: int, layers: int, dense_layers: int, attention: int, dense_inner: int, experts: int,
    top_k: int, expert_inner: int, shared: int,
) -> int:  # fmt: skip
    """Weights that one token is multiplied by; ``attention`` is the number in one layer's attention."""
    mixture = hidden_size * experts + (top_k + shared) * _gated(hidden_size, expert_inner)
    dense = dense_layers * _gated(hidden_size, dense_inner)
    return layers * attention + dense + (layers - dense_layers) * mixture + vocab_size * hidden_size
