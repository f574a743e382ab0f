"""Exercises of ``chapters/architecture/whole.ipynb``. Shapes: B rows, T tokens, V tokens of the vocabulary."""

import math

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal


def _ids(*shape: int, seed: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def _bits(logits: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """Bits of every real target, (n,)."""
    return -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0][real] / math.log(2)


_SIZES = torch.tensor([0, 1, 1, 2, 4, 5, 9])  # bytes of each token; token 0 ends a text and has none


@exercise(
    "whole/bits-per-byte",
    cases=named(
        "logits targets real sizes",
        (
            2 * normal(2, 5, 7, seed=1),
            torch.tensor([[3, 6, 1, 0, 0], [2, 2, 5, 4, 0]]),
            torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool(),
            _SIZES,
        ),
        (normal(1, 3, 7, seed=2), torch.tensor([[1, 4, 6]]), torch.ones(1, 3).bool(), 3 * _SIZES.flip(0)),
        (
            3 * normal(3, 40, 7, seed=3),
            _ids(3, 40, seed=4, below=7),
            torch.arange(40) < torch.tensor([[40], [7], [22]]),
            _SIZES,
        ),
    ),
    mistakes="""
        (_bits(logits, targets, real).sum() * math.log(2) / sizes[targets[real]].sum()).item()
            That is nats a byte: natural logarithms. A bit is ln 2 = 0.693 nats.
        _bits(logits, targets, real).mean().item()
            That is bits a token. A byte is the unit: divide by how many bytes the tokens stand for.
        (_bits(logits, targets, real | True).sum() / sizes[targets].sum()).item()
            Padding counts here. Only where `real` is True is there a token to predict.
        (_bits(logits, targets, real | True).sum() / sizes[targets[real]].sum()).item()
            The bits of padding count here, though its bytes do not.
        (_bits(logits, targets, real)[sizes[targets[real]] > 0].sum() / sizes[targets[real]].sum()).item()
            The end of a text costs bits too: a model has to know that it is over. It only has no bytes.
        (_bits(logits, targets, real) / sizes[targets[real]].clamp(min=1)).mean().item()
            That is the mean of each token's bits over its bytes. A long text is its sum of bits over its sum of bytes:
            a short token would count as much as a long one.
        (_bits(logits, targets, real).mean() / sizes.double().mean()).item()
            Take the bytes of the tokens that are there, and not the mean of the vocabulary.
        torch.stack([_bits(a, b, c).sum() / sizes[b[c]].sum() for a, b, c in zip(logits, targets, real)]).mean().item()
            That is the mean over rows; a short row would count as much as a long one.
    """,
    hint="Sum the bits of all real targets, ends of texts included; divide by the sum of their bytes.",
)
def bits_per_byte(logits: Tensor, targets: Tensor, real: Tensor, sizes: Tensor) -> float:
    """Bits a byte: logits (B, T, V) for ``targets`` (B, T) where ``real`` (B, T) is True; ``sizes`` (V,) in bytes."""
    return (_bits(logits, targets, real).sum() / sizes[targets[real]].sum()).item()


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
