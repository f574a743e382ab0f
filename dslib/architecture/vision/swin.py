"""Image streams: from pixels to a sequence of feature vectors that a language model can look at.

An image stream here is any module that maps (B, 3, H, W) normalised pixels to (B, N, C) and has an attribute
``hidden_size`` = C. :class:`SwinStream` is the one that the article names, on transformers' own Swin.

Book: ``chapters/architecture/fusion.ipynb``. Source: Swin Transformer (arXiv 2103.14030, section 3): attention inside
small windows, which are shifted by half a window in every second layer, and 2 x 2 patches merged between stages.
"""

from torch import Tensor, nn

# A Swin that learns to see pictures of 64 x 64 pixels on a laptop: 16 x 16 patches of 4 pixels, then 8 x 8 of 8.
# Its windows know only relative positions; absolute ones are added so that "top left" can be told from "bottom right".
TINY_SWIN = {
    "image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "mlp_ratio": 2.0, "use_absolute_embeddings": True, "drop_path_rate": 0.0,
}  # fmt: skip


class SwinStream(nn.Module):
    """A Swin Transformer without its classifier; (B, 3, H, W) -> (B, N, hidden_size).

    Args:
        config: of transformers' ``SwinConfig``, as a dict; None is :data:`TINY_SWIN`. Later stages have fewer and
            wider tokens: N = (H / patch / 2**(stages - 1))², C = embed_dim * 2**(stages - 1).
        model: a ready ``SwinModel`` instead, such as one with trained weights.

    Raises:
        ValueError: both a config and a model; pixels of another shape than (B, 3, H, W) or another size than the
            model's absolute positions are for.
    """

    def __init__(self, config: dict | None = None, model: nn.Module | None = None):
        super().__init__()
        from transformers import SwinConfig, SwinModel  # slow to import, and only needed here

        if config is not None and model is not None:
            raise ValueError("config and model: got both, expected at most one of them")
        if model is None:
            model = SwinModel(SwinConfig(**(config or TINY_SWIN)), add_pooling_layer=False)
        self.swin = model
        self.hidden_size = self.swin.config.hidden_size

    def forward(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        config = self.swin.config
        if config.use_absolute_embeddings and tuple(pixels.shape[2:]) != (config.image_size,) * 2:
            raise ValueError(
                f"pixels: got {tuple(pixels.shape[2:])}, expected {config.image_size} x {config.image_size}"
            )
        return self.swin(pixels).last_hidden_state


def check_pixels(pixels: Tensor) -> None:
    """ValueError unless ``pixels`` is a floating-point batch of pictures with three channels and at least one pixel."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, expected (batch, 3, height, width), none of them 0")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels: got dtype {pixels.dtype}, expected normalised floating-point values")
