"""What helps at test time, measured: number of experts, minimum length, truncation, and several answers to a sum.

Each function measures one piece of advice on a model that is here. Nothing in the results is a timing: a recording says
what comes out, whatever the machine. Recorded by ``make record PART=complex``.

Book: ``chapters/scenarios/complex.ipynb``.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib import fast
from dslib.architecture.balance import moe_layers
from dslib.architecture.decoder import Decoder
from dslib.architecture.generation import Sampling, generate
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.architecture.whole import load
from dslib.check import one_of, whole
from dslib.data import corpus, text
from dslib.performance.pretrain import WINDOW, WINDOWS, Plan, byte_lengths, pretrain
from dslib.scenarios import complex as hard
from measured.experiments import does_it_help
from measured.experiments.ngram import rate

# ---------------------------------------------------------------- experts

TOP_KS = (1, 2, 3, 4, 5, 6, 8, 12, 16)


@contextmanager
def experts_of(model: nn.Module, top_k: int, normalised: bool = True) -> Iterator[None]:
    """Inside, every router chooses ``top_k`` experts; without ``normalised`` their scores are weights as they are."""
    routers = [layer.router for layer in moe_layers(model)]
    before = [(router.top_k, router.norm_topk_prob) for router in routers]
    try:
        for router in routers:
            if not 1 <= top_k <= router.num_experts:
                raise ValueError(f"top_k: got {top_k}, expected 1 to {router.num_experts}, the experts there are")
            router.top_k, router.norm_topk_prob = top_k, normalised
        yield
    finally:
        for router, (count, norm) in zip(routers, before, strict=True):
            router.top_k, router.norm_topk_prob = count, norm


@torch.inference_mode()
def window_bits(model: nn.Module, rows: Tensor) -> list[float]:
    """Bits that a model needs for all tokens of each row (B, T) but the first."""
    found: list[float] = []
    for some in rows.split(16):
        logits = model(some[:, :-1]).float().transpose(1, 2)  # (B, V, T - 1)
        found += (F.cross_entropy(logits, some[:, 1:], reduction="none").sum(1) / math.log(2)).tolist()
    return [round(bits, 1) for bits in found]


def _held(windows: int) -> tuple[Tensor, list[int]]:
    """Windows of validation text, (windows, T) ids, and the bytes of what is predicted in each."""
    stream = torch.from_numpy(corpus.token_stream("validation")[0].astype("int64"))
    rows = text.slices(stream, WINDOW, windows)
    return rows, byte_lengths(corpus.tokenizer())[rows[:, 1:]].sum(1).tolist()


def _by_experts(model: nn.Module, trained: int, top_ks: Sequence[int], windows: int) -> dict[str, Any]:
    whole(1, windows=windows)
    rows, sizes = _held(windows)
    bits: dict[str, dict[str, list[float]]] = {"normalised": {}, "as they are": {}}
    for name, found in bits.items():
        for top_k in top_ks:
            with experts_of(model, top_k, name == "normalised"):
                found[str(top_k)] = window_bits(model, rows)
    return {"trained": trained, "bytes": sizes, "bits": bits}


def own_experts(top_ks: Sequence[int] = TOP_KS, windows: int = WINDOWS) -> dict[str, Any]:
    """The course's own model, trained with 4 of 16 experts, run with other numbers of them.

    Returns the number ``trained`` with, the ``bytes`` of each window of held-out text, and the ``bits`` that it takes:
    by weights (``"normalised"``, as in training, or ``"as they are"``), by number of experts, one a window.
    """
    model, _ = load()
    return _by_experts(model.decoder, model.config.num_experts_per_tok, top_ks, windows)


def two_of_sixteen(
    seed: int = 0, steps: int = 240, tokens: int = 2048, length: int = 256, top_ks: Sequence[int] = TOP_KS,
    windows: int = 48, precision: str = "bfloat16", compiled: bool | None = None, changes: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same of a small mixture trained here with 2 of 16 experts, none shared: the article's numbers."""
    model = does_it_help.make("16 experts, top 2", seed, **changes or {})
    stream, size = corpus.token_stream("train")
    plan = Plan(steps=steps, tokens=tokens, length=length, late_length=length, seed=seed)
    pretrain(model, stream, size / len(stream), plan, precision=precision, compiled=compiled)
    return _by_experts(model.decoder.cpu().eval(), model.config.num_experts_per_tok, top_ks, windows)


