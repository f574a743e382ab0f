"""Key-value caches for decoding: growing, preallocated, rolling.

A decoder that generates token by token needs, at each step, the keys and values of all earlier tokens. They never
change, so they are kept. The three caches differ in *where* they keep them:

* :class:`GrowingCache` appends by concatenation. It needs no size in advance and copies everything at every step.
* :class:`PreallocatedCache` writes into a buffer made once. Slot = position, so every sequence of a batch can be at
  its own position.
* :class:`RollingCache` keeps the last ``window`` positions in a ring (and, if wanted, the first ``sinks`` for good).
  Its memory stays constant however long the text grows. It is exact only for a model with that same window.

The model calls :meth:`~KVCache.begin` once per forward pass and :meth:`~KVCache.update` once per layer.

Book: ``chapters/architecture/decoder.ipynb``. Sources: Shazeer 2019 (arXiv 1911.02150) for incremental decoding,
Mistral 7B (arXiv 2310.06825, section 2) for the rolling buffer, StreamingLLM (arXiv 2309.17453) for sinks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def no_cache_step(batch_tokens: int, positions: Tensor | None, device: torch.device) -> Step:
    """The step of a forward pass without a cache: T new tokens that see each other causally."""
    if positions is None:
        positions = torch.arange(batch_tokens, device=device).unsqueeze(0)
    return Step(positions, causal=True)


class KVCache:
    """Common part of the caches. Keys and values have shape (B, num_key_value_heads, S, head_dim)."""

    def __init__(self, window: int | None = None, sinks: int = 0):
        _at_least("window", window, 1)
        _at_least("sinks", sinks, 0)
        self.window, self.sinks = window, sinks
        self.batch_size: int | None = None  # None: any
        self.length = 0  # tokens seen so far (the same for the whole batch unless positions are passed)

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

    def append(self) -> tuple[tuple[Tensor, ...], ...]:
        """Room for one more token: per layer the slot to write, (2, B, Hk, D), and the keys and values to attend to.

        The views for all layers are made in one go, which is what makes a decoding loop quick. The keys and values
        already include the slot: write it first.

        Raises:
            ValueError: the cache is full, or of a kind that has no slots.
        """
        raise ValueError(f"cache: {type(self).__name__} has no slots to write to; use 'preallocated' or 'rolling'")

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

    def __init__(self, num_layers: int, window: int | None = None, sinks: int = 0):
        super().__init__(window, sinks)
        self.layers: list[tuple[Tensor, ...] | None] = [None] * num_layers

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


class _BufferCache(KVCache):
    """A cache with a fixed number of slots in one buffer, made once."""

    _parts = 2  # tensors kept for a token: its key and its value

    def __init__(self, num_layers, batch_size, num_key_value_heads, slots, head_dim, *, dtype, device, window, sinks):
        super().__init__(window, sinks)
        _at_least("batch_size", batch_size, 1)
        self.batch_size = batch_size
        # (layer, key or value, B, H, S, D). Zeros, because masked slots are still multiplied by a weight of zero.
        self.buffer = torch.zeros(
            num_layers, self._parts, batch_size, num_key_value_heads, slots, head_dim, dtype=dtype, device=device
        )
        # One (keys, values) pair of views a layer, made once: indexing costs more than it seems in a decoding loop.
        self._layers = [layer.unbind(0) for layer in self.buffer]

    def tensors(self) -> list[Tensor]:
        return [self.buffer]

    def _views(self, slot: int, first: int, stop: int):
        """What ``append`` returns: the slot to write, and the keys and values in slots ``first`` to ``stop``."""
        seen = self.buffer.narrow(4, first, stop - first)
        return self.buffer.select(4, slot).unbind(0), *(part.unbind(0) for part in seen.unbind(1))


class PreallocatedCache(_BufferCache):
    """A buffer for ``max_length`` positions, made once; slot = position.

    Sequences of a batch may be at different positions: pass ``positions`` (B, T) to the model. Right-padded prompts
    need no special care: what padding wrote at a slot is overwritten before any query may look at it.

    Attributes:
        static: when ``positions`` are given, return every slot behind a mask and never read a position back. All steps
            then have one shape and none makes the device wait, so that a CUDA graph can repeat them; whoever sets it
            answers for positions below ``max_length``.
    """

    static = False

    def __init__(self, num_layers, batch_size, num_key_value_heads, max_length, head_dim, *, dtype, device="cpu",
                 window: int | None = None, sinks: int = 0):  # fmt: skip
        _at_least("max_length", max_length, 1)
        shape = (num_layers, batch_size, num_key_value_heads, max_length, head_dim)
        super().__init__(*shape, dtype=dtype, device=device, window=window, sinks=sinks)
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

    def append(self):
        if self.begin(1, None, self.buffer.device).mask is not None:
            raise ValueError("cache: sinks and window leave a gap that needs a mask; use a rolling cache")
        return self._views(self._start, self._from or 0, self._stop)

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


class RollingCache(_BufferCache):
    """A ring of ``window`` slots, plus ``sinks`` slots that keep the first positions for good.

    Position p lies in slot p while p < sinks, and in slot ``sinks + (p - sinks) % window`` afterwards. Keys carry
    their rotary position already, so the order of the slots does not matter to attention.
    """

    def __init__(self, num_layers, batch_size, num_key_value_heads, window, head_dim, *, dtype, device="cpu",
                 sinks: int = 0):  # fmt: skip
        _at_least("window", window, 1)
        _at_least("sinks", sinks, 0)
        shape = (num_layers, batch_size, num_key_value_heads, sinks + window, head_dim)
        super().__init__(*shape, dtype=dtype, device=device, window=window, sinks=sinks)

    def _slot(self, positions: Tensor) -> Tensor:
        ring = self.sinks + (positions - self.sinks) % self.window
        return torch.where(positions < self.sinks, positions, ring)

    def begin(self, tokens, positions, device):
        new = self._uniform(tokens, positions, device)
        start, self.length = self.length, self.length + tokens
        self._held = None
        if tokens == 1:
            self._write = self._slot(new[0])
            self._filled = min(self.length, self.sinks + self.window)
            return Step(new)  # the ring holds exactly what the query may see
        # Several tokens at once: the early ones need keys that the late ones will overwrite, so attention runs over
        # (held keys, new keys) and only then are the survivors written.
        keep = (new[0] < self.sinks) | (new[0] >= self.length - self.window)
        self._survivors = keep.nonzero().squeeze(1)
        self._write = self._slot(new[0, self._survivors])
        if start == 0:
            return Step(new, causal=True)
        held = torch.arange(start, device=device)
        held = held[(held < self.sinks) | (held >= start - self.window)]
        self._held = self._slot(held)
        keys = torch.cat((held, new[0])).unsqueeze(0)
        return Step(new, mask=visible(new, keys, self.window, self.sinks).unsqueeze(1))

    def truncate(self, length):
        raise ValueError("cache: a rolling cache has overwritten old positions; use 'preallocated' or 'growing'")

    def append(self):
        self.begin(1, None, self.buffer.device)
        return self._views(int(self._write), 0, self._filled)

    def update(self, layer, k, v):
        keys, values = self._layers[layer]
        if k.shape[2] == 1:
            keys[:, :, self._write], values[:, :, self._write] = k, v
            return keys[:, :, : self._filled], values[:, :, : self._filled]
        all_k, all_v = k, v
        if self._held is not None:
            all_k = torch.cat((keys[:, :, self._held], k), dim=2)
            all_v = torch.cat((values[:, :, self._held], v), dim=2)
        keys[:, :, self._write] = k[:, :, self._survivors]
        values[:, :, self._write] = v[:, :, self._survivors]
        return all_k, all_v


def _first_visible(tokens: int, length: int, window: int | None, sinks: int) -> int | None:
    """First position a single query may look at, if all from there on is visible to it; None if a mask is needed."""
    if tokens > 1 or (sinks and window is not None and length > sinks + window):
        return None
    return 0 if window is None or sinks else max(0, length - window)


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}")
