"""Key-value caches for decoding: growing and preallocated.

A decoder that generates token by token needs, at each step, the keys and values of all earlier tokens. They never
change, so they are kept. Caches differ in *where* they keep them:

* :class:`GrowingCache` appends by concatenation. It needs no size in advance and copies everything at every step.
* :class:`PreallocatedCache` writes into a buffer made once. Slot = position, so every sequence of a batch can be at
  its own position.
* :class:`~dslib.architecture.window.RollingCache` keeps the last ``window`` positions in a ring.

A forward pass calls :func:`start` once, which says where the new tokens stand and what they may look at, and every
layer's attention calls :meth:`~KVCache.update`, which writes.

Shapes: B sequences, T new tokens, S keys, H heads of keys and values, D head size.

Book: ``chapters/architecture/decoder.ipynb``. Sources: Shazeer 2019 (arXiv 1911.02150) for incremental decoding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dslib.check import whole


@dataclass
class Step:
    """What one forward pass needs to know about positions.

    Attributes:
        positions: int64, (1, T) or (B, T): the position of every new token.
        mask: bool, (1 or B, 1, T, S), True where a query may look; None if ``causal`` says it all, or if every query
            may look at every key.
        causal: the keys are exactly the new tokens, so that plain causal attention applies.
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


def start(x: Tensor, cache: "KVCache | None", positions: Tensor | None, config) -> Step:
    """The step for new states (B, T, C); ``positions`` (B, T) only if sequences differ. Counts them into the cache.

    Raises:
        ValueError: a cache for another window or another number of sequences, or one that is full.
    """
    batch, tokens, _ = x.shape
    if cache is None:
        if positions is None:
            positions = torch.arange(tokens, device=x.device).unsqueeze(0)
        return Step(positions, causal=True)
    if (cache.window, cache.sinks) != (config.sliding_window, config.attention_sinks):
        raise ValueError(
            f"cache: made for window={cache.window}, sinks={cache.sinks}, but the model has "
            f"sliding_window={config.sliding_window}, attention_sinks={config.attention_sinks}"
        )
    if cache.batch_size not in (None, batch):
        raise ValueError(f"cache: made for {cache.batch_size} sequences, input_ids has {batch}")
    return cache.begin(tokens, positions, x.device)


class KVCache:
    """Common part of the caches. Keys and values have shape (B, H, S, D)."""

    def __init__(self, config):
        self.window, self.sinks = config.sliding_window, config.attention_sinks
        self.batch_size: int | None = None  # None: any
        self.length = 0  # tokens seen so far (the same for the whole batch unless positions are passed)
        # What begin tells update: the first position that a single query may see (None: a mask says what is visible).
        self._from: int | None = None

    def tensors(self) -> list[Tensor]:
        """Every tensor that holds keys or values."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes held for keys and values, counted from the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def begin(self, tokens: int, positions: Tensor | None, device: torch.device) -> Step:
        """Start a forward pass over ``tokens`` new tokens; ``positions`` (B, T) only if sequences differ."""
        raise NotImplementedError

    def update(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Store what one layer made of the new tokens; return all that the queries need, in the same order.

        That is (keys, values); attention that keeps one tensor a token, as MLA does, hands over and gets just that one.
        """
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on, as if those tokens had never been fed: for guesses that failed.

        Raises:
            ValueError: a length outside 0 to what is held, or a rolling cache, which has overwritten what came before.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length: got {length}, expected 0 to {self.length}, the tokens held")
        self.length = length  # a buffer's later slots are overwritten before any query may look at them

    def _uniform(self, tokens: int, positions: Tensor | None, device: torch.device) -> Tensor:
        if positions is not None:
            raise ValueError(
                f"positions: {type(self).__name__} keeps one position for the whole batch; "
                "use PreallocatedCache for sequences at different positions"
            )
        return torch.arange(self.length, self.length + tokens, device=device).unsqueeze(0)

    def _in_order(self, new: Tensor) -> Step:
        """The step for ``new`` positions (1, T) behind keys kept in order from position 0 on; counts them in."""
        first, self.length = self.length == 0, self.length + new.shape[1]
        self._from = _first_visible(new.shape[1], self.length, self.window, self.sinks)
        if first:
            return Step(new, causal=True)
        if self._from is not None:
            return Step(new)  # one query, and it may look at every key that update returns: nothing to hide
        keys = torch.arange(self.length, device=new.device).unsqueeze(0)
        return Step(new, mask=visible(new, keys, self.window, self.sinks).unsqueeze(1))


