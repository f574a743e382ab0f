"""Training the course's own model: a fixed number of steps, in pieces if need be, bit for bit the same.

What a run is stands in its :class:`Plan`; what it reads is decided by the number of the step alone, so that a run that
was stopped anywhere goes on as if it had not been (:mod:`~dslib.performance.resume`). A step::

    losses = model.losses(rows, predicted)                       # (B, T + 2) ids; the module sees some of the rows
    (next_token + 0.3 * after_next + 1e-4 * balance).backward()
    Muon for matrices, AdamW for the rest                        # one schedule: up, level with a cosine, down
    bias of each router: up where it had too little              # until the last tenth, as DeepSeek-V3's

Shapes: B sequences, T tokens. Losses are told in bits a byte: nats a token, over ln 2 and over its bytes of UTF-8.

Book: ``chapters/architecture/whole.ipynb``. Sources: DeepSeek-V3 (arXiv 2412.19437, section 4.2) for bias speed, the
weights of the losses and the longer context at the end; :mod:`~dslib.performance.muon` for the optimiser.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dslib import check
from dslib.architecture.balance import expert_load, moe_layers, update_bias
from dslib.architecture.decoder import count_parameters
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.architecture.whole import Losses, Whole
from dslib.fast.training_step import QuickLosses
from dslib.performance.muon import Muon, Optimizers, matrices_and_rest
from dslib.performance.speed import attention_flops, matrix_flops
from dslib.performance.training import TrainingStep, fit

WINDOWS, WINDOW = 96, 257  # of held-out text: what is looked at as a run goes


@dataclass(frozen=True)
class Plan:
    """What decides the weights, besides the text: sizes of a step, rates, weights of the losses, seed.

    Attributes:
        steps: of ``tokens`` predicted tokens each.
        length: T of most steps. late_length: of those after the share ``late_from``; as many tokens a step.
        predicted: the prediction module sees one row in so many.
        matrix_rate: highest learning rate of Muon. other_rate: of AdamW, which has embeddings, norms and routers.
        prediction_weight, balance_weight: of the two losses beside that of the next token.
        bias_speed: of the selection bias, until the share ``bias_until``.
    """

    steps: int = 2000
    tokens: int = 8192
    length: int = 256
    late_length: int = 512
    late_from: float = 0.85
    predicted: int = 4
    matrix_rate: float = 8e-3
    other_rate: float = 3e-3
    weight_decay: float = 0.1
    prediction_weight: float = 0.3
    balance_weight: float = 1e-4
    bias_speed: float = 1e-3
    bias_until: float = 0.9
    seed: int = 0

    def __post_init__(self):
        check.whole(1, steps=self.steps, tokens=self.tokens, length=self.length, late_length=self.late_length)
        check.whole(1, predicted=self.predicted)
        for name in ("length", "late_length"):
            if self.tokens % getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a divisor of tokens={self.tokens}")
        check.between(0, 1, late_from=self.late_from, bias_until=self.bias_until)
        check.above(0, matrix_rate=self.matrix_rate, other_rate=self.other_rate)

    def length_at(self, step: int) -> int:
        return self.length if step < self.late_from * self.steps else self.late_length


def rows_at(tokens: np.ndarray, step: int, plan: Plan) -> Tensor:
    """The rows of a step, int64 (B, T + 2): every window of the text once before any comes again, in random order.

    An epoch cuts the text at another offset and shuffles the windows anew; both follow from seed, epoch and length.
    """
    length = plan.length_at(step)
    rows, windows = plan.tokens // length, (len(tokens) - 2) // length - 1
    if windows < 1:
        raise ValueError(f"tokens: got {len(tokens)}, expected more than {2 * length + 2} for rows of {length}")
    made: dict[int, tuple[int, np.ndarray]] = {}

    def start(number: int) -> int:
        epoch, place = divmod(number, windows)
        if epoch not in made:
            draw = np.random.default_rng((plan.seed, epoch, length))
            made[epoch] = int(draw.integers(length)), draw.permutation(windows)
        offset, order = made[epoch]
        return offset + int(order[place]) * length

    starts = [start(number) for number in range(step * rows, (step + 1) * rows)]
    return torch.from_numpy(np.stack([tokens[at : at + length + 2] for at in starts]).astype(np.int64))


@dataclass(frozen=True)
class Progress:
    """Where a run stands after ``step`` of ``steps``.

    Attributes:
        bits: next token's loss of this step, bits a byte. after_next: that of the token after it.
        busiest: load of the busiest expert over the mean, averaged over layers.
    """

    step: int
    steps: int
    bits: float
    after_next: float
    learning_rate: float
    busiest: float


def pretrain(
    model: Whole, tokens: np.ndarray, bytes_a_token: float, plan: Plan, checkpoint: str | Path | None = None, *,
    precision: str = "float32", compiled: bool | None = None, every: int = 50,
    on_progress: Callable[[Progress], Any] | None = None,
) -> list[float]:  # fmt: skip
    """Train ``model`` in place by ``plan``; with a checkpoint the run goes on where it was.

    Args:
        tokens: unsigned or signed whole numbers, 1-D. bytes_a_token: of the training text, to tell losses in.
        precision, every: as in :func:`~dslib.performance.training.fit`. compiled: as in
            :class:`~dslib.fast.training_step.QuickLosses`.
        on_progress: called after every step; the run is saved and ends if it gives True.

    Returns the summed losses of all steps so far. Raises what ``fit`` does: FloatingPointError, naming the step, where
    a loss is no number (the checkpoint holds the last good state), ValueError for a checkpoint of another plan or text.
    """
    quick, device = QuickLosses(model, compiled), model.decoder.embed_tokens.weight.device
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    matrices, rest = matrices_and_rest(model)
    slow = [{"params": rest, "weight_decay": 0.0, "times": plan.other_rate / plan.matrix_rate}]
    muon = Muon(matrices, plan.matrix_rate, plan.weight_decay, dtype=dtype)
    adam = torch.optim.AdamW(slow, lr=plan.other_rate, betas=(0.9, 0.95), fused=True)
    layers, last, own = list(moe_layers(model)), {}, len(list(moe_layers(model.decoder)))

    def loss(_: Whole, rows: Tensor) -> Tensor:
        found = quick(rows, max(1, len(rows) // plan.predicted))
        last["losses"] = Losses(*(one.detach() for one in found))
        return found.next_token + plan.prediction_weight * found.after_next + plan.balance_weight * found.balance

    def after_step(_: Whole) -> None:
        loads = [expert_load(layer.last_routing.indices, layer.router.num_experts) for layer in layers]
        last["busiest"] = sum(float(load.max() / load.float().mean()) for load in loads[:own]) / max(1, own)
        if last["step"] < plan.bias_until * plan.steps:
            for layer, load in zip(layers, loads, strict=True):
                update_bias(layer.router, load, plan.bias_speed)

    def batch(step: int) -> tuple[Tensor]:
        last["step"] = step
        return (rows_at(tokens, step, plan).to(device),)

    def on_step(told: TrainingStep) -> bool:
        found, per_byte = last["losses"], 1 / math.log(2) / bytes_a_token
        bits, after_next = float(found.next_token) * per_byte, float(found.after_next) * per_byte
        at = Progress(told.number + 1, plan.steps, bits, after_next, told.learning_rate, last["busiest"])
        return on_progress is not None and on_progress(at) is True

    settings = {f"plan.{name}": value for name, value in dataclasses.asdict(plan).items()}
    settings |= {"text": f"{len(tokens)} tokens, sum {int(tokens.sum(dtype=np.int64))}", "compiled": quick.compiled}
    return fit(
        model, batch, steps=plan.steps, loss=loss, learning_rate=plan.matrix_rate, warmup=min(0.5, 100 / plan.steps),
        after_step=after_step, precision=precision, on_step=on_step, checkpoint=checkpoint, every=every,
        settings=settings, optimizer=Optimizers(muon, adam),
    )  # fmt: skip


def training_flops(model: Whole, plan: Plan) -> float:
    """Operations of a training step a token: three times those forward, as backward takes twice as many."""

    def forward(config: SparseConfig) -> float:
        return (matrix_flops(config, plan.length) + attention_flops(config, plan.length)) / plan.length

    total = forward(model.config)
    if model.prediction is not None:  # a projection, a mixture, and the head again
        module = dataclasses.replace(model.config, num_hidden_layers=1, first_k_dense_replace=0)
        total += (2 * count_parameters(model.prediction.eh_proj) + forward(module)) / plan.predicted
    return 3 * total


def byte_lengths(tokenizer: Any) -> Tensor:
    """How many bytes of UTF-8 each token of a byte-level tokenizer stands for, int64 (V,); special tokens none."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if i in special else len(name) for i, name in enumerate(names)])


@torch.inference_mode()
def bits_per_byte(model: Whole, rows: Tensor, lengths: Tensor, context: int = 0) -> float:
    """Bits a byte that ``model`` needs for the tokens behind the first ``context + 1`` of each row, (B, T) ids.

    ``lengths`` is :func:`byte_lengths`. Sixteen rows at a time, on the model's device.
    """
    bits, size = 0.0, int(lengths.to(rows.device)[rows[:, context + 1 :]].sum())
    for some in rows.to(next(model.parameters()).device).split(16):
        logits = model(some[:, :-1])[:, context:].float().flatten(0, 1)
        bits += float(torch.nn.functional.cross_entropy(logits, some[:, context + 1 :].flatten(), reduction="sum"))
    return bits / math.log(2) / size
