"""V2: a text decoder that can look at pictures, in the two ways that exist.

* *Gated cross-attention* (the article's V2; Flamingo's design): between the layers of the text model stand blocks in
  which every token asks the image features. What they answer passes a gate that begins at zero, so that the model
  begins as the text model it was, bit for bit.
* *Projector* (what DeepSeek-VL, VL2 and Janus do; LLaVA's design): a small MLP turns image features into vectors of the
  token space, which simply stand before the text.

Both sit behind one interface: ``image = model.encode_image(pixels)`` once, then ``model(input_ids, cache,
image=image)``. Shapes: B batch, T tokens, N image features of size C, Hq and Hk heads of size D.

Book: ``chapters/architecture/fusion.ipynb``, with :mod:`~dslib.architecture.vision` and
:mod:`~dslib.architecture.cross_attention`. Sources: Flamingo (arXiv
2204.14198, section 2.2), LLaVA-1.5 (arXiv 2310.03744) for the two-layer projector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dslib.architecture.cache import KVCache
from dslib.architecture.cross_attention import GatedCrossAttention, initialise_by_width
from dslib.architecture.decoder import Decoder, DecoderConfig
from dslib.architecture.vision import SwinStream, check_pixels
from dslib.fast.linear import Linear


@dataclass(frozen=True)
class FusionConfig(DecoderConfig):
    """A decoder's shape and how it sees.

    Attributes:
        fusion: ``"cross"`` or ``"projector"``.
        image_hidden_size: C, size of the image stream's features.
        gate: ``"scalar"``, one learned number a block (Flamingo), or ``"token"``, computed from each token's state
            (the "dynamic weights" of the article).
        cross_attention_every: a block stands before the first of every so many layers.
        cross_intermediate_size: inner size of the block's own gated feed-forward network; 0 for none (Flamingo has it).
        swin: config of the image stream, see :class:`~dslib.architecture.vision.SwinStream`; None is the tiny one. Not
            used when an image stream is handed over.
    """

    fusion: str = "cross"
    image_hidden_size: int = 64
    gate: str = "scalar"
    cross_attention_every: int = 1
    cross_intermediate_size: int = 0
    swin: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("fusion", ("cross", "projector")), ("gate", ("scalar", "token"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {choices[0]!r} or {choices[1]!r}")
        for name, least in (("image_hidden_size", 1), ("cross_attention_every", 1), ("cross_intermediate_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")

    def model(self, vision: nn.Module | None = None) -> "VisionLanguageDecoder":
        """A model of this shape; an image stream may be handed over, see :class:`VisionLanguageDecoder`."""
        return VisionLanguageDecoder(self, vision)


@dataclass(frozen=True)
class ImageContext:
    """What a model has seen: computed once by ``encode_image``, and used for every token.

    Attributes:
        keys_values: for cross-attention, keys and values of every block, each (B, Hk, N, D).
        tokens: for the projector, (B, N, hidden_size).
        mask: bool (B, N), True for real features; None if all are.
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

    @property
    def nbytes(self) -> int:
        """Bytes kept, counted from the tensors."""
        kept = [t for pair in self.keys_values for t in pair] + ([] if self.tokens is None else [self.tokens])
        return sum(t.numel() * t.element_size() for t in kept)


