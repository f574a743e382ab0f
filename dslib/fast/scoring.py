"""Log-likelihoods of several continuations of one context: by whole passes, or with nothing computed twice.

:func:`whole_passes` runs context and continuation through the model, whatever the model is. The shared way gives the
same for a fraction of the work. What all contexts begin with, such as a header or examples, runs once and leaves its
keys and values. A row of the batch holds the rest of a context and, behind it, its continuations side by side; a mask
lets each see the context and itself. Continuations of one token, such as letters, add nothing to it. The output layer
runs only where a token is scored. Rows of similar length share a batch.

That is a shortcut past the model's ``forward``, so it is for models that :func:`dslib.fast.prepare` has prepared and in
which nothing was changed, see :func:`why_not`.

The output layer runs in float32 whatever the model's format, unless it was quantised or changed. Two letters often lie
closer together than bfloat16 can tell apart, and a tie would go to the first.

Book: ``chapters/performance/accuracy.ipynb``, section "Four answers for the price of one".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from dslib.architecture.cache import Step, visible
from dslib.architecture.decoder import Decoder
from dslib.architecture.experts import Experts
from dslib.architecture.int4.layers import Int4Experts
from dslib.architecture.moe import MoE, Router
from dslib.architecture.published import MultiHeadLatentAttention
from dslib.check import whole
from dslib.exact import exactly
from dslib.fast.int8 import Int8Linear
from dslib.fast.prepared import is_prepared
from dslib.fast.token_step import KINDS, changed, unlike_module

SCORED = (*KINDS, MultiHeadLatentAttention, MoE, Router, Experts, Int4Experts, Int8Linear)
SHORTEST_PREFIX = 8  # a shorter common beginning is not worth the trouble


@dataclass(frozen=True)
class Row:
    """Token ids of a context and of its continuations; every row of a call has the same number of them."""

    context: list[int]
    ends: list[list[int]]

    def __post_init__(self):
        object.__setattr__(self, "context", list(self.context))
        object.__setattr__(self, "ends", [list(end) for end in self.ends])

    @property
    def tokens(self) -> list[int]:
        # The last token of a continuation is only predicted, never looked at.
        return self.context + [token for end in self.ends for token in end[:-1]]


@torch.inference_mode()
def log_likelihoods(
    model: Decoder, rows: Sequence[Row], *, groups: Sequence | None = None, batch_tokens: int = 512,
    progress: bool = False,
) -> Tensor:  # fmt: skip
    """Log-likelihood of each continuation after its context, in nats: float32 (rows, continuations), on the CPU.

    Args:
        groups: a label for each row; what the rows of a group have in common at the start runs once. None is one group.
        batch_tokens: tokens of a batch, padding included; a longer row is a batch of its own.

    Raises:
        ValueError: no row, continuations that differ in number, a context or a continuation without a token, an id
            outside the vocabulary, a row longer than ``max_position_embeddings`` (unless the model has a window), not a
            label for each row; logits that are not a number.
    """
    groups = [0] * len(rows) if groups is None else groups
    _check(model, rows, groups)
    whole(1, batch_tokens=batch_tokens)
    if why_not(model) is not None:
        out = whole_passes(model, rows, progress)
    else:
        out = _shared_passes(model, rows, groups, batch_tokens, progress)
    if (broken := out.isnan().any(1)).any():
        raise ValueError(f"logits: not a number for row {int(broken.int().argmax())}, expected numbers")
    return out


@torch.inference_mode()
def whole_passes(model: Decoder, rows: Sequence[Row], progress: bool = False) -> Tensor:
    """What :func:`log_likelihoods` gives of a model that is not prepared: from logits in the model's own format."""
    device = model.embed_tokens.weight.device
    alone = unlike_module(model, SCORED) is not None  # a module that we do not know may let one row change another
    out = torch.empty(len(rows), len(rows[0].ends), dtype=torch.float32, device="cpu")
    for index, row in enumerate(tqdm(rows, desc="questions", disable=not progress)):
        batches: dict[tuple, list[int]] = {}
        for number, end in enumerate(row.ends):  # those of equal length share a batch, so that nothing is padded
            batches.setdefault((len(end), number if alone else None), []).append(number)
        for (size, _), same in batches.items():
            ids = torch.tensor([row.context + row.ends[number] for number in same], device=device)  # (B, T)
            logs = model(ids[:, :-1]).float().log_softmax(-1)[:, -size:]  # (B, size, vocab_size)
            out[index, same] = logs.gather(2, ids[:, -size:, None]).sum((1, 2)).cpu()
    return out


