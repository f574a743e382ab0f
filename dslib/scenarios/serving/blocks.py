"""Blocks: a cache cut into pieces of a few tokens, so that texts of any length share one memory, and equal beginnings.

A text of n tokens holds ceil(n / size) blocks, anywhere in the pool; its *table* lists them in order. Nothing is kept
free for a text that may grow, and nothing is moved when one ends::

    slot of token t = table[t // size] * size + t % size

A full block may serve every text that begins with the same tokens. It is known by a hash of its tokens *and of the
block before it*: the same tokens behind another beginning have other keys and values. A block that is only partly
filled is never shared, as its owner goes on writing to it. What no text holds any more stays findable until its memory
is needed, the longest unused first.

Shapes: B texts, T new tokens, S keys, K key/value heads, D head size.

Book: ``chapters/scenarios/realtime.ipynb``. Sources: vLLM (arXiv 2309.06180) for the table, its prefix caching for the
chained hashes.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from dslib.architecture.cache import KVCache, Step, visible
from dslib.check import whole


class NoBlocks(Exception):
    """No block is free: somebody has to wait, or to give some back."""


class BlockPool:
    """Who holds which block; the memory itself is :class:`PagedCache`'s.

    Attributes:
        holders: of each block, how many texts have it in their table.
    """

    def __init__(self, num_blocks: int, size: int):
        whole(1, num_blocks=num_blocks, size=size)
        self.num_blocks, self.size = num_blocks, size
        self.holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the longest unused first
        self._by_hash: dict[bytes, int] = {}
        self._hash: dict[int, bytes] = {}  # of a block whose contents may be shared

    @property
    def free(self) -> int:
        """Blocks that nobody holds, those included that could still be shared."""
        return len(self._free)

    def take(self) -> int:
        """A block for one text, whatever it held before. Raises :class:`NoBlocks`."""
        if not self._free:
            raise NoBlocks
        block, _ = self._free.popitem(last=False)
        if (known := self._hash.pop(block, None)) is not None:
            del self._by_hash[known]
        self.holders[block] = 1
        return block

    def share(self, chained: bytes) -> int | None:
        """The block that was published under this hash, held once more; None if there is none."""
        block = self._by_hash.get(chained)
        if block is not None:
            self._free.pop(block, None)
            self.holders[block] += 1
        return block

    def publish(self, block: int, chained: bytes) -> None:
        """Let others find a full block. The first that was published under a hash stays."""
        if chained not in self._by_hash and block not in self._hash:
            self._by_hash[chained], self._hash[block] = block, chained

    def give_back(self, table: Sequence[int]) -> None:
        """A text ends, or makes room. Its last blocks become the first to be overwritten, as others need them least."""
        for block in reversed(table):
            if not self.holders[block]:
                raise ValueError(f"block {block}: given back by a text that does not hold it")
            self.holders[block] -= 1
            if not self.holders[block]:
                self._free[block] = None

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless these tables, and nobody else, hold what is held."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a block twice in one table: {table}"
            for block in table:
                held[block] += 1
        assert held == self.holders, f"holders {self.holders}, in tables {held}"
        assert set(self._free) == {block for block, n in enumerate(held) if not n}, "free blocks that are held, or lost"
        assert {known: block for block, known in self._hash.items()} == self._by_hash, "a hash without its block"


def chain(tokens: Sequence[int], size: int, salt: object = None, known: Sequence[bytes] = ()) -> list[bytes]:
    """The hash of every full block of a text, each over its tokens and the hash before it: (n // size) of 32 bytes.

    ``salt`` is whatever else decides keys and values (an adapter, a picture), or who may share: it is hashed in a
    domain of its own, so that no salt, whatever it is called, stands for the hash of a block. ``known`` are the first
    hashes, which need not be computed again when a text has grown. A hash that does not resist collisions would one day
    give a reader another one's text.
    """
    found = list(known)
    last = found[-1] if found else _hash(b"salt", repr(salt).encode())
    for start in range(len(found) * size, len(tokens) - size + 1, size):
        last = _hash(b"block", last + array("q", tokens[start : start + size]).tobytes())
        found.append(last)
    return found


def _hash(domain: bytes, data: bytes) -> bytes:
    return blake2b(data, digest_size=32, person=domain).digest()


class PagedCache(KVCache):
    """Keys and values in blocks. :meth:`show` says which texts the next pass is about; then the model writes and reads.

    ``cache.show(tables, slots)``, ``model(ids, cache, positions)``: texts may be at different positions, and T may be
    more than one. Reading gathers each text's blocks into one tensor, shorter texts filled up behind a mask.
    """

    ragged = True

    def __init__(self, config, num_blocks: int, size: int, *, dtype=torch.float32, device="cpu"):
        super().__init__(config)
        whole(1, num_blocks=num_blocks, size=size)
        self.size, self.batch_size = size, None
        parts, heads, width = config.cache_shape
        # (layer, key or value, block, token, K, D); zeros, as masked slots are still multiplied by a weight of zero.
        self.buffer = torch.zeros(
            config.num_hidden_layers, parts, num_blocks, size, heads, width, dtype=dtype, device=device
        )
        self._layers = [layer.unbind(0) for layer in self.buffer]

    def show(self, tables: Sequence[Sequence[int]]) -> None:
        """The tables of the texts of the next pass, one a row, long enough for its new tokens."""
        longest = max(map(len, tables))
        rows = [[*table, *[table[0]] * (longest - len(table))] for table in tables]  # filled up: behind the mask
        self._tables, self.batch_size = torch.tensor(rows, device=self.buffer.device), len(tables)  # (B, blocks)

    def advance(self, tokens: int, positions: Tensor | None, device: torch.device) -> Step:
        if positions is None:
            raise ValueError("positions: got None, expected (B, T): the texts of a batch are at different ones")
        self._new = self._tables.gather(1, positions // self.size), positions % self.size  # block and place, (B, T)
        self._last = int(positions.max()) + 1
        self._read = self._tables[:, : -(-self._last // self.size)].flatten()
        keys = torch.arange(self._last, device=device).unsqueeze(0)
        return Step(positions, mask=visible(positions, keys, self.window, self.sinks).unsqueeze(1))

    def update(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Write (B, K, T, D) at the new tokens' slots; give (B, K, S, D) of all that their texts have."""
        held = self._layers[layer]
        for kept, part in zip(held, new, strict=True):
            kept[self._new] = part.transpose(1, 2).to(kept.dtype)
        whole_blocks = (kept.index_select(0, self._read) for kept in held)  # copied as they lie: (B blocks, size, K, D)
        texts = (part.view(self.batch_size, -1, *part.shape[2:]) for part in whole_blocks)
        return tuple(text[:, : self._last].transpose(1, 2) for text in texts)

    def truncate(self, length: int) -> None:
        raise ValueError("truncate: texts in blocks have lengths of their own; give blocks back to the pool instead")

    def tensors(self) -> list[Tensor]:
        return [self.buffer]