def against_trained(found: dict[str, Any], weights: str = "normalised") -> list[dict[str, Any]]:
    """One row a number of experts: ``bits`` a byte, and those ``more`` than with the number trained with, paired by
    window, with the 95 % interval over windows (value, low, high)."""
    size, bits = np.array(found["bytes"]), {k: np.array(v) for k, v in found["bits"][weights].items()}
    trained = np.array(found["bits"]["normalised"][str(found["trained"])])
    return [
        {"experts": int(k), "bits": float(one.sum() / size.sum()), "more": rate(one - trained, size)}
        for k, one in bits.items()
    ]


# ---------------------------------------------------------------- minimum length

QUESTIONS = (
    "What is the capital of France?", "How many days are in a week?", "What colour is the sky on a clear day?",
    "Who wrote Romeo and Juliet?", "What do bees make?", "What is the opposite of hot?", "Name a primary colour.",
    "What is the largest ocean?", "How many legs does a spider have?", "What is frozen water called?",
    "Which planet is the red planet?", "What is two plus two?", "Say hello.", "What is the first month of the year?",
    "Which animal barks?", "What is the chemical symbol of gold?",
)  # fmt: skip
ADVISED = Sampling(1.0, top_k=40, top_p=0.95)  # the article's rule; it names no temperature


@cache
def _smollm2() -> tuple[Decoder, Any]:
    model, tokenizer = load_smollm2()
    fast.prepare(model)
    return model, tokenizer


def forced(minimum: int = 128, count: int = 8, greedy: bool = False, part: int = 32) -> dict[str, Any]:
    """SmolLM2 answers short questions and may not end before so many tokens; beside it, the novel continued.

    The novel is the control: nothing there wants to end, and its texts are as long and drawn by the same rule.

    Returns, one a question: ``natural``, the tokens of the answer when it may end (None if it does not in ``minimum``),
    ``end``, the probability of the end token at each place of the forced text, which the rule throws away, ``distinct``
    (distinct-2 of each piece of ``part`` tokens), ``loop`` (:func:`~dslib.scenarios.complex.loop`) and the ``texts``;
    ``control``, the same of the novel: ``end``, ``distinct``, ``loop``.
    """
    whole(1, minimum=minimum, count=count, part=part)
    model, tokenizer = _smollm2()
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for one in QUESTIONS[:count]
    ]
    novel = text.slices(torch.tensor(tokenizer(text.moby_dick(), verbose=False).input_ids), 24, count).tolist()
    rule, end = None if greedy else ADVISED, tokenizer.eos_token_id
    options = {"sampling": rule, "seed": list(range(count)), "eos_token_id": end}
    free = generate(model, asked, minimum, **options)
    made = {"asked": generate(model, asked, minimum, min_new_tokens=minimum, **options)}
    made["novel"] = generate(model, novel, minimum, min_new_tokens=minimum, **options)
    found: dict[str, Any] = {"natural": [one.new_tokens if one.finish == "eos" else None for one in free]}
    for name, prompts in (("asked", asked), ("novel", novel)):
        rows = [one.tokens for one in made[name]]
        found[name] = {
            "end": [_end_mass(model, old, new, end) for old, new in zip(prompts, rows, strict=True)],
            "distinct": [
                [round(hard.distinct(row[at : at + part]), 4) for at in range(0, minimum - part + 1, part)]
                for row in rows
            ],
            "loop": [hard.loop(row) for row in rows],
        }
    found["texts"] = [tokenizer.decode(one.tokens[:80]) for one in made["asked"]]
    return found["asked"] | {"natural": found["natural"], "texts": found["texts"], "control": found["novel"]}


@torch.inference_mode()
def _end_mass(model: Decoder, old: list[int], new: list[int], end: int) -> list[float]:
    """The probability of the end token where each new token was written."""
    logits = model(torch.tensor([[*old, *new[:-1]]]))[0, len(old) - 1 :]
    return [round(p, 4) for p in logits.softmax(-1)[:, end].tolist()]


