"""V2: a text decoder that can look at pictures, in the two ways that exist.

* *Gated cross-attention* (the article's V2; Flamingo's design): between the layers of the text model stand blocks in
  which every token asks the image features, behind a gate that begins at zero.
* *Projector* (what DeepSeek-VL, VL2 and Janus do; LLaVA's design): a small MLP turns image features into vectors of the
  token space, which simply stand before the text.

Both sit behind one interface: ``image = model.encode_image(pixels)`` once, then ``model(input_ids, cache,
image=image)``. Shapes: B batch, T tokens, N image features of size C.

Book: ``chapters/architecture/fusion.ipynb``, with :mod:`~dslib.architecture.vision`. Sources: Flamingo (arXiv
2204.14198, section 2.2), LLaVA-1.5 (arXiv 2310.03744) for the two-layer projector.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import KVCache
from dslib.architecture.config import DecoderConfig
from dslib.architecture.decoder import MODELS, Decoder
from dslib.architecture.layers import Attention, Block, SwiGLU
from dslib.architecture.vision.cross_attention import (
    GatedCrossAttention,
    ImageContext,
    SeeingBlock,
    SeeingStep,
    check_mask,
    initialise_by_width,
)
from dslib.architecture.vision.swin import SwinStream, check_pixels
from dslib.check import one_of, whole
from dslib.exact import unlike


class VisionLanguageDecoder(Decoder):
    """The V1 decoder with an image stream. Without a picture it is the text model, exactly.

    Weights of the text model have their names in :class:`Decoder`; besides, ``vision``, and ``projector`` or ``cross``.

    Args:
        vision: image stream, (B, 3, H, W) -> (B, N, ``image_hidden_size``); None builds the Swin of ``config.swin``.
            A ValueError if its ``hidden_size`` is another.

    Example:
        >>> model = build(FusionConfig(256, 128, 352, 4, 4, 2))
        >>> image = model.encode_image(torch.randn(1, 3, 64, 64))
        >>> model(torch.zeros(1, 5, dtype=torch.long), image=image).shape
        torch.Size([1, 5, 256])
    """

    def place(self, x: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
              image: ImageContext | None = None, attention_mask: Tensor | None = None):  # fmt: skip
        """As :meth:`Decoder.place`; a projector's picture stands before the text, the other kind goes with the step."""
        if image is None:
            if cache is not None and cache.length == 0:
                cache.picture = None
            return super().place(x, cache, positions, attention_mask)
        if (image.tokens is None) != (self.config.fusion == "cross"):
            raise ValueError(f"image: made by another kind of model, this one has fusion={self.config.fusion!r}")
        if image.batch_size != len(x):
            raise ValueError(f"image: made for {image.batch_size} sequences, input_ids has {len(x)}")
        positions = None if positions is None else positions + image.prefix
        enters = image.enters(cache)
        if enters:
            x = torch.cat((image.tokens.to(x.dtype), x), dim=1)  # (B, N + T, hidden_size)
            if positions is not None:
                before = torch.arange(image.prefix, device=x.device).expand(len(x), -1)
                positions = torch.cat((before, positions), dim=1)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (image.prefix, 0), value=1)
        x, step, rope = super().place(x, cache, positions, attention_mask)
        if enters and cache is not None:
            cache.picture = image.tokens.detach()  # a cache can be copied, a part of a graph cannot
        return x, SeeingStep(**vars(step), image=image, image_mask=image.mask_at(step.positions)), rope

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
        logits_at: Tensor | None = None, image: ImageContext | None = None, **seen,
    ) -> Tensor:  # fmt: skip
        """(B, T) token ids -> (B, T, vocab_size) logits; as for :class:`Decoder`, with what ``encode_image`` returned.

        With a cache, hand ``image`` over at every call. A projector's tokens enter at the first one, when the cache is
        empty, and need room for ``image.prefix`` more positions; ``positions`` and ``attention_mask`` are of text only.

        Raises:
            ValueError: an image made for another number of sequences or another kind of model; a projector's image
                that comes when the cache already holds something else.
        """
        if image is not None and image.enters(cache):  # nobody wants the logits of the picture's own tokens
            text = torch.arange(input_ids.shape[-1], device=input_ids.device).expand(len(input_ids), -1)
            logits_at = (text if logits_at is None else logits_at) + image.prefix
        return super().forward(input_ids, cache, positions, logits_at, image=image, **seen)

    def __init__(self, config: "FusionConfig", vision: nn.Module | None = None):
        super().__init__(config)
        self.vision = SwinStream(config.swin) if vision is None else vision
        size, hidden = config.image_hidden_size, config.hidden_size
        if (given := self.vision.hidden_size) != size:
            raise ValueError(f"vision: gives features of size {given}, but image_hidden_size={size}")
        if config.fusion == "cross":
            for number, block in enumerate(self.seeing()):
                block.number, block.cross = number, GatedCrossAttention(config)
            for block in self.seeing():
                block.cross.apply(initialise_by_width)
        else:
            self.projector = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            self.projector.apply(initialise_by_width)

    def make_block(self, layer: int) -> Block:
        config = self.config
        sees = config.fusion == "cross" and layer % config.cross_attention_every == 0
        parts = Attention(config), SwiGLU(config.hidden_size, config.intermediate_size)
        return (SeeingBlock if sees else Block)(config, *parts)

    def seeing(self) -> list[SeeingBlock]:
        """The blocks that look, in order."""
        return [block for block in self.layers if isinstance(block, SeeingBlock)]

    @classmethod
    def from_text(cls, text: Decoder, vision: nn.Module, **fusion) -> "VisionLanguageDecoder":
        """Give a text model eyes: its weights, shared and not copied, and new blocks of its dtype and device.

        Args:
            fusion: fields of :class:`FusionConfig` that a text model has not, such as ``cross_attention_every=4``.

        Raises:
            ValueError: a text model with other blocks than V1's where one has to look.
        """
        if type(text) is not Decoder:
            raise ValueError(f"text: got a {type(text).__name__}, expected a Decoder")
        fields = {name: getattr(text.config, name) for name in text.config.__dataclass_fields__}
        model = cls(FusionConfig(**fields, image_hidden_size=vision.hidden_size, **fusion), vision)
        for part in set(model.modules()) - set(vision.modules()):  # what is given keeps its own mode
            part.training = text.training
        for index, (block, theirs) in enumerate(zip(model.layers, text.layers, strict=True)):
            if not isinstance(block, SeeingBlock):
                model.layers[index] = theirs
                continue
            if (reason := unlike(theirs, (Block,))) is not None:
                raise ValueError(f"text: layer {index} {reason}, expected a plain Block")
            for name, part in theirs.named_children():
                setattr(block, name, part)
        eyes = [block.cross for block in model.seeing()] or [model.projector]
        for part in (*eyes, model.vision):
            part.to(text.embed_tokens.weight)
        for name in ("embed_tokens", "norm", "lm_head"):
            setattr(model, name, getattr(text, name))
        return model

    def encode_image(self, pixels: Tensor, mask: Tensor | None = None) -> ImageContext:
        """Run the image stream and keep what the text model needs of it.

        Args:
            pixels: float (B, 3, H, W), normalised as the image stream wants; or several pictures or tiles for each
                sequence, (B, K, 3, H, W).
            mask: bool, only for cross-attention. (B,) or (B, K): False where there is no picture, so that one batch can
                hold texts with and without. (B, T, K): which pictures the token at each position may see, as a text
                with pictures in its middle needs; tokens after the last see what that one does.

        Raises:
            ValueError: pixels or mask of another shape; pixels that are not finite.
        """
        several = pixels.ndim == 5
        flat = pixels.flatten(0, 1) if several else pixels
        check_pixels(flat)
        if broken := (~flat.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
            which = f"{len(broken)} of {len(flat)} pictures, first in number {broken[0]}"
            raise ValueError(f"pixels: NaN or infinite in {which}")
        each = self.vision(flat)  # (B K, N, C)
        features = each.unflatten(0, (len(pixels), -1)).flatten(1, 2)  # (B, K N, C)
        if mask is not None:
            check_mask(mask, pixels.shape[: 1 + several])
            mask = mask.unsqueeze(1) if mask.ndim == 1 else mask
            mask = mask.repeat_interleave(each.shape[1], dim=-1)  # (B, K N) or (B, T, K N)
        return self.image_context(features, mask)

    def image_context(self, features: Tensor, mask: Tensor | None = None) -> ImageContext:
        """As :meth:`encode_image`, from features that an image stream has made: (B, N, C).

        ``mask`` is then bool (B, N) or (B, T, N), see :class:`~dslib.architecture.vision.cross_attention.ImageContext`.

        Raises:
            ValueError: features or mask of another size; a mask for a projector, whose tokens are part of the text.
        """
        if features.ndim != 3 or features.shape[-1] != self.config.image_hidden_size or not features.numel():
            wanted = f"(batch, features, {self.config.image_hidden_size})"
            raise ValueError(f"features: got shape {tuple(features.shape)}, expected {wanted}")
        if mask is not None:
            check_mask(mask, features.shape[:2])
        if self.config.fusion == "cross":
            found = {block.number: block.cross.keys_values(features) for block in self.seeing()}
            blank = (features[:, :0],) * 2  # for blocks that a draft has left out: the others keep their numbers
            kept = tuple(found.get(number, blank) for number in range(1 + max(found, default=0)))
            return ImageContext(kept, mask=mask)
        if mask is not None and not mask.all():
            raise ValueError("mask: a projector puts image tokens into the sequence; every sequence needs as many")
        return ImageContext(tokens=self.projector(features))

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

        hooks = [block.cross.register_forward_hook(note) for block in self.seeing()]
        try:
            self(input_ids, image=image)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(gates), torch.stack(shares)


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
        swin: config of the image stream, see :class:`SwinStream`; None: the tiny one. Not used when one is handed over.
    """

    fusion: str = "cross"
    image_hidden_size: int = 64
    gate: str = "scalar"
    cross_attention_every: int = 1
    cross_intermediate_size: int = 0
    swin: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        one_of(("cross", "projector"), fusion=self.fusion)
        one_of(("scalar", "token"), gate=self.gate)
        whole(1, image_hidden_size=self.image_hidden_size, cross_attention_every=self.cross_attention_every)
        whole(0, cross_intermediate_size=self.cross_intermediate_size)


MODELS[FusionConfig] = VisionLanguageDecoder
