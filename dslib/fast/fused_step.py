"""One token of one sequence on a GPU: the decoder's step in five kernels a layer, written in Triton.

Decoding reads every weight once a token: the bytes of the weights, divided by the memory's bandwidth, are the bound. A
step of one operation after another stays far above it. A layer has some sixteen kernels. Each starts, waits for its
first bytes and ends, while the memory idles; and what one kernel leaves for the next is written out and read back.

:class:`FusedStep` computes what :class:`~dslib.architecture.decoder.Decoder` computes, with these kernels a layer:

1. norm and product: ``qkv = W_qkv norm(x)``;
2. attention: rotate, write key and value to the cache, look at all tokens so far;
3. product and residual: ``x += W_o y``;
4. norm, product and SwiGLU: ``h = silu(W_gate norm(x)) * W_up norm(x)``;
5. product and residual: ``x += W_down h``.

A product runs one program (a group of threads) for each row of its matrix. In 1 and 4 every program norms x for itself:
x is small and stays close by, and a kernel is saved. Attention runs one program a query head. It goes over the keys in
blocks and keeps the largest score so far, the sum of the weights, and the weighted sum of the values; when a larger
score comes, both sums shrink by one factor. No row of scores is written, and the cost follows the text, not the cache.
Numbers are rounded to the model's dtype where the plain model rounds; sums are float32. Nothing asks the device, so a
CUDA graph can record the step: ``StaticDecoding(..., fused=True)`` in :mod:`dslib.fast.cuda_graph`.

Book: ``chapters/performance/speed.ipynb``. Sources: gpt-fast (github.com/pytorch-labs/gpt-fast) for decoding near the
bound; online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867), FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations  # so that tl in the annotations below is never looked up

import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import PreallocatedCache
from dslib.architecture.decoder import Decoder
from dslib.architecture.layers import Attention, Block, RMSNorm, SwiGLU
from dslib.fast.token_step import changed

try:
    import triton
    import triton.language as tl
except ImportError:  # FusedStep says so
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks at it when kernels are defined, so we do too
ROW_BLOCK = 2048  # numbers of a row that a program of four warps holds at once
jit = triton.jit if triton else lambda kernel: kernel


@jit
def _normed(x, norm, eps, at, SIZE: tl.constexpr):
    """RMSNorm of x (SIZE,) with weight ``norm`` (SIZE,), zeros where ``at`` is beyond the end."""
    tl.debug_barrier()  # or the compiler would wait for x before it asks for the caller's rows of the matrix
    row = tl.load(x + at, mask=at < SIZE, other=0.0).to(tl.float32)
    weight = tl.load(norm + at, mask=at < SIZE, other=0.0).to(tl.float32)
    return (row * tl.rsqrt(tl.sum(row * row, 0) / SIZE + eps) * weight).to(x.dtype.element_ty).to(tl.float32)


@jit
def _norm_product(x, norm, eps, weight, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Row n of ``out = weight norm(x)``. x: (SIZE,). weight: (N, SIZE). out: (N,)."""
    n, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row = tl.load(weight + n * SIZE + at, mask=at < SIZE, other=0.0)  # asked for first: its way is the longest
    product = tl.sum(_normed(x, norm, eps, at, SIZE) * row.to(tl.float32), 0)
    tl.store(out + n, product.to(out.dtype.element_ty))


