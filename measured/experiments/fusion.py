"""Small trainings that ask what eyes are worth: V1 without pictures, V2 with a gate, V2 with a projector.

All learn from the same batches: scenes with captions and questions in two languages, and pictures of numbers to read.
They begin as the same text model, which has read the words without the pictures, and with the same image stream, which
has been taught to tell things and digits apart: nobody starts a vision-language model from blank eyes. What differs at
the end is what the way of looking brought. Held-out scenes are new pictures of the same things; held-out numbers are
numbers that were in no picture trained on.

Book: ``chapters/architecture/fusion.ipynb``; measured with :mod:`measured.experiments.fusion_evaluation`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.decoder import Decoder, build, preset
from dslib.architecture.fusion import VisionLanguageDecoder
from dslib.architecture.vision.swin import TINY_SWIN, SwinStream
from dslib.check import one_of
from dslib.data.pictures import LANGUAGES, load_emoji
from dslib.data.scenes import NUMBERS, PLACES, SceneMaker, Stream, TextMaker, item_rng
from dslib.data.text import Words
from dslib.performance.training import fit

KINDS = (
    "dog", "cat", "pig", "frog", "octopus", "honeybee", "banana", "strawberry", "carrot", "pizza", "rocket", "umbrella",
    "key", "star", "red heart", "evergreen tree",
)  # fmt: skip
SIZE, DIGITS = 32, 3
READ = {"en": "read:", "zh": "数字："}
IGNORED = -100  # target of a token whose loss does not count
VARIANTS = {
    "text only": None,
    "scalar gate": {"fusion": "cross", "gate": "scalar"},
    "token gate": {"fusion": "cross", "gate": "token"},
    "projector": {"fusion": "projector"},
}
TEXT_BATCHES, LABEL_BATCHES, TRAINED, HELD_OUT = (1_000_003 * k for k in (1, 2, 3, 4))  # seeds of streams, far apart


@dataclass(frozen=True)
class Example:
    """A picture and a text: ``prompt`` is given, ``answer`` is what the model has to say."""

    image: np.ndarray
    sort: str
    language: str
    prompt: str
    answer: str


class World:
    """What there is to see and to say: sixteen things in scenes, numbers to read, and the words for both.

    ``kinds`` are English names of emoji. ``scenes`` makes scenes; ``numbers``, by whether held out, pictures of
    numbers, of which one in seven is held out; ``words`` is the vocabulary.
    """

    def __init__(self, kinds: Sequence[str] = KINDS):
        self.scenes = SceneMaker(load_emoji().named(*kinds), SIZE)
        every = [f"{number:0{DIGITS}}" for number in range(10**DIGITS)]
        look = {"size": (SIZE, SIZE), "points": (13, 18), "angle": 6.0}
        self.numbers = {
            held_out: TextMaker([n for n in every if (int(n) % 7 == 3) is held_out], **look)
            for held_out in (False, True)
        }
        said = [" ".join((*self.scenes.names[k], *PLACES[k], *NUMBERS[k], READ[k])) for k in LANGUAGES]
        self.words = Words([*said, "what is how many: where ?, 0123456789", "是什么？有几个在哪里，："])

    def example(self, rng: np.random.Generator, sort: str | None = None, held_out: bool = False) -> Example:
        """One example; of the given ``sort``, or of any: "caption", "read", "what", "how many" or "where"."""
        language = LANGUAGES[int(rng.integers(2))]
        sort = sort or str(rng.choice(("caption", "question", "read")))
        if sort == "read":
            picture = self.numbers[held_out](rng)
            return Example(picture.image, "read", language, READ[language], picture.text)
        scene = self.scenes(rng)
        if sort == "caption":
            return Example(scene.image, "caption", language, "", scene.caption(language))
        asked = scene.questions(language)
        if sort == "question":  # first the sort, then one of it: most that can be asked is "what"
            kinds = sorted({kind for kind, _, _ in asked})
            sort = kinds[int(rng.integers(len(kinds)))]
        while not (fitting := [rest for kind, *rest in asked if kind == sort]):  # not every scene has a "where"
            scene = self.scenes(rng)
            asked = scene.questions(language)
        return Example(scene.image, sort, language, *fitting[int(rng.integers(len(fitting)))])

    def collate(self, examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, inputs (n, T) and targets (n, T), padded on the right; only answers and their end count."""
        rows = []
        for item in examples:
            prompt, answer = self.words.encode(item.prompt), self.words.encode(item.answer)
            ids = [Words.END, *prompt, *answer, Words.END]  # the end of one text is where the next begins
            rows.append((ids[:-1], [IGNORED] * len(prompt) + ids[1 + len(prompt) :]))
        longest = max(len(inputs) for inputs, _ in rows)
        inputs = torch.tensor([row + [Words.PAD] * (longest - len(row)) for row, _ in rows])
        targets = torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in rows])
        return pixels([item.image for item in examples]), inputs, targets

    def batches(self, batch_size: int, seed: int) -> Stream:
        """Training batches without end: pixels, inputs, targets."""
        return Stream(self.example, batch_size, seed, collate=self.collate)

    def labelled(self, rng: np.random.Generator) -> tuple[np.ndarray, list[int], list[int]]:
        """A picture with labels: the kind in each quarter (the last number is "nothing"), and the digits."""
        if rng.random() < 0.4:
            scene, nothing = self.scenes(rng), len(self.scenes.emoji)
            cells = [nothing if cell is None else cell for cell in scene.cells]
            return scene.image, cells, [IGNORED] * DIGITS
        picture = self.numbers[False](rng)
        return picture.image, [IGNORED] * 4, [int(digit) for digit in picture.text]


