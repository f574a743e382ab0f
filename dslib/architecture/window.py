"""The local window of V1: attention that sees the last W tokens, in blocks, and a cache that holds no more than those.

Under a mask, a window saves nothing: all T x S scores are computed, and most are thrown away. :func:`window_attention`
computes the blocks that hold visible scores and no others, so its cost grows with length x window. When a text is made
token by token, keys that have left the window are never asked again: :class:`RollingCache` overwrites them.

Shapes: B batch, T new tokens, H query heads, K key/value heads, D head size, W window.

Book: ``chapters/architecture/cache.ipynb``. Sources: Longformer (arXiv 2004.05150) and Mistral 7B (arXiv 2310.06825)
for the window and its rolling buffer, StreamingLLM (arXiv 2309.17453) for sinks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib.architecture.cache import BufferCache, Step, visible
from dslib.check import whole


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int = 0, block: int | None = None) -> Tensor:
    """Local causal attention in blocks: time and memory O(T (W + block)) instead of O(T²).

    Queries are cut into blocks. A block's queries can only see keys from ``window - 1`` before its first token to its
    last token, so each block attends to that slice alone, under one small mask that is the same for all blocks. The
    first tokens, whose slice would begin before the text does, are one small dense problem.

    Args:
        q: (B, H, T, D). k, v: (B, K, T, D).
        window: W >= 1, the query's own position included (the convention of Mistral's ``sliding_window``).
        sinks: the first ``sinks`` positions stay visible.
        block: queries per block; None chooses an eighth of the window, at least 32.

    Returns:
        (B, H, T, D), equal to attention under a band mask.

    Raises:
        ValueError: window below 1, negative sinks, block below 1.
    """
    whole(1, window=window, block=1 if block is None else block)
    whole(0, sinks=sinks)
    batch, tokens, device = q.shape[0], q.shape[2], q.device
    grouped = q.shape[1] != k.shape[1]
    block = block or max(32, window // 8)
    reach = window - 1  # how far before a query its keys begin
    # Queries start..stop, in blocks, see keys start - reach..stop. Those before them are a dense problem, long enough
    # that no later slice touches the sinks or the beginning of the text.
    start = min(tokens, -(-(reach + sinks) // block) * block)
    blocks = -(-(tokens - start) // block)
    stop = start + blocks * block

    at = torch.arange(max(start, reach + block), device=device)
    first = F.scaled_dot_product_attention(
        q[:, :, :start], k[:, :, :start], v[:, :, :start],
        attn_mask=visible(at[:start], at[:start], window, sinks), enable_gqa=grouped,
    )  # fmt: skip
    if not blocks:
        return first
    if stop > tokens:  # the last block is filled up behind the text, where no query of the text looks
        q, k, v = (F.pad(x, (0, 0, 0, stop - tokens)) for x in (q, k, v))

    def slices(x: Tensor) -> Tensor:
        """Overlapping slices of keys or values, one a block -> (B * blocks, K, sinks + reach + block, D)."""
        cut = x[:, :, start - reach : stop].unfold(2, reach + block, block).permute(0, 2, 1, 4, 3)
        if sinks:
            cut = torch.cat((x[:, None, :, :sinks].expand(-1, blocks, -1, -1, -1), cut), dim=3)
        return cut.flatten(0, 1)

    # In a slice, the query number i is key number reach + i.
    mask = visible(at[reach : reach + block], at[: reach + block], window)  # (block, reach + block)
    mask = torch.cat((mask.new_ones(block, sinks), mask), dim=1)
    # Blocks are folded into the batch, so that one call of the fused kernel does them all.
    queries = q[:, :, start:].unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)
    rest = F.scaled_dot_product_attention(queries, slices(k), slices(v), attn_mask=mask, enable_gqa=grouped)
    rest = rest.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)  # (B, H, blocks * block, D)
    return torch.cat((first, rest[:, :, : tokens - start]), dim=2)


class RollingCache(BufferCache):
    """A ring of ``window`` slots, plus ``sinks`` slots that keep the first positions for good.

    Position p lies in slot p while p < sinks, and in slot ``sinks + (p - sinks) % window`` afterwards. Keys carry
    their rotary position already, so the order of the slots does not matter to attention.
    """

    def __init__(self, config, batch_size: int, *, dtype=torch.float32, device="cpu"):
        if config.sliding_window is None:
            raise ValueError("kind: got 'rolling', but the model has no sliding_window; forgetting would change it")
        slots = config.attention_sinks + config.sliding_window
        super().__init__(config, batch_size, slots, dtype=dtype, device=device)
        # What advance leaves for update: slots to read before and after, which new tokens to keep, slots to write.
        self._held, self._filled, self._survivors, self._write = None, 0, slice(None), None

    def _slot(self, positions: Tensor) -> Tensor:
        ring = self.sinks + (positions - self.sinks) % self.window
        return torch.where(positions < self.sinks, positions, ring)

    def advance(self, tokens, positions, device):
        new = torch.arange(self.length, self.length + tokens, device=device)
        start, self.length = self.length, self.length + tokens
        self._held, self._filled = None, min(self.length, self.sinks + self.window)
        if tokens == 1:
            self._write, self._survivors = self._slot(new), slice(None)
            return Step(new.unsqueeze(0))  # the ring holds exactly what the query may see
        # Several tokens at once: the early ones need keys that the late ones will overwrite, so attention runs over
        # (held keys, new keys) and only then are the survivors written.
        self._survivors = ((new < self.sinks) | (new >= self.length - self.window)).nonzero().squeeze(1)
        self._write = self._slot(new[self._survivors])
        new = new.unsqueeze(0)
        if start == 0:
            return Step(new, causal=True)
        held = torch.arange(start, device=device)
        held = held[(held < self.sinks) | (held >= start - self.window)]
        self._held = self._slot(held)
        keys = torch.cat((held.unsqueeze(0), new), dim=1)
        return Step(new, mask=visible(new, keys, self.window, self.sinks).unsqueeze(1))

    def update(self, layer, *new):
        seen, single = new, new[0].shape[2] == 1
        if self._held is not None:
            pairs = zip(self._layers[layer], new, strict=True)
            seen = tuple(torch.cat((kept[:, :, self._held], part), dim=2) for kept, part in pairs)
        for kept, part in zip(self._layers[layer], new, strict=True):
            kept[:, :, self._write] = part[:, :, self._survivors].to(kept.dtype)  # which differs under autocast
        return tuple(kept[:, :, : self._filled] for kept in self._layers[layer]) if single else seen

    def truncate(self, length):
        raise ValueError("cache: a rolling cache has overwritten old positions; use 'preallocated' or 'growing'")
