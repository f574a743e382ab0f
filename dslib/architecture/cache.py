"""Key-value caches: what a decoder keeps so that it reads no token twice.

A token only looks back, so keys and values of earlier tokens never change. Each layer's attention hands the new ones to
:meth:`KVCache.update` and gets all that its queries may look at. Before the layers, :func:`step_for` counts the new
tokens in, once, and says where they stand and what they may see. Caches differ in *where* they keep: appended, in a
buffer made once, or in a ring of the last few (:mod:`~dslib.architecture.window`).

Shapes: B batch, T new tokens, S keys seen, K key/value heads, D head size, C hidden.

Book: ``chapters/architecture/cache.ipynb``. Sources: Shazeer 2019 (arXiv 1911.02150) for incremental decoding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dslib.check import whole


class KVCache:
    """Keys and values of all tokens so far, a pair of (B, K, S, D) a layer, appended to: each time, all is copied."""

    batch_size, ragged = None, False  # how many sequences (None: any), and whether they may be at different positions

    def __init__(self, config):
        self.window, self.sinks, self.length = config.sliding_window, config.attention_sinks, 0  # length: tokens seen
        self.layers: list[tuple[Tensor, ...] | None] = [None] * config.num_hidden_layers
        self._from = 0  # position of the first key that update returns

    def update(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Store what one layer made of the new tokens; return all that their queries may look at, in the same order.

        That is (keys, values); attention that keeps one tensor a token, as MLA does, hands over and gets just that one.
        """
        held = self.layers[layer]
        seen = new if held is None else tuple(torch.cat(pair, dim=2) for pair in zip(held, new, strict=True))
        self.layers[layer] = seen  # (B, K, S, D) each
        return tuple(part[:, :, self._from :] for part in seen) if self._from else seen

    def advance(self, tokens: int, positions: Tensor | None, device: torch.device) -> "Step":
        """Count ``tokens`` new tokens in; ``positions`` (B, T) only if sequences differ and the cache is ``ragged``."""
        new = torch.arange(self.length, self.length + tokens, device=device).unsqueeze(0)
        begins, self.length = self.length == 0, self.length + tokens
        # One query sees an unbroken run of keys; several, or sinks with a gap behind them, need a mask.
        gap = self.sinks and self.window is not None and self.length > self.sinks + self.window
        masked = tokens > 1 or gap
        slides = self.window is not None and not masked and not self.sinks
        self._from = max(0, self.length - self.window) if slides else 0
        if begins:
            return Step(new, causal=True)
        if not masked:
            return Step(new)
        keys = torch.arange(self.length, device=device).unsqueeze(0)
        return Step(new, mask=visible(new, keys, self.window, self.sinks).unsqueeze(1))

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on, as if those tokens had never been fed: for guesses that failed.

        Raises:
            ValueError: a length outside 0 to what is held, or a rolling cache, which has overwritten what came before.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length: got {length}, expected 0 to {self.length}, the tokens held")
        self.length = length
        self.layers = [parts and tuple(t[:, :, :length] for t in parts) for parts in self.layers]

    def tensors(self) -> list[Tensor]:
        """Every tensor that holds keys or values."""
        return [t for parts in self.layers if parts is not None for t in parts]

    @property
    def nbytes(self) -> int:
        """Bytes held for keys and values, counted from the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


@dataclass
class Step:
    """Where the new tokens of one forward pass stand, and what each may look at.

    Attributes:
        positions: int64, (1 or B, T).
        mask: bool, (1 or B, 1, T, S), True where a query may look; None hides no key.
        causal: the keys are the new tokens themselves, and each looks at itself and those before it.
    """

    positions: Tensor
    mask: Tensor | None = None
    causal: bool = False


def visible(query: Tensor, key: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """Which keys a query may look at: (..., T) and (..., S) positions -> bool (..., T, S).

    A key is visible if it is not in the future and, with a window, among the last ``window`` positions (the query's
    own included) or among the first ``sinks``.
    """
    q, k = query.unsqueeze(-1), key.unsqueeze(-2)
    seen = k <= q
    if window is not None:
        recent = k > q - window
        seen &= recent | (k < sinks) if sinks else recent  # only differences count then: positions may be relative
    return seen


class BufferCache(KVCache):
    """A cache with a fixed number of slots in one buffer, made once, and written in place: gradients cannot follow."""

    def __init__(self, config, batch_size: int, slots: int, *, dtype=torch.float32, device="cpu"):
        super().__init__(config)
        whole(1, batch_size=batch_size)
        self.batch_size = batch_size
        parts, heads, size = config.cache_shape
        # (layer, key or value, B, K, S, D). Zeros, because masked slots are still multiplied by a weight of zero.
        shape = (config.num_hidden_layers, parts, batch_size, heads, slots, size)
        self.buffer = torch.zeros(shape, dtype=dtype, device=device)
        # One (keys, values) pair of views a layer, made once: indexing costs more than it seems in a decoding loop.
        self._layers = [layer.unbind(0) for layer in self.buffer]

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._layers = [layer.unbind(0) for layer in self.buffer]  # pickled views do not share the buffer any more

    def __getstate__(self) -> dict:
        return {**vars(self), "_layers": None}

    def truncate(self, length):
        before = self.length
        super().truncate(length)
        with torch.inference_mode():  # which may write to a buffer of either mode
            self.buffer[..., length:before, :] = 0  # behind a mask a NaN that was left here would still count

    def tensors(self):
        return [self.buffer]


class PreallocatedCache(BufferCache):
    """A buffer for ``max_length`` positions, made once; slot = position.

    Sequences of a batch may be at different positions: pass ``positions`` (B, T) to the model. Right-padded prompts
    need no special care: what padding wrote at a slot is overwritten before any query may look at it.

    Attributes:
        static: when ``positions`` are given, return every slot behind a mask and never read a position back. All steps
            then have one shape and none makes the device wait, so that a CUDA graph can repeat them; whoever sets it
            answers for positions below ``max_length``.
    """

    ragged, static = True, False

    def __init__(self, config, batch_size: int, max_length: int, *, dtype=torch.float32, device="cpu"):
        whole(1, max_length=max_length)
        super().__init__(config, batch_size, max_length, dtype=dtype, device=device)
        self.max_length = max_length
        # What advance leaves for update: slots from start to stop, or an index of them where sequences differ.
        self._start, self._stop, self._slots = 0, 0, None

    def advance(self, tokens, positions, device):
        if positions is not None:
            return self._advance_ragged(positions)
        start, stop = self.length, self.length + tokens
        if stop > self.max_length:
            raise ValueError(
                f"the cache holds max_length={self.max_length} positions: "
                f"{tokens} new tokens after {start} do not fit; make a longer cache or shorten the prompt"
            )
        self._slots, self._start, self._stop = None, start, stop
        return super().advance(tokens, None, device)

    def _advance_ragged(self, positions: Tensor) -> Step:
        self._from, self._stop = 0, self.max_length
        if not self.static:
            lowest, highest = int(positions.min()), int(positions.max())
            if lowest < 0 or highest >= self.max_length:
                wanted = f"0 to {self.max_length - 1} (the cache's max_length - 1)"
                raise ValueError(f"positions: got {lowest} to {highest}, expected {wanted}")
            self._stop = self.length = max(self.length, highest + 1)
        self._slots = (torch.arange(len(positions), device=positions.device).unsqueeze(1), positions)
        keys = torch.arange(self._stop, device=positions.device).unsqueeze(0)
        return Step(positions, mask=visible(positions, keys, self.window, self.sinks).unsqueeze(1))

    def update(self, layer, *new):
        held = self._layers[layer]
        for kept, part in zip(held, new, strict=True):
            if self._slots is None:
                kept.narrow(2, self._start, self._stop - self._start).copy_(part)
            else:  # scatter every token to its own sequence's position
                kept.transpose(1, 2)[self._slots] = part.transpose(1, 2).to(kept.dtype)  # which differs under autocast
        return tuple(kept.narrow(2, self._from, self._stop - self._from) for kept in held)


def step_for(
    x: Tensor, cache: KVCache | None, positions: Tensor | None, config, attention_mask: Tensor | None = None
) -> Step:
    """The step for new states (B, T, C), which are counted into the cache.

    Args:
        positions: int64 (B, T), if the sequences of a batch are at different ones.
        attention_mask: (B, S) of 0 and 1, as transformers has it: 0 for padding, on any side, among all tokens fed so
            far. Positions then count real tokens only. What a padding token itself sees and gives has no meaning.

    Raises:
        ValueError: a cache for another window or number of sequences, or one that is full; positions or a mask that do
            not fit, or that this kind of cache cannot take.
    """
    tokens = x.shape[1]
    if positions is not None:
        _check_positions(positions, x, one_row=cache is None)
    if attention_mask is not None:
        _check_mask(attention_mask, x, cache)
        attention_mask = None if attention_mask.all() else attention_mask.bool()
    if cache is None:
        at = torch.arange(tokens, device=x.device).unsqueeze(0) if positions is None else positions
        step = Step(at, causal=True)
    else:
        ragged_positions = positions if attention_mask is None else None  # beside a mask they say only how to rotate
        _check_cache(cache, x, ragged_positions, config)
        step = cache.advance(tokens, ragged_positions, x.device)
    if attention_mask is None:
        return step
    at = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, S)
    new = at[:, -tokens:]
    mask = visible(new, at, config.sliding_window, config.attention_sinks) & attention_mask.unsqueeze(1)  # (B, T, S)
    # A padding token has to look at something, or its softmax is of nothing: it sees itself.
    mask = mask | torch.eye(at.shape[1], dtype=torch.bool, device=x.device)[-tokens:]
    if cache is not None:
        cache._from = 0  # update then returns every key: with padding between, a window is not the last few slots
    return Step(new if positions is None else positions, mask.unsqueeze(1))


def _check_positions(positions: Tensor, x: Tensor, one_row: bool) -> None:
    shape = tuple(x.shape[:2])
    fits = positions.shape == shape or (one_row and positions.shape == (1, shape[1]))  # for all sequences
    if not fits or positions.is_floating_point():
        wanted = f"({shape[0]}, tokens), here {shape}, of whole numbers"
        raise ValueError(f"positions: got shape {tuple(positions.shape)}, expected {wanted}")


def _check_mask(attention_mask: Tensor, x: Tensor, cache: KVCache | None) -> None:
    shape = (len(x), x.shape[1] + (0 if cache is None else cache.length))
    if attention_mask.shape != shape or not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {shape} of 0 and 1")
    if isinstance(cache, BufferCache) and not cache.ragged:
        raise ValueError("attention_mask: a rolling cache moves its keys about; use 'growing' or 'preallocated'")


def _check_cache(cache: KVCache, x: Tensor, positions: Tensor | None, config) -> None:
    if (cache.window, cache.sinks) != (config.sliding_window, config.attention_sinks):
        raise ValueError(
            f"cache: made for window={cache.window}, sinks={cache.sinks}, but the model has "
            f"sliding_window={config.sliding_window}, attention_sinks={config.attention_sinks}"
        )
    if cache.batch_size not in (None, len(x)):
        raise ValueError(f"cache: made for {cache.batch_size} sequences, input_ids has {len(x)}")
    if positions is not None and not cache.ragged:
        why = f"{type(cache).__name__} keeps one position for the whole batch"
        raise ValueError(f"positions: {why}; use PreallocatedCache for sequences at different positions")