def pixels(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures of one size, (H, W, 3) -> float32 (n, 3, H, W) from -1 to 1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def see(model: Decoder, images: Tensor) -> dict:
    """The keyword argument that lets ``model`` see; none for a text model."""
    return {"image": model.encode_image(images)} if isinstance(model, VisionLanguageDecoder) else {}


def answer_loss(model: Decoder, images: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that count, in nats."""
    return F.cross_entropy(model(inputs, **see(model, images)).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


class _Labels(nn.Module):
    """An image stream with two heads: what is in each quarter, and which digits, read by one query a place."""

    def __init__(self, stream: SwinStream, kinds: int):
        super().__init__()
        size = stream.hidden_size
        self.stream, self.kind, self.digit = stream, nn.Linear(size, kinds + 1), nn.Linear(size, 10)
        self.places = nn.Parameter(torch.randn(DIGITS, size) * size**-0.5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stream(images)  # (B, N, C)
        side = round(features.shape[1] ** 0.5)
        quarters = features.unflatten(1, (2, side // 2, 2, side // 2)).mean((2, 4)).flatten(1, 2)  # (B, 4, C)
        weights = (self.places @ features.mT).softmax(-1)  # (B, digits, N)
        return self.kind(quarters), self.digit(weights @ features)


def label_loss(model: _Labels, images: Tensor, cells: Tensor, digits: Tensor) -> Tensor:
    """Mean cross-entropy of the kinds plus that of the digits, in nats; 0 for one that the batch has none of."""
    total = torch.zeros(())
    for logits, labels in zip(model(images), (cells, digits), strict=True):
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        total = total + losses / (labels != IGNORED).sum().clamp(min=1)
    return total


def taught_stream(
    world: World, *, steps: int, seed: int = 0, batch_size: int = 64, learning_rate: float = 4e-3
) -> SwinStream:
    """A small Swin, taught by labels and not by language: the stand-in for SigLIP, which no laptop trains."""
    torch.manual_seed(seed)
    model = _Labels(SwinStream({**TINY_SWIN, "image_size": SIZE, "initializer_range": 0.1}), len(world.scenes.emoji))

    def collate(items: list) -> tuple[Tensor, Tensor, Tensor]:
        images, cells, digits = zip(*items, strict=True)
        return pixels(images), torch.tensor(cells), torch.tensor(digits)

    stream = Stream(world.labelled, batch_size, LABEL_BATCHES + seed, collate=collate)
    fit(model, stream.batch, steps=steps, loss=label_loss, learning_rate=learning_rate)
    return model.stream


def text_start(
    world: World, *, steps: int, seed: int = 0, batch_size: int = 64, learning_rate: float = 3e-3
) -> Decoder:
    """The text model that all variants begin as: it has read captions, questions and numbers, and seen no picture."""
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    text = build(preset("tiny", vocab_size=len(world.words), **shape), seed=seed)
    batches = world.batches(batch_size, TEXT_BATCHES + seed)
    fit(text, batches.batch, steps=steps, loss=answer_loss, learning_rate=learning_rate)
    return text


def train_variant(
    variant: str, world: World, text: Decoder, stream: nn.Module, *, steps: int, seed: int = 0, batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> tuple[Decoder, list[float]]:  # fmt: skip
    """Copy text model and stream, join them in one of ``VARIANTS``, and train all of it; same batches for all.

    Returns the model in evaluation mode, and its loss at every step. An unknown variant is a ``ValueError``.
    """
    one_of(VARIANTS, variant=variant)
    model = copy.deepcopy(text)
    if VARIANTS[variant] is not None:
        torch.manual_seed(seed)  # the new blocks' weights
        model = VisionLanguageDecoder.from_text(model, copy.deepcopy(stream), **VARIANTS[variant])
    batches = world.batches(batch_size, TRAINED + seed)
    losses = fit(model, batches.batch, steps=steps, loss=answer_loss, learning_rate=learning_rate)
    return model.eval(), losses


def held_out(world: World, count: int, sort: str | None = None, seed: int = 0) -> list[Example]:
    """Examples that no training has seen: new scenes, and numbers that were kept back."""
    return [world.example(item_rng(HELD_OUT + seed, i), sort, held_out=True) for i in range(count)]
