"""One token of one sequence on a CPU: the decoder's forward pass with everything but the arithmetic taken away.

Decoding a small model on a CPU spends a third of its time outside the matrix products: dozens of tiny operations a
layer, and the module calls around them, each running with caches that the weights have just swept clean.
:class:`TokenStep` computes what :class:`~dslib.architecture.decoder.Decoder` computes with about half the operations.
What it leaves out:

* module calls: the loop runs over plain tensors, collected once;
* residual additions: ``baddbmm`` (or ``addmm``) adds while it multiplies;
* the copies of key and value: both are written to the cache by one copy, as they lie side by side in the projection;
* most of the norm: ``x / hypot(|x|, sqrt(C eps))`` times ``sqrt(C) weight`` is RMSNorm in four operations.

The weights are those of the model, not copies; those of four bits (:mod:`dslib.architecture.int4_layers`) go to their
own kernel, in the same loop. ``tests/fast/test_token_step.py`` holds it to the decoder.

Book: ``chapters/architecture/decoder.ipynb``, section "Where the time goes".
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import KVCache
from dslib.architecture.cross_attention import Gate, GatedCrossAttention
from dslib.architecture.decoder import Decoder
from dslib.architecture.fusion import ImageContext, VisionLanguageDecoder
from dslib.architecture.int4_layers import Int4Linear
from dslib.architecture.layers import Attention, Block, RMSNorm, SwiGLU, rope_angles
from dslib.architecture.sparse_decoder import SparseBlock, SparseDecoder
from dslib.fast.exact import all_exactly
from dslib.fast.linear import Linear, cut_rows, one_row_linear, row_chunks

Matrix = Tensor | Callable[[Tensor], Tensor]  # something to multiply a row by, or what does it


KINDS = (  # a SparseDecoder has such blocks where its first layers are dense
    Decoder, SparseDecoder, VisionLanguageDecoder, nn.ModuleList, nn.ModuleDict, nn.Embedding, nn.Linear, Linear,
    Int4Linear, RMSNorm, Block, SparseBlock, Attention, SwiGLU, GatedCrossAttention, Gate,
)  # fmt: skip


class TokenStep:
    """Callable that extends one sequence by one token: ``step(token_id, cache)`` -> (1, vocab_size) logits.

    Make it when decoding begins and drop it when it ends: it keeps views of the model's weights.

    Args:
        image: what a vision-language model has seen, for one sequence; its cached keys and values are what every new
            token looks at. (A projector's picture is in the cache of the text already.)

    Raises:
        ValueError: the model is not on a CPU (elsewhere, kernel launches and not Python set the pace), or it has other
            blocks than V1's, see :meth:`fits`.
    """

    @staticmethod
    def fits(model: Decoder) -> bool:
        """Whether every module that the loop below stands for is of the known kind, unchanged and without hooks.

        Blocks have plain attention and a dense feed-forward network. Weights of four bits need their kernel, too.
        """
        like = model.embed_tokens.weight
        if any(module.why_slow(like) for module in model.modules() if isinstance(module, Int4Linear)):
            return False
        return all_exactly(model, KINDS, biased=("qkv_proj", "gate", "mlp_gate"), skip=("vision", "projector"))

    def __init__(self, model: Decoder, image: ImageContext | None = None):
        weight = model.embed_tokens.weight
        if weight.device.type != "cpu":
            raise ValueError(f"model: on device {weight.device}, expected cpu")
        if not self.fits(model):
            raise ValueError(
                f"model: got a {type(model).__name__}, expected only blocks of Attention and SwiGLU, unchanged"
            )
        self.config, self.dtype, self.embedding = model.config, weight.dtype, weight
        config = model.config
        size, heads = config.hidden_size, config.num_attention_heads + 2 * config.num_key_value_heads
        # A float32 row runs on one thread unless the rows of W are cut into a batch, see linear.py. Other dtypes have
        # a threaded kernel of their own.
        rows = (heads * config.head_dim, size, 2 * config.intermediate_size, config.vocab_size)
        rows += (2 * getattr(config, "cross_intermediate_size", 0),)
        int4 = any(isinstance(module, Int4Linear) for module in model.modules())
        split = self.dtype is torch.float32 and getattr(model.lm_head, "split_rows", False)
        self.chunks = row_chunks(*rows) if split and not int4 else 1
        self.product, self.add_product = (torch.mm, torch.addmm) if self.chunks == 1 else (torch.bmm, torch.baddbmm)
        if int4:  # then every matrix is a function
            self.product, self.add_product = _product, _add_product
        self.functions = int4
        # The one row, and with chunks one copy of it for each: (1, size) or (chunks, 1, size).
        self.lead = (1,) if self.chunks == 1 else (self.chunks, 1)
        self.eps = torch.tensor(math.sqrt(size * config.rms_norm_eps))
        self.layers = [
            (
                self._norm(layer.input_layernorm.weight),
                self._matrix(layer.self_attn.qkv_proj),
                self._bias(layer.self_attn.qkv_proj.bias),
                self._matrix(layer.self_attn.o_proj),
                self._norm(layer.post_attention_layernorm.weight),
                self._matrix(layer.mlp.gate_up_proj),
                self._matrix(layer.mlp.down_proj),
            )
            for layer in model.layers
        ]
        self.looks = self._looks(model, image)
        self.last_norm, self.head = self._norm(model.norm.weight), self._matrix(model.lm_head)

    def _matrix(self, linear: nn.Linear | Int4Linear) -> Matrix:
        """(out, in) -> a view (in, out), or with chunks (chunks, in, out / chunks), or a function of the row."""
        if isinstance(linear, Int4Linear):
            return linear.row_product(self.dtype)
        weight = linear.weight.detach()
        if self.functions:
            return lambda row: one_row_linear(row, weight) if row.dtype is torch.float32 else F.linear(row, weight)
        return weight.t() if self.chunks == 1 else cut_rows(weight, self.chunks)

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.detach().view(*self.lead, -1)

    def _norm(self, weight: Tensor) -> Tensor:
        scaled = weight.detach().float() * math.sqrt(weight.numel())
        return scaled.expand(*self.lead, -1)  # so that the product comes out once per chunk of the next matrix

    def _looks(self, model: Decoder, image: ImageContext | None) -> list[tuple | None]:
        """For every layer what its cross-attention needs, or None."""
        looks = [None] * len(model.layers)
        if image is None or not image.keys_values:
            return looks
        if image.batch_size != 1:
            raise ValueError(f"image: made for {image.batch_size} sequences, expected one")
        real = slice(None) if image.mask is None else image.mask[0]
        if image.mask is not None and not real.any():
            return looks
        for (layer, block), (k, v) in zip(model.cross.items(), image.keys_values, strict=True):
            mlp = None
            if block.mlp is not None:
                weights = (self._matrix(w) for w in (block.mlp.gate_up_proj, block.mlp.down_proj))
                mlp = (self._norm(block.post_attention_layernorm.weight), *weights, _opening(block.mlp_gate))
            looks[int(layer)] = (
                self._norm(block.input_layernorm.weight), self._matrix(block.q_proj),
                self._matrix(block.o_proj), _opening(block.gate), k[:, :, real], v[:, :, real], mlp,
            )  # fmt: skip
        return looks

    def _look(self, x: Tensor, h: Tensor, look: tuple) -> Tensor:
        """One gated cross-attention block; ``h`` is room for the normed row. The gate scales the last product."""
        norm, w_q, w_o, opening, k, v, mlp = look
        size, lead = self.config.hidden_size, self.lead
        product, add_product = self.product, self.add_product
        self._normed(x.view(1, size), norm, h)
        q = product(h, w_q).view(1, k.shape[1], -1, k.shape[3])
        y = F.scaled_dot_product_attention(q, k, v)
        x = add_product(x, y.view(1, -1).expand(*lead, -1), w_o, alpha=opening(h))
        if mlp is None:
            return x
        norm, w_gate_up, w_down, opening = mlp
        self._normed(x.view(1, size), norm, h)
        gate, up = product(h, w_gate_up).view(2, -1).unbind(0)
        return add_product(x, F.silu(gate).mul_(up).expand(*lead, -1), w_down, alpha=opening(h))

    def _normed(self, row: Tensor, weight: Tensor, out: Tensor) -> None:
        torch.div(
            torch.mul(row, weight), torch.hypot(torch.linalg.vector_norm(row, dtype=torch.float32), self.eps), out=out
        )

    def __call__(self, token: int, cache: KVCache) -> Tensor:
        """Append ``token`` to ``cache`` (at the cache's one position) and return the logits that follow it.

        Raises:
            ValueError: the cache is full, or made for several sequences.
            IndexError: a token id outside the vocabulary.
        """
        if not 0 <= token < self.config.vocab_size:
            raise IndexError(f"token: got {token}, expected 0 to {self.config.vocab_size - 1}")
        if cache.batch_size not in (None, 1):
            raise ValueError(f"cache: made for {cache.batch_size} sequences, expected one")
        config, lead, dtype = self.config, self.lead, self.dtype
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        size, inner = config.hidden_size, config.intermediate_size
        # Looked up once: the loop below runs them thirty times over.
        norm, hypot, mul, div, float32 = torch.linalg.vector_norm, torch.hypot, torch.mul, torch.div, torch.float32
        attention, eps = F.scaled_dot_product_attention, self.eps
        product, add_product = self.product, self.add_product

        position = torch.tensor([[cache.length]])
        cos, sin = rope_angles(position, dim, config.rope_theta, config.rope_scaling, dtype)
        # Values are not rotated: for their heads, the cosine is one and the sine zero.
        turn = (heads + kv_heads, dim)
        cos = torch.cat((cos.view(1, dim).expand(turn), cos.new_ones(kv_heads, dim)))  # (Hq + 2 Hk, D)
        sin = torch.cat((sin.view(1, dim).expand(turn), sin.new_zeros(kv_heads, dim)))
        slots, keys, values = cache.append()

        with torch.inference_mode():
            h = torch.empty(*lead, size, dtype=dtype)
            x = self.embedding[token].view(*lead, -1)  # (1, C) or (chunks, 1, C / chunks): one row, cut up
            for (n1, w_qkv, b_qkv, w_o, n2, w_gate_up, w_down), look, slot, k, v in zip(
                self.layers, self.looks, slots, keys, values, strict=True
            ):
                if look is not None:
                    x = self._look(x, h, look)
                row = x.view(1, size)
                div(mul(row, n1), hypot(norm(row, dtype=float32), eps), out=h)
                qkv = product(h, w_qkv) if b_qkv is None else add_product(b_qkv, h, w_qkv)
                qkv = qkv.view(-1, dim)  # (Hq + 2 Hk, D)
                qkv = torch.addcmul(qkv * cos, qkv.roll(dim // 2, -1), sin)
                q, kv = qkv.split_with_sizes((heads, 2 * kv_heads))
                slot.copy_(kv.view(2, 1, kv_heads, dim))
                y = attention(q.view(1, kv_heads, -1, dim), k, v)  # query heads of a group as rows
                x = add_product(x, y.view(1, -1).expand(*lead, -1), w_o)
                row = x.view(1, size)
                div(mul(row, n2), hypot(norm(row, dtype=float32), eps), out=h)
                gate, up = product(h, w_gate_up).view(2, inner).unbind(0)
                x = add_product(x, F.silu(gate).mul_(up).expand(*lead, inner), w_down)
            row = x.view(1, size)
            div(mul(row, self.last_norm), hypot(norm(row, dtype=float32), eps), out=h)
            return product(h, self.head).view(1, -1)


def _product(row: Tensor, matrix: Callable[[Tensor], Tensor]) -> Tensor:
    return matrix(row)


def _add_product(x: Tensor, row: Tensor, matrix: Callable[[Tensor], Tensor], alpha: float = 1.0) -> Tensor:
    return torch.add(x, matrix(row), alpha=alpha)


def _opening(gate: Gate) -> Callable[[Tensor], float]:
    """``opening(h)`` -> how far the gate opens for the one normed row of ``h`` (which may hold copies of it)."""
    if gate.weight is None:
        fixed = torch.tanh(gate.bias.detach()).item()
        return lambda h: fixed
    weight, bias = gate.weight.detach(), gate.bias.detach()
    return lambda h: torch.tanh(h.view(-1, len(weight))[0] @ weight + bias).item()
