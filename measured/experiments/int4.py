"""What four bits cost in quality: error of the weights, perplexity on a novel, and how long greedy output agrees.

The weights are rounded and multiplied in float32, so that only their rounding counts. The kernels of
:mod:`dslib.architecture.int4.layers` round activations to bfloat16 as well, which the tests show to be little.

A trap lies in the model. The only SmolLM2 that needs no network has been through four bits before: its file holds
groups of 32 neighbours with 16 levels each. Whoever cuts the same groups again finds the old levels and loses next to
nothing. So every measurement can be made with the columns of each matrix in another order, which leaves the product as
it is and the groups nothing to find; and once more on the course's own model, which was never in four bits.

Book: ``chapters/architecture/int4.ipynb``. Recorded by ``make record PART=int4-quality``.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dslib.architecture import whole
from dslib.architecture.decoder import Decoder
from dslib.architecture.generation import generate
from dslib.architecture.int4.levels import METHODS, check_group_size
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.check import one_of
from dslib.data import corpus
from dslib.data.text import moby_dick, slices
from dslib.performance.perplexity import perplexity, perplexity_ratio, token_losses
from dslib.performance.pretrain import byte_lengths
from dslib.performance.statistics import mean_interval

Group = int | str  # weights that share a scale, or "row", or "tensor"
# Matrices by what they do, as the ends of their names. A tied head and embedding are one matrix in two places.
PARTS = {
    "attention": ("qkv_proj", "o_proj"),
    "gate and up": ("gate_up_proj",),
    "down": ("down_proj",),
    "head": ("lm_head",),
    "embedding": ("embed_tokens",),
}
BLOCKS = ("attention", "gate and up", "down")


def rounded(
    weight: Tensor, group_size: Group = 32, method: str = "rtn", symmetric: bool = False, shuffle: int | None = None
) -> Tensor:
    """What four bits leave of ``weight`` (out, in), as float32; as ``Int4Linear.from_weight(…).dequantize()``.

    Args:
        group_size: a divisor of ``in``; or ``"row"`` or ``"tensor"``, for one scale for each of these.
        shuffle: seed of an order of the columns in which the groups are cut; None leaves them as they lie.

    Raises:
        ValueError: an unknown method, or a group size that does not divide.
    """
    one_of(METHODS, method=method)
    rows, columns = weight.shape
    order = torch.arange(columns)
    if shuffle is not None:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(shuffle))
    if isinstance(group_size, str):
        one_of(("row", "tensor"), group_size=group_size)
        group_size = columns if group_size == "row" else rows * columns
    else:
        check_group_size(columns, group_size)
    groups = weight.detach().float()[:, order].reshape(-1, group_size)
    out = torch.empty(rows, columns)
    out[:, order] = METHODS[method](groups, symmetric).dequantize().view(rows, columns)
    return out


@torch.no_grad()
def round_(model: nn.Module, parts: Sequence[str] = BLOCKS, shuffle: int | None = None, **options: Any) -> dict:
    """Round the matrices of these :data:`PARTS` in place; ``options`` as for :func:`rounded`.

    A head that shares its matrix with the embedding gets a copy of its own, so that each can be rounded alone.

    Returns ``error``, the size of what was lost over that of the weights (root of sums of squares), and how many
    ``weights`` were rounded. An unknown part is a ``ValueError``; others as in :func:`rounded`.
    """
    for part in parts:
        one_of(PARTS, parts=part)
    if {"head", "embedding"} & set(parts) and model.lm_head.weight is model.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.clone())
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    ends = tuple(end for part in parts for end in PARTS[part])
    lost = total = count = 0
    for number, (name, module) in enumerate(model.named_modules()):
        if name.rpartition(".")[2] in ends:
            new = rounded(module.weight, shuffle=None if shuffle is None else shuffle + number, **options)
            lost += (new - module.weight).double().square().sum().item()
            total += module.weight.double().square().sum().item()
            count += new.numel()
            module.weight.copy_(new)
    return {"error": (lost / total) ** 0.5, "weights": count}


def smollm2_quality(
    method: str = "rtn", symmetric: bool = False, group_sizes: Sequence[Group] = (32, 64, 192),
    shuffles: Sequence[int | None] = (None, 0), passages: int = 12, length: int = 256, new_tokens: int = 32,
) -> dict[str, Any]:  # fmt: skip
    """SmolLM2-135M with the matrices of its blocks in four bits, against itself in float32, on passages of *Moby-Dick*.

    Groups of 128 do not divide its rows of 576, so 192 stands in for them.

    Returns:
        ``perplexity`` before; ``rows``, each with ``group_size``, ``shuffle``, ``error``, ``ratio`` (times the
        perplexity before, paired by passage), ``agree`` (share of places where both think the same token most likely,
        both being shown the novel) and ``run`` (how many of ``new_tokens`` greedy tokens come before the first that
        differs, one run a passage). All three with a 95 % interval over the passages.
    """
    model, ids = _smollm2(passages, length)
    before = _look(model, ids, new_tokens)
    rows = []
    for group_size in group_sizes:
        for shuffle in shuffles:
            coarse = copy.deepcopy(model)
            options = {"group_size": group_size, "method": method, "symmetric": symmetric}
            found = round_(coarse, shuffle=shuffle, **options)
            rows.append({"group_size": group_size, "shuffle": shuffle, **found, **_compare(coarse, ids, before)})
    return {"perplexity": dataclasses.asdict(perplexity(before["losses"])), "rows": rows}


def layer_quality(
    group_size: Group = 64, method: str = "rtn", symmetric: bool = False, shuffle: int | None = 0, passages: int = 12,
    length: int = 256,
) -> dict[str, Any]:  # fmt: skip
    """As :func:`smollm2_quality`, but only one kind of matrix is rounded: which of them hurts? Without greedy output.

    Returns:
        ``rows``, each with the ``parts`` that were rounded, ``error``, ``weights``, ``ratio`` and ``agree``.
    """
    model, ids = _smollm2(passages, length)
    before, rows = _look(model, ids, 0), []
    for parts in (*((part,) for part in PARTS), BLOCKS, (*BLOCKS, "head"), tuple(PARTS)):
        coarse = copy.deepcopy(model)
        found = round_(coarse, parts, group_size=group_size, method=method, symmetric=symmetric, shuffle=shuffle)
        rows.append({"parts": list(parts), **found, **_compare(coarse, ids, before)})
    return {"rows": rows}


def trained_quality(
    group_sizes: Sequence[Group] = (32, 64, "row"), passages: int = 24, length: int = 256
) -> dict[str, Any]:
    """The course's own model, whose weights no four bits have touched, and every method on it, on validation text.

    All matrices of the blocks are rounded, every expert's by itself; routers stay. A row that groups do not divide (an
    expert's inner size is 48) gets one scale.

    Returns:
        ``perplexity`` before, ``bits_per_byte`` before; ``rows``, each with ``method``, ``symmetric``, ``group_size``,
        ``error``, ``bits_per_byte``, ``ratio`` of the perplexities and ``agree``, both with a 95 % interval over the
        passages.
    """
    model = whole.load()[0].decoder
    ids = slices(torch.from_numpy(corpus.token_stream("validation")[0].astype("int64")), length, passages)
    size = byte_lengths(corpus.tokenizer())[ids[:, 1:]].sum().item()
    before, rows = _look(model, ids, 0), []

    def rate(losses: Tensor) -> float:
        return losses.double().sum().item() / math.log(2) / size

    for method, symmetric in (("rtn", True), ("rtn", False), ("hqq", False)):
        for group_size in group_sizes:
            coarse = copy.deepcopy(model)
            error = _round_blocks_(coarse, group_size, method=method, symmetric=symmetric)
            case = {"method": method, "symmetric": symmetric, "group_size": group_size, "error": error}
            rows.append(case | {"bits_per_byte": rate(token_losses(coarse, ids))} | _compare(coarse, ids, before))
    perplexities = dataclasses.asdict(perplexity(before["losses"]))
    return {"perplexity": perplexities, "bits_per_byte": rate(before["losses"]), "rows": rows}


@torch.no_grad()
def _round_blocks_(model: Decoder, group_size: Group, **options: Any) -> float:
    lost = total = 0.0
    for name, weight in model.layers.named_parameters():
        if weight.ndim < 2 or "router" in name:
            continue
        flat = weight.flatten(0, -2)  # (rows of all experts, in)
        fits = isinstance(group_size, str) or flat.shape[1] % group_size == 0
        new = rounded(flat, group_size if fits else "row", **options)
        lost += (new - flat).double().square().sum().item()
        total += flat.double().square().sum().item()
        weight.copy_(new.view_as(weight))
    return (lost / total) ** 0.5


def _smollm2(passages: int, length: int) -> tuple[Decoder, Tensor]:
    model, tokenizer = load_smollm2()
    novel = torch.tensor(tokenizer(moby_dick(), verbose=False).input_ids)
    return model, slices(novel, length, passages)


def _look(model: Decoder, ids: Tensor, new_tokens: int) -> dict[str, Any]:
    """Losses and likeliest next tokens on the passages (n, T), and what follows the first 32 tokens of each, greedily.

    The likeliest tokens come from the same pass as the losses: :func:`token_losses` calls the model, we listen.
    """
    likeliest: list[Tensor] = []
    listener = model.register_forward_hook(lambda module, args, logits: likeliest.append(logits[0].argmax(-1)))
    try:
        losses = token_losses(model, ids)
    finally:
        listener.remove()
    greedy = generate(model, ids[:, :32], new_tokens) if new_tokens else []
    return {"losses": losses, "likeliest": torch.stack(likeliest), "greedy": [run.tokens for run in greedy]}


def _compare(model: Decoder, ids: Tensor, before: dict[str, Any]) -> dict[str, Any]:
    now = _look(model, ids, len(before["greedy"][0]) if before["greedy"] else 0)
    same = (now["likeliest"] == before["likeliest"]).float().mean(dim=1)
    found = {"ratio": perplexity_ratio(now["losses"], before["losses"]), "agree": mean_interval(same.tolist())}
    if before["greedy"]:
        pairs = zip(now["greedy"], before["greedy"], strict=True)
        found["run"] = mean_interval([float(same_start(ours, theirs)) for ours, theirs in pairs])
    # Student's interval knows no bounds; a share has two and a count has one.
    found["agree"] = dataclasses.replace(found["agree"], high=min(1.0, found["agree"].high))
    if "run" in found:
        found["run"] = dataclasses.replace(found["run"], low=max(0.0, found["run"].low))
    return {name: dataclasses.asdict(value) for name, value in found.items()}


def same_start(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