def _shared_passes(model: Decoder, rows: Sequence[Row], groups: Sequence, batch_tokens: int, progress: bool) -> Tensor:
    head, found = _float_head(model), {}
    with tqdm(total=len(rows), desc="questions", disable=not progress) as bar:
        for group in dict.fromkeys(groups):
            order = [index for index in range(len(rows)) if groups[index] == group]
            order.sort(key=lambda index: len(rows[index].tokens), reverse=True)
            prefix = _Prefix.of(model, [rows[index].context for index in order])
            while order:
                count = max(1, batch_tokens // (len(rows[order[0]].tokens) - prefix.length))
                batch, order = order[:count], order[count:]
                scores = _score_batch(model, head, [rows[index] for index in batch], prefix)
                found.update(zip(batch, scores, strict=True))
                bar.update(len(batch))
    return torch.stack([found[index] for index in range(len(rows))])


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of the tokens that several contexts begin with, per layer (1, Hk, P, D); a cache to read from."""

    length: int
    layers: list[tuple[Tensor, ...]]

    @classmethod
    def of(cls, model: Decoder, contexts: list[list[int]]) -> "_Prefix":
        first, last = min(contexts), max(contexts)  # in alphabetical order, so what these two share, all share
        most = min(map(len, contexts)) - 1  # the last token of a context has to be computed: it predicts
        length = next((at for at in range(most) if first[at] != last[at]), most)
        if len(contexts) == 1 or length < SHORTEST_PREFIX or model.config.sliding_window is not None:
            return cls(0, [])
        cache = model.make_cache("growing")
        ids = torch.tensor([first[:length]], device=model.embed_tokens.weight.device)
        model(ids, cache, logits_at=torch.zeros_like(ids[:, :1]))  # only keys and values are wanted
        return cls(length, cache.layers)

    def update(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """The prefix before the new keys and values, (B, Hk, T, D) each -> (B, Hk, P + T, D)."""
        held = zip(self.layers[layer], new, strict=True)
        return tuple(torch.cat((old.expand(len(part), -1, -1, -1), part), 2) for old, part in held)


def _score_batch(model: Decoder, head: Callable[[Tensor], Tensor], rows: list[Row], prefix: _Prefix) -> Tensor:
    device, skip = model.embed_tokens.weight.device, prefix.length
    width = max(len(row.tokens) for row in rows) - skip
    ids, positions, branches = [], [], []  # (B, T) each; branch 0: context or padding, from 1 on: continuation
    where, what, whose = [], [], []  # per scored token: its place in the batch, its id, what it counts for
    for index, row in enumerate(rows):
        tokens, position, branch = row.tokens[skip:], list(range(skip, skip + width)), [0] * width
        start = at = len(row.context) - skip
        for number, end in enumerate(row.ends):
            stop = at + len(end) - 1
            position[at:stop] = range(start + skip, start + skip + stop - at)
            branch[at:stop] = [number + 1] * (stop - at)
            where += [index * width + place for place in (start - 1, *range(at, stop))]
            what += end
            whose += [index * len(row.ends) + number] * len(end)
            at = stop
        ids.append(tokens + [0] * (width - len(tokens)))  # padded on the right with any token
        positions.append(position)
        branches.append(branch)
    # A place that predicts for several continuations (the end of the context) goes through the output layer once.
    places, back = torch.tensor(where, device=device).unique(return_inverse=True)
    states = _states(model, *(torch.tensor(part, device=device) for part in (ids, positions, branches)), prefix)
    logits = head(model.norm(states.flatten(0, 1)[places])).float()  # (places, vocab_size); autocast may have rounded
    picked = logits[back, torch.tensor(what, device=device)] - logits.logsumexp(-1)[back]
    sums = torch.zeros(len(rows) * len(rows[0].ends), dtype=torch.float32, device=device)
    return sums.index_add_(0, torch.tensor(whose, device=device), picked).view(len(rows), -1).cpu()


def _states(model: Decoder, ids: Tensor, positions: Tensor, branch: Tensor, prefix: _Prefix) -> Tensor:
    """States before the last norm, (B, T, hidden_size); continuations ignore each other."""
    config, cache, mask = model.config, prefix if prefix.length else None, None
    batched = bool(branch.any())
    positions = positions if batched else positions[:1]  # those of all rows are the same
    if batched or cache:
        mask = visible(positions, positions, config.sliding_window, config.attention_sinks)  # (1 or B, T, T)
        if batched:
            mask = mask & ((branch.unsqueeze(1) == 0) | (branch.unsqueeze(1) == branch.unsqueeze(2)))
        mask = torch.cat((mask.new_ones(*mask.shape[:2], prefix.length), mask), 2).unsqueeze(1)  # (1 or B, 1, T, P + T)
    x, step = model.embed_tokens(ids), Step(positions, mask, causal=mask is None)
    rope = model.rope(positions, x.dtype)
    for index, layer in enumerate(model.layers):
        x = layer(x, rope, step, cache, index, ids)
    return x


def _float_head(model: Decoder) -> Callable[[Tensor], Tensor]:
    """The output layer: states (places, hidden_size) -> logits."""
    layer = model.lm_head
    if not exactly(layer, nn.Linear, bias=False) or layer.weight.dtype is torch.float32:
        return layer  # quantised layers and adapters have their own way
    weight = layer.weight.float()
    return lambda states: F.linear(states.float(), weight)


def why_not(model: nn.Module) -> str | None:
    """Why a model's continuations cannot share a pass; None if they can. Every module has to be one that we know."""
    return changed(model, SCORED) if is_prepared(model) else "is not prepared"


def _check(model: Decoder, rows: Sequence[Row], groups: Sequence) -> None:
    """Raise the ValueErrors of :func:`log_likelihoods` that are about rows."""
    if not rows:
        raise ValueError("rows: got none, expected at least one")
    if len(groups) != len(rows):
        raise ValueError(f"groups: got {len(groups)} labels, expected {len(rows)}, one a row")
    ends, size, limit = len(rows[0].ends), model.config.vocab_size, model.config.max_position_embeddings
    for number, row in enumerate(rows):
        if not row.context or not row.ends or len(row.ends) != ends or not all(row.ends):
            found = f"{len(row.context)} tokens and continuations of {list(map(len, row.ends))}"
            wanted = f"at least one token in each, and {max(ends, 1)} continuations"
            raise ValueError(f"rows: number {number} has {found}, expected {wanted}")
        for token in chain(row.context, *row.ends):
            if type(token) is bool or not hasattr(token, "__index__") or not 0 <= token < size:
                raise ValueError(f"rows: number {number} has the token id {token!r}, expected 0 to {size - 1}")
    longest = max(len(row.context) + max(map(len, row.ends)) - 1 for row in rows)
    if model.config.sliding_window is None and longest > limit:
        raise ValueError(f"rows: the longest takes {longest} tokens, the model has room for {limit}")