# ---------------------------------------------------------------- an atlas of what rules cut

K40, P95, M05, WARM = (Sampling(1.0, **one) for one in ({"top_k": 40}, {"top_p": 0.95}, {"min_p": 0.05}, {}))
CUTS = {
    "top-k 40": (K40,), "top-p 0.95": (P95,), "min-p 0.05": (M05,), "top-k 40, then top-p 0.95": (K40, P95),
    "top-p 0.95, then top-k 40": (P95, K40),
}  # fmt: skip
LEVELS = (0.5, 0.95, 0.99)  # shares of the probability that the most likely tokens reach together


def atlas(steps: int = 5000, bins: int = 40, source: str = "novel") -> dict[str, Any]:
    """What each rule leaves of SmolLM2's distribution at so many places of a text, in order of their entropy.

    Args:
        source: ``"novel"``, the text as its author wrote it, or ``"own"``, what the model itself draws from it.

    Returns ``entropy`` (nats), ``counts`` and ``mass`` by rule of :data:`CUTS`, and ``ranks``, how many tokens reach
    each of :data:`LEVELS`: medians (mass: means) of ``bins`` groups of equally many steps, from the surest to the most
    open. ``shares`` of all steps: where top-k 40 leaves fewer than top-p 0.95, where equally many, and where the order
    of the two changes what stays; ``lost``, the mean mass outside each rule; ``taken``, mean and largest count.
    """
    whole(1, steps=steps, bins=bins)
    one_of(("novel", "own"), source=source)
    model, tokenizer = _smollm2()
    length, before = min(250, steps), 24
    novel = torch.tensor(tokenizer(text.moby_dick(), verbose=False).input_ids)
    rows = text.slices(novel, length + before, -(-steps // length))
    if source == "own":
        written = generate(model, rows[:, :before].tolist(), length, sampling=WARM, seed=list(range(len(rows))))
        rows = torch.tensor([[*old[:before], *one.tokens] for old, one in zip(rows.tolist(), written, strict=True)])
    found: dict[str, list[Tensor]] = {"entropy": [], **{f"rank {level}": [] for level in LEVELS}}
    for row in rows:
        with torch.inference_mode():
            logits = model(row[None, :-1])[0, before - 1 :]  # (length, V), one for each token behind the beginning
            p = logits.softmax(-1)
            found["entropy"].append(-(p * p.clamp(min=1e-30).log()).sum(-1))
            reached = p.sort(descending=True).values.cumsum(-1)
            for level in LEVELS:
                found[f"rank {level}"].append((reached < level).sum(-1) + 1)
            for name, rules in CUTS.items():
                mass, count = hard.kept(logits, rules)
                found.setdefault(f"mass {name}", []).append(mass)
                found.setdefault(f"count {name}", []).append(count)
    return _summary({name: torch.cat(parts)[:steps].double() for name, parts in found.items()}, bins)


def _summary(found: dict[str, Tensor], bins: int) -> dict[str, Any]:
    order = found["entropy"].argsort()

    def grouped(name: str, mean: bool = False, digits: int = 1) -> list[float]:
        groups = [found[name][some] for some in order.tensor_split(bins)]
        return [round(float(one.mean() if mean else one.median()), digits) for one in groups]

    k, p, both, turned = (found[f"count {name}"] for name in CUTS if "min-p" not in name)
    return {
        "entropy": grouped("entropy", digits=3),
        "ranks": {str(level): grouped(f"rank {level}") for level in LEVELS},
        "counts": {name: grouped(f"count {name}") for name in CUTS},
        "mass": {name: grouped(f"mass {name}", mean=True, digits=4) for name in CUTS},
        "shares": {
            "top-k cuts deeper": (k < p).double().mean().item(),
            "equally deep": (k == p).double().mean().item(),
            "order matters": (both != turned).double().mean().item(),
        },
        "lost": {name: 1 - found[f"mass {name}"].mean().item() for name in CUTS},
        "taken": {name: [found[f"count {name}"].mean().item(), int(found[f"count {name}"].max())] for name in CUTS},
    }
