"""Gated cross-attention: the blocks by which a text model looks at pictures.

Between the layers of a text model stand blocks in which every token asks the image features. What they answer passes a
gate that begins at zero, so that the model begins as the text model it was, bit for bit.

Shapes: B batch, T tokens, N image features of size C, Hq and Hk heads of size D.

Book: ``chapters/architecture/fusion.ipynb``. Source: Flamingo (arXiv 2204.14198, section 2.2); the same blocks stand in
IDEFICS and Llama 3.2 Vision, to which ``tests/parity/test_fusion.py`` compares them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import KVCache, Step
from dslib.architecture.layers import Block, RMSNorm, SwiGLU


class Gate(nn.Module):
    """How much of a branch is let through: ``tanh`` of something that starts at zero, in [-1, 1].

    Args:
        kind: ``"scalar"``, one learned number (Flamingo), or ``"token"``, computed from each token's state (the dynamic
            weights of the article).
    """

    def __init__(self, kind: str, hidden_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        # Zero weights give a zero gate but no zero gradient: it is the branch, not the weight, that they multiply.
        self.weight = nn.Parameter(torch.zeros(hidden_size)) if kind == "token" else None

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, hidden_size), normed -> (B, T, 1), or a scalar that is the same for all tokens."""
        if self.weight is None:
            return torch.tanh(self.bias)
        return torch.tanh(h @ self.weight + self.bias).unsqueeze(-1)


class GatedCrossAttention(nn.Module):
    """Tokens ask, image features answer, a gate decides how much of the answer counts (Flamingo, section 2.2).

    ``x + gate * attention(norm(x), features)``, then, if wanted, the same with a feed-forward network. Positions play
    no role here: those of the picture have to be in its features. Made from a ``FusionConfig``.
    """

    def __init__(self, config):
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.query_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.q_proj = nn.Linear(size, self.query_heads * self.head_dim, bias=False)
        self.kv_proj = nn.Linear(config.image_hidden_size, 2 * self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.query_heads * self.head_dim, size, bias=False)
        self.gate = Gate(config.gate, size)
        self.mlp = None
        if config.cross_intermediate_size:
            self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)
            self.mlp = SwiGLU(size, config.cross_intermediate_size)
            self.mlp_gate = Gate(config.gate, size)

    def keys_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> keys and values (B, Hk, N, D): all that a picture means to this block."""
        kv = self.kv_proj(features).unflatten(-1, (2, self.kv_heads, self.head_dim))  # (B, N, 2, Hk, D)
        k, v = kv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return k, v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """(B, T, hidden_size) -> the same.

        Args:
            keys_values: from :meth:`keys_values`.
            mask: bool (B, N), which features are real, or (B, T, N), which of them each token may see. A token that
                sees none is left exactly as it was.
        """
        seen = None if mask is None else (mask if mask.ndim == 3 else mask.unsqueeze(1)).any(-1, keepdim=True)
        answer, gate = self.answer(x, keys_values, mask)
        x = x + gate * (answer if seen is None else answer.where(seen, 0.0))  # seen: (B, 1 or T, 1)
        if self.mlp is not None:
            h = self.post_attention_layernorm(x)
            more = self.mlp_gate(h) * self.mlp(h)
            x = x + (more if seen is None else more.where(seen, 0.0))
        return x

    def answer(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What attention returns, (B, T, hidden_size), and the gate before it, (B, T, 1) or a scalar."""
        h = self.input_layernorm(x)
        q = self.q_proj(h).unflatten(-1, (self.query_heads, self.head_dim)).transpose(1, 2)  # (B, Hq, T, D)
        if mask is not None:
            mask = mask if mask.ndim == 3 else mask.unsqueeze(1)  # (B, 1 or T, N)
            # A token without a picture looks at everything, as softmax needs something; `forward` drops the result.
            mask = (mask | ~mask.any(-1, keepdim=True)).unsqueeze(1)  # (B, 1, 1 or T, N)
        y = F.scaled_dot_product_attention(
            q, *keys_values, attn_mask=mask, enable_gqa=self.query_heads != self.kv_heads
        )
        return self.o_proj(y.transpose(1, 2).flatten(2)), self.gate(h)