class GrowingCache(KVCache):
    """Appends by ``torch.cat``: simple, any length, but the whole cache is copied at each step."""

    def __init__(self, config):
        super().__init__(config)
        self.layers: list[tuple[Tensor, ...] | None] = [None] * config.num_hidden_layers

    def tensors(self) -> list[Tensor]:
        return [t for parts in self.layers if parts is not None for t in parts]

    def begin(self, tokens, positions, device):
        return self._in_order(self._uniform(tokens, positions, device))

    def truncate(self, length):
        super().truncate(length)
        self.layers = [parts and tuple(t[:, :, :length] for t in parts) for parts in self.layers]

    def update(self, layer, *new):
        held = self.layers[layer]
        if held is not None:
            new = tuple(torch.cat(pair, dim=2) for pair in zip(held, new, strict=True))
        self.layers[layer] = new
        return tuple(part[:, :, self._from :] for part in new) if self._from else new


class BufferCache(KVCache):
    """A cache with a fixed number of slots in one buffer, made once."""

    def __init__(self, config, batch_size: int, slots: int, *, dtype=torch.float32, device="cpu"):
        super().__init__(config)
        whole(1, batch_size=batch_size)
        self.batch_size = batch_size
        parts, heads, size = config.cache_shape
        # (layer, key or value, B, H, S, D). Zeros, because masked slots are still multiplied by a weight of zero.
        shape = (config.num_hidden_layers, parts, batch_size, heads, slots, size)
        self.buffer = torch.zeros(shape, dtype=dtype, device=device)
        # One (keys, values) pair of views a layer, made once: indexing costs more than it seems in a decoding loop.
        self._layers = [layer.unbind(0) for layer in self.buffer]

    def tensors(self) -> list[Tensor]:
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

    static = False

    def __init__(self, config, batch_size: int, max_length: int, *, dtype=torch.float32, device="cpu"):
        whole(1, max_length=max_length)
        super().__init__(config, batch_size, max_length, dtype=dtype, device=device)
        self.max_length = max_length

    def begin(self, tokens, positions, device):
        if positions is not None:
            return self._begin_ragged(positions)
        start, stop = self.length, self.length + tokens
        if stop > self.max_length:
            raise ValueError(
                f"the cache holds max_length={self.max_length} positions: "
                f"{tokens} new tokens after {start} do not fit; make a longer cache or shorten the prompt"
            )
        self._slots, self._start, self._stop = None, start, stop
        return self._in_order(self._uniform(tokens, None, device))

    def _begin_ragged(self, positions: Tensor) -> Step:
        batch = self.batch_size
        if positions.ndim != 2 or positions.shape[0] != batch:
            raise ValueError(f"positions: got shape {tuple(positions.shape)}, expected ({batch}, tokens)")
        self._slots = (torch.arange(batch, device=positions.device).unsqueeze(1), positions)
        self._from, self._stop = None, self.max_length
        if not self.static:
            last, first = int(positions.max()), int(positions.min())
            if first < 0 or last >= self.max_length:
                raise ValueError(
                    f"positions: got {first} to {last}, expected 0 to {self.max_length - 1} "
                    "(the cache's max_length - 1)"
                )
            self._stop = self.length = max(self.length, last + 1)
        keys = torch.arange(self._stop, device=positions.device).unsqueeze(0)
        return Step(positions, mask=visible(positions, keys, self.window, self.sinks).unsqueeze(1))

    def update(self, layer, *new):
        held = self._layers[layer]
        first = self._from or 0
        for kept, part in zip(held, new, strict=True):
            if self._slots is None:
                kept.narrow(2, self._start, self._stop - self._start).copy_(part)
            else:  # scatter every token to its own sequence's position
                kept.transpose(1, 2)[self._slots] = part.transpose(1, 2)
        return tuple(kept.narrow(2, first, self._stop - first) for kept in held)


def _first_visible(tokens: int, length: int, window: int | None, sinks: int) -> int | None:
    """First position a single query may look at, if all from there on is visible to it; None if a mask is needed."""
    if tokens > 1 or (sinks and window is not None and length > sinks + window):
        return None
    return 0 if window is None or sinks else max(0, length - window)