@jit
def _norm_swiglu(x, norm, eps, weight, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Row n of ``silu(gate) * up``. x: (SIZE,). weight: (2 N, SIZE), rows of gate first. out: (N,)."""
    n, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gate_row = tl.load(weight + n * SIZE + at, mask=at < SIZE, other=0.0)
    up_row = tl.load(weight + (n + tl.num_programs(0)) * SIZE + at, mask=at < SIZE, other=0.0)
    normed = _normed(x, norm, eps, at, SIZE)
    gate = tl.sum(normed * gate_row.to(tl.float32), 0).to(out.dtype.element_ty).to(tl.float32)
    up = tl.sum(normed * up_row.to(tl.float32), 0).to(out.dtype.element_ty).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + n, (silu * up).to(out.dtype.element_ty))


@jit
def _product_add(y, weight, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Row n of ``x += weight y``. y: (SIZE,). weight: (N, SIZE). x: (N,); a program touches only its own number."""
    n = tl.program_id(0).to(tl.int64)
    old, product = tl.load(x + n).to(tl.float32), 0.0
    for first in tl.static_range(0, SIZE, BLOCK):  # written out by the compiler, so all loads may be under way at once
        at = first + tl.arange(0, BLOCK)
        row = tl.load(weight + n * SIZE + at, mask=at < SIZE, other=0.0).to(tl.float32)
        product += row * tl.load(y + at, mask=at < SIZE, other=0.0).to(tl.float32)
    product = tl.sum(product, 0).to(x.dtype.element_ty).to(tl.float32)
    tl.store(x + n, (old + product).to(x.dtype.element_ty))


@jit
def _rotated(head, cos, sin, at, DIM: tl.constexpr):
    """``apply_rope`` for one head (DIM,), cos and sin (DIM,) in float32 -> (DIM,)."""
    value = tl.load(head + at).to(tl.float32)
    partner = tl.load(head + (at + DIM // 2) % DIM).to(tl.float32)
    turned = (value * cos).to(head.dtype.element_ty).to(tl.float32) + partner * sin
    return turned.to(head.dtype.element_ty).to(tl.float32)


@jit
def _attention(qkv, cos, sin, keys, values, position, out, scale, length, HEADS: tl.constexpr, GROUP: tl.constexpr,
               DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One query head, of GROUP that share keys and values. Slots before the token's own are read, its own is written.

    qkv: (Hq + 2 Hk, DIM), not rotated. cos, sin: (length, DIM). keys, values: (Hk, length, DIM). out: (Hq, DIM).
    """
    head, at = tl.program_id(0), tl.arange(0, DIM)
    kv = (head // GROUP).to(tl.int64)
    slot = tl.minimum(tl.load(position), length - 1).to(tl.int32)  # a wrong position must not reach other memory
    c, s = tl.load(cos + slot * DIM + at).to(tl.float32), tl.load(sin + slot * DIM + at).to(tl.float32)
    q = _rotated(qkv + head * DIM, c, s, at, DIM)
    k = _rotated(qkv + (HEADS + kv) * DIM, c, s, at, DIM)
    v = tl.load(qkv + (HEADS + HEADS // GROUP + kv) * DIM + at)
    keys, values = keys + kv * length * DIM, values + kv * length * DIM
    if head % GROUP == 0:  # once for all that share them; nobody reads this slot in this step
        tl.store(keys + slot * DIM + at, k.to(keys.dtype.element_ty))
        tl.store(values + slot * DIM + at, v)
    largest, mixed = tl.sum(q * k, 0) * scale, v.to(tl.float32)  # begin with the token itself: its weight is exp(0)
    total, first = tl.exp(largest - largest), 0
    while first < slot:
        slots = first + tl.arange(0, BLOCK)
        # No mask: the compiler would load row after row. Beyond the text, the last row is read again.
        place = tl.minimum(slots, slot - 1)[:, None] * DIM + at[None, :]  # (BLOCK, DIM)
        k_block, v_block = tl.load(keys + place), tl.load(values + place)
        scores = tl.sum(k_block.to(tl.float32) * q[None, :], 1) * scale  # (BLOCK,)
        scores = tl.where(slots < slot, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        shrink, weights = tl.exp(largest - new_largest), tl.exp(scores - new_largest)
        total = total * shrink + tl.sum(weights, 0)
        mixed = mixed * shrink + tl.sum(weights[:, None] * v_block.to(tl.float32), 0)
        largest, first = new_largest, first + BLOCK
    tl.store(out + head * DIM + at, (mixed / total).to(out.dtype.element_ty))


class FusedStep:
    """Callable for one step: ``step(token, position)``, each int64 (1, 1) on the device -> (1, vocab_size) logits.

    Make it when decoding begins, with a cache for one sequence that the model has filled. It refers to the model's
    weights, writes to the cache, leaves the cache's ``length`` alone and relies on positions below ``max_length``.

    Raises:
        ValueError: anything but a plain decoder and a cache that fits it; no Triton; neither CUDA nor Triton's
            interpreter (``TRITON_INTERPRET=1``, set before the import, runs the kernels on a CPU, for tests).
    """

    def __init__(self, model: Decoder, cache: PreallocatedCache):
        for name, got, expected in _facts(model, cache):
            if got != expected:
                raise ValueError(f"{name}: got {got}, expected {expected}")
        self.model, config, weight = model, model.config, model.embed_tokens.weight
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.keys_values = [layer[:, 0].unbind(0) for layer in cache.buffer]  # (Hk, slots, D) each
        self.rope = model.rope(torch.arange(cache.max_length, device=weight.device).unsqueeze(0), weight.dtype)
        sizes = ((heads + 2 * kv_heads) * dim, heads * dim, config.intermediate_size, config.vocab_size)
        self.qkv, self.y, self.h, self.scores = (weight.new_empty(numbers) for numbers in sizes)
        block = triton.next_power_of_2(config.hidden_size)  # a norm needs the whole row
        self.whole = {"SIZE": config.hidden_size, "BLOCK": block, "num_warps": min(16, max(4, 4 * block // ROW_BLOCK))}
        block = max(1, min(256, 2**15 // dim))  # keys at once; fewer of large heads, so that they fit into registers
        self.attention = {"scale": dim**-0.5, "length": cache.max_length, "HEADS": heads, "GROUP": heads // kv_heads,
                          "DIM": dim, "BLOCK": block, "num_warps": 16}  # fmt: skip

    @torch.no_grad()
    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """(1, vocab_size) logits behind ``token``, for the next step to overwrite. A ValueError for other shapes."""
        for name, given in (("token", token), ("position", position)):
            if given.shape != (1, 1):
                raise ValueError(f"{name}: got shape {tuple(given.shape)}, expected (1, 1)")
        x = F.embedding(token.view(()), self.model.embed_tokens.weight)  # (C,), a copy: the kernels add to it
        for block, (keys, values) in zip(self.model.layers, self.keys_values, strict=True):
            attention, mlp = block.self_attn, block.mlp
            self._norm_rows(_norm_product, x, block.input_layernorm, attention.qkv_proj.weight, self.qkv)
            _attention[(attention.query_heads,)](self.qkv, *self.rope, keys, values, position, self.y, **self.attention)
            self._add_rows(self.y, attention.o_proj.weight, x)
            self._norm_rows(_norm_swiglu, x, block.post_attention_layernorm, mlp.gate_up_proj.weight, self.h)
            self._add_rows(self.h, mlp.down_proj.weight, x)
        self._norm_rows(_norm_product, x, self.model.norm, self.model.lm_head.weight, self.scores)
        return self.scores.unsqueeze(0)

    __call__ = logits

    def _norm_rows(self, kernel, x: Tensor, norm: RMSNorm, weight: Tensor, out: Tensor) -> None:
        kernel[(len(out),)](x, norm.weight, norm.eps, weight, out, **self.whole)

    def _add_rows(self, y: Tensor, weight: Tensor, x: Tensor) -> None:
        _product_add[(len(x),)](y, weight, x, SIZE=len(y), BLOCK=min(ROW_BLOCK, triton.next_power_of_2(len(y))))


def _facts(model: Decoder, cache: PreallocatedCache) -> Iterator[tuple]:
    """(what, as it is, as it has to be), one after the other: later ones need the earlier ones to be right."""
    yield "model", type(model), Decoder
    yield "model", changed(model, (nn.ModuleList, nn.Embedding, nn.Linear, RMSNorm, Block, Attention, SwiGLU)), None
    config, weight = model.config, model.embed_tokens.weight
    yield "sliding_window and qkv_bias of model", (config.sliding_window, config.qkv_bias), (None, False)
    dim, dtypes = config.head_dim, (torch.float32, torch.bfloat16, torch.float16)
    yield "head_dim of model", dim, "a power of two" if dim & (dim - 1) else dim
    yield "dtype of model", weight.dtype, weight.dtype if weight.dtype in dtypes else dtypes
    yield "cache", type(cache), PreallocatedCache
    yield "window and batch_size of cache", (cache.window, cache.batch_size), (None, 1)
    shape = (config.num_hidden_layers, 2, 1, config.num_key_value_heads, cache.max_length, dim)
    yield "shape of cache", tuple(cache.buffer.shape), shape
    places = {(part.dtype, part.device, part.is_contiguous()) for part in (*model.parameters(), cache.buffer)}
    yield "formats, devices and rows in order", places, {(weight.dtype, weight.device, True)}
    yield "triton", "missing" if triton is None else "installed", "installed"
    yield "device of model", weight.device.type, weight.device.type if INTERPRETED else "cuda"
