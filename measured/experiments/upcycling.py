"""A dense model grows into a mixture: what it gains at equal tokens and at equal FLOPs, and what a real one takes.

:func:`grow` is a run of the harness of :mod:`~measured.experiments.does_it_help`: the dense twin of the course's own
model trains for a while, becomes one thing or another, and trains on. All arms of a seed read the same rows, and all
restart their optimisers at the turn::

    arms = {arm: [grow(arm, seed) for seed in range(3)] for arm in GROWN}
    difference(arms["slices"], arms["dense, continued"], "flops")    # bits a byte; above 0: worse

Recorded by ``make record PART=upcycling-rates-0`` (to 4) and ``PART=upcycling-0`` (to 14).

Book: ``chapters/migration/upcycling.ipynb``.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.architecture.balance import moe_layers
from dslib.architecture.decoder import count_parameters
from dslib.architecture.layers import SwiGLU
from dslib.architecture.moe import MoE, Router
from dslib.architecture.sparse_decoder import SparseDecoder
from dslib.architecture.weights.checkpoint import to_hf_state_dict
from dslib.architecture.weights.config import config_to_hf
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.architecture.whole import Whole
from dslib.check import above, one_of, whole
from dslib.data import corpus
from dslib.data.text import moby_dick, slices
from dslib.migration.upcycling import merge_experts, upcycle
from dslib.performance.pretrain import WINDOW, WINDOWS, Progress, bits_per_byte, byte_lengths, pretrain, training_flops
from measured.experiments import does_it_help as harness
from measured.machine import as_device
from measured.timing import compare, stopwatch

DENSE, INNER = "dense, active size", 272  # 273 in that arm; this one can be cut into four
V3 = {"scoring_func": "sigmoid", "selection_bias": True}  # and weights that sum to one, times the slices
GROWN: dict[str, dict[str, Any] | None] = {
    "dense, continued": None,
    "copies with noise": {"num_experts": 4, "top_k": 2, "noise": 0.1},  # twice the feed-forward work
    "slices": {"num_experts": 4, "top_k": 1, "split": 4},  # the same work as the dense one: 4 of 16 quarters
    "shared": {"num_experts": 4, "top_k": 1, "split": 4, "way": "shared"},  # twice: the whole, and 4 of 16 quarters
    "from scratch": None,  # tiny-deepseek's own mixture, as much work as the dense one
}

Weights = list[tuple[Tensor, Tensor]]


def expert_weights(model: nn.Module) -> Weights:
    """A copy of the experts' matrices, a pair for each mixture."""
    parts = (layer.experts for layer in moe_layers(model))
    return [(part.gate_up_proj.detach().clone(), part.down_proj.detach().clone()) for part in parts]


def divergence(before: Weights, now: Iterable[MoE], split: int = 1) -> float:
    """How differently experts have moved: 1 less the mean cosine of two experts' moves, mean over layers.

    About 1 where moves have nothing in common, 0 where all are alike; a pair of which one has not moved counts 0. With
    ``split``, only slices of the same place in their copies are compared.
    """
    found = []
    for (gate_up, down), layer in zip(before, now, strict=True):
        moves = (layer.experts.gate_up_proj.detach() - gate_up, layer.experts.down_proj.detach() - down)
        moved = F.normalize(torch.cat([move.double().flatten(1) for move in moves], 1))  # (E g, 3 I H / g)
        for part in moved.view(-1, split, moved.shape[1]).unbind(1):  # (E, ...) each
            both = torch.outer(part.any(1), part.any(1)).triu(1)
            found.append(((1 - part @ part.T) * both).sum().item() * 2 / (len(part) * (len(part) - 1)))
    return sum(found) / max(1, len(found))


def _alone(decoder: SparseDecoder) -> Whole:
    made = harness.Alone(decoder.config)
    made.decoder = decoder
    return made


