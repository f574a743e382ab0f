"""Conditional depth: tokens that leave a decoder early, and tokens that pass a layer by.

*Early exit* (CALM): after some layers the model looks at its own prediction, and a token that is sure enough goes no
deeper. Later tokens still need the keys and values that it would have had in the layers it skipped. CALM's answer is
*state propagation*: the token's last state is handed up unchanged, and every layer above makes its key and value from
that. So a skipped layer costs the key and value projection and nothing else.

*Mixture of depths*: a router in each layer picks the tokens that go through it; the others stay on the residual line.
The choice is the best few *of the sequence*, so it depends on later tokens, which do not exist yet when text is made.
A second, causal choice is trained to imitate it.

Shapes: B sequences, T tokens, L layers. A depth is the number of layers that a token went through, 1 to L.

Book: ``chapters/architecture/depth.ipynb``. Sources: CALM (arXiv 2207.07061) for exit, propagation and the weighted
loss, LayerSkip (arXiv 2404.16710) for one head shared by all exits, Mixture-of-Depths (arXiv 2404.02258, section 3).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.cache import KVCache, Step
from dslib.architecture.decoder import Decoder, check_ids
from dslib.architecture.experts import no_autocast
from dslib.architecture.layers import Attention, Block
from dslib.architecture.published import MultiHeadLatentAttention
from dslib.architecture.sparse_decoder import SparseBlock
from dslib.architecture.vision.cross_attention import SeeingBlock
from dslib.check import between, whole
from dslib.exact import unlike


def early_exit(
    model: Decoder, input_ids: Tensor, rule: "ExitRule", cache: KVCache | None = None, positions: Tensor | None = None
) -> "Exits":
    """Run a decoder with early exit; a token's result does not depend on the rest of its batch.

    In one pass over a whole text, or token by token with a cache: the result is the same, since a token that has left
    hands its state up either way. Layers run until the last token of the call has left.

    Args:
        input_ids, cache, positions: as for the model.

    Raises:
        ValueError: more ``min_layers`` than the model has layers, ids or a cache that the model refuses, an empty
            batch; NaN or infinite logits, which no threshold can judge. A cache is of no more use after that: its
            layers have kept different numbers of tokens.
    """
    exits = rule.exits(len(model.layers))
    x, step, rope = model.place(model.embed_tokens(check_ids(input_ids)), cache, positions)
    inside = torch.ones(input_ids.shape, dtype=torch.bool, device=x.device)
    depths = torch.full_like(input_ids, len(model.layers), dtype=torch.int64)
    confidence = torch.zeros(input_ids.shape, dtype=torch.float32, device=x.device)
    logits, layers_run = None, 0
    for depth, block in enumerate(model.layers, start=1):
        if not inside.any():  # all have left: only what later tokens will look at
            if cache is None:
                break
            if _remembers(block):
                block.remember(x, rope, cache, depth - 1)
            else:
                block(x, rope, step, cache, depth - 1, input_ids)
            continue
        # Tokens that have left run along, which keeps the batch in one piece, and get their state back.
        x = torch.where(inside.unsqueeze(-1), block(x, rope, step, cache, depth - 1, input_ids), x)
        layers_run = depth
        if depth not in exits:
            continue
        asked = model.lm_head(model.norm(x[inside]))  # (tokens still inside, vocab_size)
        sure = asked.float().softmax(-1).amax(-1)
        if not sure.isfinite().all():
            raise ValueError(f"logits: NaN or infinite after layer {depth}, expected finite ones")
        leaves = sure > rule.threshold if depth < len(model.layers) else torch.ones_like(sure, dtype=torch.bool)
        here = inside.clone()
        here[inside] = leaves
        logits = asked.new_empty(*input_ids.shape, asked.shape[-1]) if logits is None else logits
        logits[here], confidence[here], depths[here] = asked[leaves], sure[leaves], depth
        inside = inside & ~here
    return Exits(logits, depths, confidence, layers_run)


@dataclass(frozen=True)
class ExitRule:
    """When a token may leave.

    Attributes:
        threshold: it leaves once the probability of its most likely next token is higher; 1 never, 0 always.
        min_layers: it goes through at least so many layers.
        every: after those, it is asked after every so many layers. Asking costs a product with the output head.

    Raises:
        ValueError: a threshold outside 0 to 1, another number below 1.
    """

    threshold: float = 0.9
    min_layers: int = 4
    every: int = 1

    def __post_init__(self):
        between(0, 1, threshold=self.threshold)
        whole(1, min_layers=self.min_layers, every=self.every)

    def exits(self, layers: int) -> tuple[int, ...]:
        """Depths at which a token may leave a decoder of so many layers; the last one is always among them."""
        if self.min_layers > layers:
            raise ValueError(f"min_layers: got {self.min_layers}, expected at most the model's {layers} layers")
        return tuple(sorted({*range(self.min_layers, layers, self.every), layers}))


@dataclass(frozen=True)
class Exits:
    """What :func:`early_exit` gives.

    Attributes:
        logits: (B, T, vocab_size), each token's from the depth at which it left.
        depths: int64, (B, T).
        confidence: float32, (B, T): probability of the most likely next token there.
        layers_run: layers that ran in full for at least one token. In a batch, a token waits for the slowest.
    """

    logits: Tensor
    depths: Tensor
    confidence: Tensor
    layers_run: int

    @property
    def mean_depth(self) -> float:
        return float(self.depths.float().mean())


def _remembers(block: nn.Module) -> bool:
    """Whether ``remember`` keeps what the block would: not where block or attention was changed, then it has to run."""
    fits = (None, "has a remember of its own")  # that one is called
    if unlike(block, (Block, SparseBlock, SeeingBlock)) not in fits:
        return False
    return unlike(block.self_attn, (Attention, MultiHeadLatentAttention)) in fits


def exit_losses(model: Decoder, inputs: Tensor, targets: Tensor, rule: ExitRule) -> Tensor:
    """Loss of each token at each exit, in nats: two (B, T) -> (exits, B, T), float32; the last exit is the model.

    0 where the target is -100, which stands for none.
    """
    x, step, rope = model.place(model.embed_tokens(check_ids(inputs)))
    exits, losses = rule.exits(len(model.layers)), []
    for depth, block in enumerate(model.layers, start=1):
        x = block(x, rope, step, None, depth - 1, inputs)
        if depth in exits:
            logits = model.lm_head(model.norm(x)).float()
            losses.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    return torch.stack(losses)


def exit_loss(model: Decoder, inputs: Tensor, targets: Tensor, rule: ExitRule) -> Tensor:
    """The training that makes exits work: the mean loss of every exit, weighted by its depth (CALM); a scalar.

    The weights sum to 1; targets of -100 count for nothing. Without it only the last layer learns to speak through the
    output head.
    """
    depths = torch.tensor(rule.exits(len(model.layers)), dtype=torch.float32, device=inputs.device)
    losses = exit_losses(model, inputs, targets, rule).sum((1, 2)) / (targets != -100).sum()
    return (losses * depths).sum() / depths.sum()


class MixtureOfDepths(nn.Module):
    """A block that only some tokens go through; the others stay as they are.

    Chosen tokens attend to one another only; a window over the attention counts chosen tokens. What the block adds to a
    token is multiplied by the sigmoid of its score (the paper multiplies by the score itself), so that the router
    learns from the loss.

    Args:
        block: wrapped, not copied. hidden_size: of the tokens.
        capacity: share of a sequence's tokens that go through the block, above 0 and at most 1; at least one does.

    Attributes:
        causal: choose by the predictor, from a token alone, instead of by rank in the sequence. For making text.
        last_choice: bool, (B, T), of the last call. last_predictor_loss: see :meth:`forward`.

    Raises:
        ValueError: a capacity out of range.
    """

    def __init__(self, block: Block, hidden_size: int, capacity: float = 0.5):
        super().__init__()
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity: got {capacity}, expected more than 0 and at most 1")
        self.block, self.capacity, self.causal = block, capacity, False
        self.router = nn.Linear(hidden_size, 1, bias=False)
        self.predictor = nn.Linear(hidden_size, 1)
        self.last_choice: Tensor | None = None
        self.last_predictor_loss: Tensor | None = None

    def forward(self, x: Tensor, rope, step: Step, cache: KVCache | None, layer: int, input_ids: Tensor | None = None):
        """(B, T, hidden_size) -> the same. The predictor's loss (cross-entropy against the choice by rank) is kept.

        Raises:
            ValueError: with a cache: which earlier tokens a layer holds would differ from layer to layer. NaN or
            infinite scores, which cannot be ranked (not checked on CUDA, where it would make the CPU wait).
        """
        if cache is not None:
            raise ValueError("cache: got one, expected None (a mixture of depths runs over whole sequences here)")
        if step.mask is not None:
            raise ValueError("attention_mask: got one, expected None (padding would compete for the layer's places)")
        with no_autocast(x):  # a rounded score can change who goes through
            given = x.to(self.router.weight.dtype)
            scores = self.router(given).squeeze(-1)  # (B, T)
            guess = self.predictor(given.detach()).squeeze(-1)  # its loss must not move the model
        if x.device.type != "cuda" and not scores.isfinite().all():
            raise ValueError("x: got hidden states whose router scores are NaN or infinite, expected finite ones")
        count = max(1, int(self.capacity * x.shape[1] * (1 + 1e-9)))  # 0.57 of 100 is 56.99… in floats
        ranked = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)
        self.last_predictor_loss = F.binary_cross_entropy_with_logits(guess, ranked.to(guess.dtype))
        self.last_choice = chosen = guess > 0 if self.causal else ranked
        rows = [self._row(x[i : i + 1], chosen[i], rope, step, i, layer, input_ids) for i in range(len(x))]
        return x + (torch.cat(rows) - x) * scores.to(x.dtype).sigmoid().unsqueeze(-1)

    def _row(self, x: Tensor, chosen: Tensor, rope, step: Step, row: int, layer: int, input_ids: Tensor | None):
        """One sequence, (1, T, hidden_size): its chosen tokens through the block, in order."""
        where = chosen.nonzero().squeeze(1)
        if len(where) == 0:
            return x
        turns = tuple(part[row if len(part) > 1 else 0][where].unsqueeze(0) for part in rope)
        positions = step.positions[row if len(step.positions) > 1 else 0][where].unsqueeze(0)
        ids = None if input_ids is None else input_ids[row : row + 1, where]
        out = self.block(x[:, where], turns, Step(positions, causal=True), None, layer, ids)
        return x.index_copy(1, where, out.to(x.dtype))

    def __getstate__(self) -> dict:
        """Copies and files have the last loss outside the graph, which cannot be copied."""
        loss = self.last_predictor_loss
        return vars(self) | {"last_predictor_loss": loss if loss is None else loss.detach()}


def with_mixture_of_depths(model: Decoder, capacity: float = 0.5, every: int = 2) -> Decoder:
    """Wrap every second (``every``) block, in place, the second first, in the model's dtype; returns the model."""
    whole(1, every=every)
    between(1, len(model.layers), every=every)
    if any(isinstance(layer, MixtureOfDepths) for layer in model.layers):
        raise ValueError("model: got one with mixtures of depths, expected plain blocks")
    for index in range(every - 1, len(model.layers), every):
        wrapped = model.layers[index] = MixtureOfDepths(model.layers[index], model.config.hidden_size, capacity)
        for part in (wrapped.router, wrapped.predictor):
            part.to(model.embed_tokens.weight)
        for part in (wrapped, wrapped.router, wrapped.predictor):
            part.training = model.training
    return model