class VisionLanguageDecoder(Decoder):
    """The V1 decoder with an image stream. Without a picture it is the text model, exactly.

    The text model's weights have the names that they have in :class:`Decoder`; beside them are ``vision`` and ``cross``
    or ``projector``.

    Args:
        vision: image stream, (B, 3, H, W) -> (B, N, ``image_hidden_size``); None builds the Swin of ``config.swin``.

    Raises:
        ValueError: an image stream whose ``hidden_size`` is not ``image_hidden_size``.

    Example:
        >>> model = build(FusionConfig(256, 128, 352, 4, 4, 2))
        >>> image = model.encode_image(torch.randn(1, 3, 64, 64))
        >>> model(torch.zeros(1, 5, dtype=torch.long), image=image).shape
        torch.Size([1, 5, 256])
    """

    def __init__(self, config: FusionConfig, vision: nn.Module | None = None):
        super().__init__(config)
        self.vision = SwinStream(config.swin) if vision is None else vision
        if self.vision.hidden_size != config.image_hidden_size:
            raise ValueError(
                f"vision: gives features of size {self.vision.hidden_size}, "
                f"but image_hidden_size={config.image_hidden_size}"
            )
        if config.fusion == "cross":
            at = range(0, config.num_hidden_layers, config.cross_attention_every)
            self.cross = nn.ModuleDict({str(layer): GatedCrossAttention(config) for layer in at})
            self.cross.apply(initialise_by_width)
        else:
            self.projector = nn.Sequential(
                Linear(config.image_hidden_size, config.hidden_size), nn.GELU(),
                Linear(config.hidden_size, config.hidden_size),
            )  # fmt: skip
            self.projector.apply(initialise_by_width)

    @classmethod
    def from_text(cls, text: Decoder, vision: nn.Module, **fusion) -> "VisionLanguageDecoder":
        """Give a text model eyes: its weights, shared and not copied, and new blocks of its dtype and device.

        Args:
            fusion: fields of :class:`FusionConfig` that a text model has not, such as ``cross_attention_every=4``.
        """
        fields = {name: getattr(text.config, name) for name in text.config.__dataclass_fields__}
        model = cls(FusionConfig(**fields, image_hidden_size=vision.hidden_size, **fusion), vision)
        weight = text.embed_tokens.weight
        for part in (model.cross if model.config.fusion == "cross" else model.projector, model.vision):
            part.to(weight)
        for name in ("embed_tokens", "layers", "norm", "lm_head"):
            setattr(model, name, getattr(text, name))
        return model.train(text.training)

    def encode_image(self, pixels: Tensor, mask: Tensor | None = None) -> ImageContext:
        """Run the image stream and keep what the text model needs of it.

        Args:
            pixels: float (B, 3, H, W), normalised as the image stream wants; or several pictures or tiles for each
                sequence, (B, K, 3, H, W).
            mask: bool (B,) or (B, K), False where there is no picture, so that one batch can hold texts with and
                without; only for cross-attention.

        Raises:
            ValueError: pixels or mask of another shape; pixels that are not finite.
        """
        several = pixels.ndim == 5
        flat = pixels.flatten(0, 1) if several else pixels
        check_pixels(flat)
        if broken := (~flat.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
            raise ValueError(
                f"pixels: NaN or infinite in {len(broken)} of {len(flat)} pictures, first in number {broken[0]}"
            )
        features = self.vision(flat)  # (B K, N, C)
        if several:
            features = features.unflatten(0, pixels.shape[:2]).flatten(1, 2)  # (B, K N, C)
        if mask is not None:
            if mask.dtype is not torch.bool or mask.shape != pixels.shape[: 1 + several]:
                expected = tuple(pixels.shape[: 1 + several])
                raise ValueError(f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, expected bool {expected}")
            pictures = mask if several else mask.unsqueeze(1)
            mask = pictures.repeat_interleave(features.shape[1] // pictures.shape[1], dim=1)
        return self.image_context(features, mask)

    def image_context(self, features: Tensor, mask: Tensor | None = None) -> ImageContext:
        """As :meth:`encode_image`, from features that an image stream has made: (B, N, C), and a bool mask (B, N).

        Raises:
            ValueError: features of another size; a mask for a projector, whose tokens cannot be left out of a batch.
        """
        if features.ndim != 3 or features.shape[-1] != self.config.image_hidden_size or not features.numel():
            wanted = f"(batch, features, {self.config.image_hidden_size})"
            raise ValueError(f"features: got shape {tuple(features.shape)}, expected {wanted}")
        if self.config.fusion == "cross":
            return ImageContext(tuple(block.keys_values(features) for block in self.cross.values()), mask=mask)
        if mask is not None and not mask.all():
            raise ValueError("mask: a projector puts image tokens into the sequence; every sequence needs as many")
        return ImageContext(tokens=self.projector(features))

    def hidden_states(self, input_ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
                      image: ImageContext | None = None) -> Tensor:  # fmt: skip
        """(B, T) token ids -> (B, T, hidden_size); as for :class:`Decoder`, with what ``encode_image`` returned.

        With a cache, hand ``image`` over at every call. A projector's tokens enter at the first one, when the cache is
        empty, and need room for ``image.prefix`` more positions; ``positions`` count text tokens only.

        Raises:
            ValueError: an image made for another number of sequences or another kind of model.
        """
        if image is None:
            return super().hidden_states(input_ids, cache, positions)
        if (image.tokens is None) != (self.config.fusion == "cross"):
            raise ValueError(f"image: made by another kind of model, this one has fusion={self.config.fusion!r}")
        if image.batch_size != len(input_ids):
            raise ValueError(f"image: made for {image.batch_size} sequences, input_ids has {len(input_ids)}")
        if image.tokens is None:
            x, step, rope = self.begin(input_ids, cache, positions)
        else:
            positions = None if positions is None else positions + image.prefix
            x = self.embed(input_ids)
            if cache is None or cache.length == 0:
                x = torch.cat((image.tokens.to(x.dtype), x), dim=1)  # (B, N + T, hidden_size)
                if positions is not None:
                    before = torch.arange(image.prefix, device=x.device).expand(len(x), -1)
                    positions = torch.cat((before, positions), dim=1)
            step, rope = self.prepare(x, cache, positions)
        seen = dict(zip(self.cross, image.keys_values, strict=True)) if image.tokens is None else {}
        for index, layer in enumerate(self.layers):
            if (keys_values := seen.get(str(index))) is not None:
                x = self.cross[str(index)](x, keys_values, image.mask)
            x = layer(x, rope, step, cache, index, input_ids)
        return self.norm(x[:, -input_ids.shape[1] :])

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
                image: ImageContext | None = None) -> Tensor:  # fmt: skip
        """(B, T) token ids -> (B, T, vocab_size) logits; arguments as in :meth:`hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, cache, positions, image))

    @torch.no_grad()
    def openings(self, input_ids: Tensor, image: ImageContext) -> tuple[Tensor, Tensor]:
        """How far every gate opens for every token, and how much that changes it: two (blocks, B, T) tensors.

        The second is the size of what passes the gate as a share of the token's state: a wide gate before a small
        answer changes little.

        Raises:
            ValueError: the model has no gates.
        """
        if self.config.fusion != "cross":
            raise ValueError("fusion: got 'projector', which has no gates; expected a model with cross-attention")
        gates, shares = [], []

        def note(block, args, output):
            answer, gate = block.answer(*args)
            gate = gate.expand(*args[0].shape[:2], 1)
            gates.append(gate.squeeze(-1))
            shares.append((gate * answer).norm(dim=-1) / args[0].norm(dim=-1))

        hooks = [block.register_forward_hook(note) for block in self.cross.values()]
        try:
            self.hidden_states(input_ids, image=image)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(gates), torch.stack(shares)
