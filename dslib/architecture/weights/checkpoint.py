"""Weights in and out: Hugging Face checkpoints <-> our decoders.

The families are those of :mod:`dslib.architecture.weights.config`. The layouts differ in a few places only:

* ours keeps query, key and value (and gate and up) as one matrix, theirs apart;
* experts are stacked in one tensor here and in transformers 5, but are files' worth of single matrices on the hub;
* DeepSeek's rotary pairs lie side by side, ours half a head apart (see :func:`_pairs_apart`).

Book: ``chapters/architecture/decoder.ipynb``, section "Real weights", and ``chapters/architecture/published.ipynb``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dslib.architecture.decoder import Decoder, DecoderConfig, build
from dslib.architecture.sparse_decoder import SparseConfig
from dslib.architecture.weights.config import config_from_hf
from dslib.check import one_of

# How experts are named: the block they are in and, if every expert has its own, the names of gate, up and down.
_LAYOUTS = {
    "stacked": ("mlp", None),  # transformers 5, in memory
    "apart": ("mlp", ("gate_proj", "up_proj", "down_proj")),  # the hub's files of DeepSeek-V2 and V3
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),  # the hub's files of Mixtral
}
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_COMPILED = "_orig_mod."  # what torch.compile puts into names


@dataclass(frozen=True)
class _Source:
    """Where the rows of one of our tensors come from: the named tensors, one below the other.

    Attributes:
        rows: how many come from each; None for a single tensor.
        order: int64; if given, our row i is row ``order[i]`` of theirs.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...] | None = None
    order: Tensor | None = None

    def split(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Our tensor cut into its parts, in our order of rows. Views."""
        if self.rows is None:
            return (ours,)
        return (ours if sum(self.rows) == len(ours) else ours.flatten(0, 1)).split(self.rows)  # flat: (E 2I, H)


def _sources(config: DecoderConfig, layout: str) -> dict[str, _Source]:
    """Our tensor name -> where it comes from."""
    names = {f"{name}.weight": _Source((f"model.{name}.weight",)) for name in ("embed_tokens", "norm")}
    sparse = isinstance(config, SparseConfig)
    for layer in range(config.num_hidden_layers):
        here = f"layers.{layer}."
        latent = sparse and config.kv_lora_rank is not None
        attention = _latent_attention(config) if latent else _attention(config)
        experts = sparse and layer >= config.first_k_dense_replace
        feed_forward = _experts(config, layout, layer) if experts else _swiglu("mlp.", config.intermediate_size)
        for name, source in (*attention, *feed_forward, *map(_same, _NORMS)):
            parts = tuple(f"model.{here}{part}" for part in source.parts)
            names[here + name] = _Source(parts, source.rows, source.order)
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = _Source(("lm_head.weight",))
    return names


def _same(name: str) -> tuple[str, _Source]:
    return name, _Source((name,))


def _attention(config: DecoderConfig) -> Iterator[tuple[str, _Source]]:
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        parts = tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")
        yield f"self_attn.qkv_proj.{kind}", _Source(parts, (query, key, key))
    if config.qk_norm:
        yield from map(_same, ("self_attn.q_norm.weight", "self_attn.k_norm.weight"))
    yield _same("self_attn.o_proj.weight")


def _latent_attention(config: SparseConfig) -> Iterator[tuple[str, _Source]]:
    compressed = config.q_lora_rank is not None
    for name in ("kv_a_layernorm", "kv_b_proj", "o_proj", *(("q_a_proj", "q_a_layernorm") if compressed else ())):
        yield _same(f"self_attn.{name}.weight")
    queries = "q_b_proj" if compressed else "q_proj"
    turned = (
        (queries, config.qk_nope_head_dim, config.num_attention_heads),
        ("kv_a_proj_with_mqa", config.kv_lora_rank, 1),
    )
    for name, before, heads in turned:
        name = f"self_attn.{name}.weight"
        yield name, _Source((name,), order=_pairs_apart(before, config.qk_rope_head_dim, heads))


def _pairs_apart(before: int, rotated: int, heads: int) -> Tensor:
    """Order of rows that makes DeepSeek's rotary pairs ours, for ``heads`` heads of ``before`` plain rows each.

    DeepSeek turns neighbours, rows (0, 1), (2, 3) and so on; ``apply_rope`` turns row i with row i + half. A score does
    not change if query and key are reordered alike, so the projections' rows are, once, and rotating has one way.
    """
    ours = torch.cat((torch.arange(before), before + torch.arange(0, rotated, 2), before + torch.arange(1, rotated, 2)))
    return (torch.arange(heads).unsqueeze(1) * (before + rotated) + ours).flatten()


def _swiglu(prefix: str, size: int) -> Iterator[tuple[str, _Source]]:
    parts = (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
    yield f"{prefix}gate_up_proj.weight", _Source(parts, (size, size))
    yield _same(f"{prefix}down_proj.weight")


def _experts(config: SparseConfig, layout: str, layer: int) -> Iterator[tuple[str, _Source]]:
    block, single = _LAYOUTS[layout]
    hashed = layer < config.first_k_dense_replace + config.num_hash_layers
    router = ["weight"] + ["tid2eid"] * hashed + ["e_score_correction_bias"] * (config.selection_bias and not hashed)
    for name in router:
        yield f"mlp.router.{name}", _Source((f"{block}.gate.{name}",))
    if single is None:
        yield from map(_same, ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
    else:
        gate, up, down = single
        each = [f"{block}.experts.{expert}." for expert in range(config.num_experts)]
        inner = (config.moe_intermediate_size,) * (2 * config.num_experts)
        gates_and_ups = tuple(f"{expert}{name}.weight" for expert in each for name in (gate, up))
        yield "mlp.experts.gate_up_proj", _Source(gates_and_ups, inner)
        downs = tuple(f"{expert}{down}.weight" for expert in each)
        yield "mlp.experts.down_proj", _Source(downs, (config.hidden_size,) * config.num_experts)
    if config.n_shared_experts:
        yield from _swiglu("mlp.shared_experts.", config.n_shared_experts * config.moe_intermediate_size)


def _layout(names: Iterable[str]) -> str:
    """Which of the layouts of experts a state dict has; any will do for a dense model."""
    if any(".block_sparse_moe." in name for name in names):
        return "mixtral"
    return "apart" if any(".mlp.experts.0." in name for name in names) else "stacked"


def _prediction_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Prefixes of DeepSeek-V3's modules for multi-token prediction.

    Files have them as layers behind the last (``model.layers.61`` in V3), told from real ones by a projection of their
    own. The model's logits do not depend on them.
    """
    found = (re.fullmatch(r"(model\.layers\.\d+\.)eh_proj\.weight", name) for name in names)
    return tuple(match[1] for match in found if match)


def load_hf_state_dict(model: Decoder, state_dict: Mapping[str, Tensor]) -> Decoder:
    """Copy the weights of a ``ForCausalLM`` of one of the families into ``model``, in place; returns ``model``.

    Experts may be stacked or apart. A tied model may come with or without ``lm_head.weight``; if it comes, it must
    equal the embedding. Buffers of old checkpoints (``rotary_emb.inv_freq``) and modules for multi-token prediction are
    passed over, as is the prefix that ``torch.compile`` puts before names.

    Raises:
        ValueError: naming tensors that are missing, extra, misshapen, in 8 bits, without memory (on the meta device) or
            not dense (sparse, quantised); a model that is no decoder, or in four bits or packed. It is left as it was.
    """
    given = {name.replace(_COMPILED, ""): tensor for name, tensor in state_dict.items()}
    placed, skipped = _placed(model, _layout(given)), _prediction_layers(given)
    given = {n: t for n, t in given.items() if not n.endswith("rotary_emb.inv_freq") and not n.startswith(skipped)}
    pieces = {  # their name -> the place in our model
        part: (piece, source.order)
        for _, source, tensor in placed
        for part, piece in zip(source.parts, source.split(tensor), strict=True)
    }
    extra = sorted(set(given) - set(pieces))
    head, embedding = (given.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if tied_head := model.config.tie_word_embeddings and head is not None:
        extra.remove("lm_head.weight")
    problems = _listed("missing", sorted(set(pieces) - set(given))) + _listed("extra", extra)
    dense = {name: tensor for name, tensor in given.items() if _is_dense(tensor)}
    if eight_bit := [name for name, tensor in dense.items() if tensor.element_size() == 1]:
        problems = _listed("in 8 bits, to be multiplied out with their scales first", eight_bit)
    problems += _listed("without memory", [name for name, tensor in dense.items() if tensor.is_meta])
    problems += _listed("that are no dense tensors of numbers", sorted(given.keys() - dense))
    if not problems:
        shapes = {name: (tuple(given[name].shape), tuple(piece.shape)) for name, (piece, _) in pieces.items()}
        wrong = [f"{name} {got}, expected {wanted}" for name, (got, wanted) in shapes.items() if got != wanted]
        problems = _listed("misshapen", wrong)
    if problems:
        raise ValueError("state dict does not fit the config: " + "; ".join(problems))
    if tied_head and not torch.equal(head, embedding.to(head)):
        raise ValueError("lm_head.weight: differs from model.embed_tokens.weight, but the config ties them")
    with torch.no_grad():
        for name, (piece, order) in pieces.items():
            piece.copy_(given[name] if order is None else given[name][order])
    return model


def to_hf_state_dict(model: Decoder, layout: str = "stacked") -> dict[str, Tensor]:
    """The model's weights under the names of a Hugging Face ``ForCausalLM``.

    Views of the same memory, except where rotary rows are reordered.

    Args:
        layout: of experts: ``"stacked"`` as in transformers 5, ``"apart"`` or ``"mixtral"`` as in files.

    Raises:
        ValueError: unknown layout; a model that is no decoder, or has weights in another form (four bits) or more than
            such a checkpoint holds (an adapter's, an image stream's, a shared expert's gate, a limit inside experts).
    """
    one_of(_LAYOUTS, layout=layout)
    placed, out = _placed(model, layout), {}
    for name, part in model.named_modules():
        if (limit := getattr(part, "swiglu_limit", None)) is not None:
            raise ValueError(f"model: {name}.swiglu_limit is {limit}, expected None, as no family's files say it")
    if others := sorted(set(_tensors(model)) - {name for name, _, _ in placed}):
        raise ValueError("model: " + _listed("that such a checkpoint has no place for", others)[0])
    for _, source, tensor in placed:
        tensor = tensor.detach()
        tensor = tensor if source.order is None else tensor[source.order.argsort()]
        out.update(zip(source.parts, source.split(tensor), strict=True))
    return out


def _is_dense(value: Any) -> bool:
    """Whether a value can be copied into a parameter, if it has memory."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return not (value.is_quantized or value.is_nested or value.is_complex())


def _tensors(model: Decoder) -> dict[str, Tensor]:
    """Parameters and buffers (of routers) by name, tied ones once."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name.replace(_COMPILED, ""): tensor for name, tensor in named}


def _placed(model: Decoder, layout: str) -> list[tuple[str, _Source, Tensor]]:
    """Name, source and tensor of all that a checkpoint holds; a ValueError for a model in which that is not there."""
    if not isinstance(config := getattr(model, "config", None), DecoderConfig):
        raise ValueError(f"model: got a {type(model).__name__}, expected a Decoder")
    sources, ours = _sources(config, layout), _tensors(model)
    if absent := sorted(set(sources) - set(ours)):
        raise ValueError("model: " + _listed("missing, as in a quantised or wrapped model", absent)[0])
    if empty := [name for name in sources if ours[name].is_meta or not ours[name].numel()]:
        what = "without memory, expected to_empty() before, or fast.release() of packed ones"
        raise ValueError("model: " + _listed(what, empty)[0])
    return [(name, source, ours[name]) for name, source in sources.items()]


def decoder_from_hf(config: Any, state_dict: Mapping[str, Tensor], *, dtype=torch.float32, device="cpu") -> Decoder:
    """A decoder with the shape of a Hugging Face config and the weights of its state dict, in eval mode."""
    model = build(config_from_hf(config), device="meta", dtype=dtype).to_empty(device=device)
    model.tie_weights()  # to_empty gave each its own memory
    return load_hf_state_dict(model, state_dict).eval()


def _listed(what: str, names: list[str], most: int = 6) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what}: {', '.join(names[:most])}{more}"]