def grow(
    arm: str = "slices", seed: int = 0, rate: float = 8e-3, before: int = 240, steps: int = 240, tokens: int = 4096,
    length: int = 256, every: int = 20, windows: int = WINDOWS, precision: str = "bfloat16",
    compiled: bool | None = None, changes: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """``before`` steps as a dense model, then ``steps`` as the arm says; "from scratch" is a mixture all the time.

    Returns ``rows`` as :func:`does_it_help.run`, counted from the beginning, with the experts' ``divergence`` in this
    stretch; ``turn``, bits a byte before and after it; ``home``, bits of the copies' mean at the end; ``parameters``.
    """
    one_of(GROWN, arm=arm)
    whole(1, before=before, steps=steps, every=every, windows=windows)
    above(0, rate=rate)
    stream, size = corpus.token_stream("train")
    held = torch.from_numpy(corpus.token_stream("validation")[0].astype("int64"))
    held, sizes = slices(held, min(WINDOW, length + 1), windows), byte_lengths(corpus.tokenizer())
    bits, rows, used = partial(bits_per_byte, rows=held, lengths=sizes), [], {"tokens": 0, "flops": 0.0}

    def stretch(model: Whole, own_seed: int, count: int) -> None:
        kept, split = expert_weights(model), 1 if GROWN[arm] is None else GROWN[arm].get("split", 1)
        plan = harness._plan(harness.ARMS[DENSE], own_seed, rate, tokens, length)
        work, start = training_flops(model, plan) * tokens, dict(used)

        def told(at: Progress) -> bool:
            used["tokens"], used["flops"] = start["tokens"] + at.step * tokens, start["flops"] + at.step * work
            if at.step % every == 0 or at.step == count:
                apart = divergence(kept, moe_layers(model), split) if kept else None
                rows.append({**used, "bits": bits(model), "busiest": at.busiest, "divergence": apart})
            return at.step == count

        pretrain(model, stream, size / len(stream), plan, precision=precision, compiled=compiled, on_progress=told)

    kind, shape = (harness.BASE, {}) if arm == "from scratch" else (DENSE, {"intermediate_size": INNER})
    model = harness.make(kind, seed, **shape | (changes or {}))
    stretch(model, seed, before)
    turn = [bits(model)]
    if GROWN[arm] is not None:
        model = _alone(upcycle(model.decoder, seed=seed, **V3, **GROWN[arm]))
    turn.append(bits(model))
    stretch(model, seed + 1000, steps)
    home = bits(_alone(merge_experts(model.decoder))) if arm == "copies with noise" else None
    return {"rows": rows, "turn": turn, "home": home, "parameters": count_parameters(model)}


def in_transformers(model: SparseDecoder) -> Any:
    """The same tensors in transformers' class: DeepSeek-V3's with latent attention, else Mixtral's."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM

    config = model.config
    if config.kv_lora_rank is not None:
        whole(1, n_shared_experts=config.n_shared_experts)  # their class always has one
        kind, theirs = DeepseekV3ForCausalLM, DeepseekV3Config(**config_to_hf(config))
    else:
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "num_experts_per_tok", "max_position_embeddings", "rms_norm_eps",
            "tie_word_embeddings",
        )  # fmt: skip
        kind, theirs = MixtralForCausalLM, MixtralConfig(
            **{name: getattr(config, name) for name in names}, num_local_experts=config.num_experts,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, sliding_window=None,
        )  # fmt: skip
    with torch.device("meta"):
        twin = kind(theirs)
    twin.load_state_dict(to_hf_state_dict(model), strict=False, assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config)  # its buffers were on meta
    return twin.eval()


@torch.inference_mode()
def smollm2_mixture(copies: int = 4, top_k: int = 2, tokens: int = 128) -> dict[str, Any]:
    """SmolLM2 as a mixture of copies, on so many tokens of a novel.

    Returns ``parameters`` before and after, ``seconds`` to convert; relative errors of the logits, ``ours`` and
    ``transformers``' (Mixtral's class), and ``kept``, the share of most likely tokens that stay; the same for weights
    that are not made to sum to one, as ``error_as_they_are`` and ``kept_as_they_are``.
    """
    dense, tokenizer = load_smollm2()
    ids = torch.tensor([tokenizer(moby_dick(), verbose=False).input_ids[:tokens]])
    wanted, watch = dense(ids), stopwatch()
    mixture = upcycle(dense, copies, top_k)
    seconds = watch.lap()
    error = lambda logits: ((logits - wanted).norm() / wanted.norm()).item()  # noqa: E731
    kept = lambda logits: (logits.argmax(-1) == wanted.argmax(-1)).double().mean().item()  # noqa: E731
    ours, theirs = mixture(ids), in_transformers(mixture)(ids).logits
    found = {"ours": error(ours), "transformers": error(theirs), "kept": kept(ours)}
    for layer in moe_layers(mixture):
        layer.router.norm_topk_prob = False
    plain = mixture(ids)
    found |= {"error_as_they_are": error(plain), "kept_as_they_are": kept(plain)}
    return {"parameters": [count_parameters(dense), count_parameters(mixture)], "seconds": seconds, **found}


@torch.inference_mode()
def layer_cost(
    hidden_size: int = 256, inner: int = 352, copies: int = 4, top_k: int = 2, split: int = 4,
    tokens: Sequence[int] = (1, 64, 512), dtype: str = "float32", rounds: int = 5, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Time of one feed-forward layer, router included: the dense one, and what it may become.

    Returns ``rows``, one for each number of tokens, with a Timing of ``dense``, of ``copies`` (``top_k`` of them run)
    and of ``slices`` (``split`` of ``copies x split``: as many operations as the dense one).
    """
    torch.manual_seed(seed)
    device, kind = as_device(None), getattr(torch, dtype)

    def mixture(split: int, top_k: int) -> MoE:
        sizes = hidden_size, copies * split, top_k * split
        router = Router(*sizes, norm_topk_prob=True, routed_scaling_factor=float(split))
        return MoE(hidden_size, inner // split, router)

    layers = {"dense": SwiGLU(hidden_size, inner), "copies": mixture(1, top_k), "slices": mixture(split, 1)}
    layers, rows = {name: layer.to(device, kind) for name, layer in layers.items()}, []
    for count in tokens:
        x = torch.randn(count, hidden_size, device=device, dtype=kind)
        calls = {name: partial(layer, x) for name, layer in layers.items()}
        rows.append({"tokens": count, **compare(calls, rounds=rounds, warmup=1, device=device)})
    return {"rows": rows}