@dataclass(frozen=True)
class ImageContext:
    """What a model has seen: computed once by ``encode_image``, and used for every token.

    Attributes:
        keys_values: for cross-attention, keys and values of every block, each (B, Hk, N, D).
        tokens: for the projector, (B, N, hidden_size).
        mask: bool, None if all features are real and seen by all tokens; (B, N), True for real ones; or (B, T, N), True
            for what the token at each position may see. Later tokens see what the last one does.
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...] = ()
    tokens: Tensor | None = None
    mask: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return len(self.tokens if self.tokens is not None else self.keys_values[0][0])

    @property
    def prefix(self) -> int:
        """Positions that the picture takes in the text model's own sequence: N for a projector, 0 otherwise."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    def enters(self, cache: KVCache | None) -> bool:
        """Whether the picture's own tokens stand before the text of this call: at the first one, with a projector.

        Raises:
            ValueError: a cache that holds tokens, but not those of this picture.
        """
        if self.prefix == 0 or cache is None or cache.length == 0:
            return self.prefix > 0
        held = getattr(cache, "picture", None)  # where a model notes what it has put there
        if cache.length < self.prefix or not _equal(held, self.tokens):
            raise ValueError(
                f"image: the cache holds {cache.length} tokens that do not begin with this picture's {self.prefix}; "
                "a projector's picture has to be handed over at the first call, when the cache is empty"
            )
        return False

    def mask_at(self, positions: Tensor) -> Tensor | None:
        """The mask for tokens at these positions, int64 (1 or B, T), as blocks take it: (B, N) or (B, T, N)."""
        if self.mask is None or self.mask.ndim == 2:
            return self.mask
        rows = torch.arange(len(self.mask), device=positions.device).unsqueeze(1)
        return self.mask[rows, positions.clamp(max=self.mask.shape[1] - 1)]

    @property
    def nbytes(self) -> int:
        """Bytes kept, counted from the tensors."""
        kept = [t for pair in self.keys_values for t in pair] + ([] if self.tokens is None else [self.tokens])
        return sum(t.numel() * t.element_size() for t in kept)


def _equal(held: Tensor | None, tokens: Tensor) -> bool:
    if held is None or held.is_set_to(tokens):  # the same memory
        return held is not None
    return held.shape == tokens.shape and bool((held.to(tokens) == tokens).all())


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless bool of this shape, (B,) or (B, N), or with a row for each token, (B, T, N)."""
    batch, things = (*shape, 1)[:2]
    by_token = mask.ndim == 3 and mask.shape[1] > 0 and mask.shape[::2] == (batch, things)
    if mask.dtype is not torch.bool or not (by_token or mask.shape == shape):
        expected = f"bool {tuple(shape)}, or ({batch}, tokens, {things}) for tokens that see different ones"
        raise ValueError(f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, expected {expected}")


@dataclass
class SeeingStep(Step):
    """A step that knows what the model has seen, and which of it these tokens may see."""

    image: ImageContext | None = None
    image_mask: Tensor | None = None


class SeeingBlock(Block):
    """A block of the text model that first looks at the picture, if there is one: ``cross``, the ``number``-th such."""

    cross: GatedCrossAttention
    number: int

    def forward(self, x: Tensor, rope, step: Step, cache: KVCache | None, layer: int, input_ids: Tensor | None = None):
        image = getattr(step, "image", None)
        if image is not None and image.keys_values:
            x = self.cross(x, image.keys_values[self.number], step.image_mask)
        return super().forward(x, rope, step, cache, layer, input_ids)


def initialise_by_width(module: nn.Module) -> None:
    """Fresh weights for one linear map: normal, with such a deviation that outputs are as large as inputs.

    The 0.02 of the text model is made for widths of thousands. In a narrow model it would leave the answers, and with
    them the gradient of a gate that is still shut, too small to learn from.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
