"""When one token of one sequence may take the lean way: :class:`~dslib.fast.lean_step.LeanStep` for the modules.

:class:`TokenStep` is the shortcut of a whole decoder. It stands for the model's ``forward``, and hands a call on to the
lean step if it asks for one new token of one sequence and every module that the step leaves out is what it was written
for. Any other call, and any model in which something was changed, goes through the modules.

``tests/fast/test_token_step.py`` holds the step to the decoder, ``tests/fast/test_exact.py`` the choice to whole
passes.
"""

import dataclasses
import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from dslib.architecture.cache import KVCache, PreallocatedCache
from dslib.architecture.decoder import Decoder
from dslib.architecture.experts import Experts
from dslib.architecture.fusion import VisionLanguageDecoder
from dslib.architecture.int4.layers import Int4Experts, Int4Linear
from dslib.architecture.layers import Attention, Block, RMSNorm, SwiGLU
from dslib.architecture.moe import MoE, Router
from dslib.architecture.published import MultiHeadLatentAttention
from dslib.architecture.sparse_decoder import SparseBlock, SparseDecoder
from dslib.architecture.vision.cross_attention import Gate, GatedCrossAttention, ImageContext, SeeingBlock
from dslib.architecture.window import RollingCache
from dslib.exact import as_shapes, as_written, own_method, unlike, written
from dslib.fast.int4 import QuickInt4
from dslib.fast.lean_step import LeanStep
from dslib.fast.shortcut import NO_SETTINGS, Shortcut, Snapshot, shortcut_of, watched

MODELS = (Decoder, SparseDecoder, VisionLanguageDecoder)
CACHES = (PreallocatedCache, RollingCache)
ELSEWHERE = ("vision", "projector")  # parts of a model that a token of text does not go through


class TokenStep(Shortcut):
    """The forward pass of a decoder, by :class:`LeanStep` where one new token of one sequence is asked for."""

    what = "one token of one sequence without module calls"

    def __call__(self, input_ids: Tensor, cache: KVCache | None = None, *rest, image=None, **named) -> Tensor:
        """As :meth:`Decoder.forward`."""
        asked = [value for value in (*rest, *named.values()) if value is not None]
        if not asked and self._is_one_token(input_ids, cache, image) and (step := self._look()[1]) is not None:
            return step(int(input_ids), cache, image).unsqueeze(1)  # (1, 1, vocab_size)
        seen = {} if image is None else {"image": image}
        return self.plain(input_ids, cache, *rest, **named, **seen)

    def __init__(self, module: Decoder):
        super().__init__(module)
        self._found: tuple[Snapshot, str | None, LeanStep | None] | None = None

    def _is_one_token(self, input_ids: Tensor, cache: KVCache | None, image: ImageContext | None) -> bool:
        """Whether this call is one that the loop is for. Calls that are wrong go to the model, which says why."""
        model = self.stands_for
        config = model.config
        return (
            input_ids.shape == (1, 1) and not watched()
            and input_ids.dtype in (torch.int64, torch.int32) and input_ids.device.type == "cpu"
            and 0 <= int(input_ids) < config.vocab_size
            and type(cache) in CACHES and as_written(type(cache)) and own_method(cache) is None
            and (cache.window, cache.sinks) == (config.sliding_window, config.attention_sinks)
            and not (cache.sinks and type(cache) is PreallocatedCache)  # they leave a gap, which needs a mask
            and cache.length < getattr(cache, "max_length", math.inf)
            and (cache.buffer.dtype, cache.buffer.device.type) == (model.embed_tokens.weight.dtype, "cpu")
            and (*cache.buffer.shape[:4], cache.buffer.shape[5])
            == (config.num_hidden_layers, config.cache_shape[0], 1, *config.cache_shape[1:])
            and (image is None or (
                type(model) is VisionLanguageDecoder and image.batch_size == 1
                and (image.mask is None or image.mask.ndim == 2)  # one mask for all tokens
                and (image.tokens is None) == (config.fusion == "cross") and not image.enters(cache)
                and len(image.keys_values) == (len(model.seeing()) if config.fusion == "cross" else 0)
            ))
        )  # fmt: skip

    def why_not(self) -> str | None:
        """Why modules run one by one for now; None if the loop stands for them."""
        return self._look()[0]

    def _look(self) -> tuple[str | None, LeanStep | None]:
        """Why not, or the step, for the model as it is now."""
        found = self._found
        if found is None or not found[0].same():
            reason, step = why_not(self.stands_for), None
            if reason is None:
                with torch.inference_mode(False), torch.no_grad():  # what is made here has to serve in both modes
                    step = LeanStep(self.stands_for)
            # At once, as threads may share the model; and last, as a step of four bits moves scales.
            self._found = found = Snapshot(self.stands_for, KINDS, skip=ELSEWHERE), reason, step
        return found[1:]


def why_not(model: Decoder) -> str | None:
    """What keeps :class:`LeanStep` from standing for the modules of ``model``; None if nothing does.

    Blocks are on a CPU, in the sizes that the configuration says. Weights of four bits need their kernel.
    """
    weight = model.embed_tokens.weight
    if weight.device.type != "cpu":  # elsewhere, kernel launches and not Python set the pace
        return f"is on {weight.device.type}"
    places = {(p.dtype, p.device) for n, p in model.named_parameters() if n.partition(".")[0] not in ELSEWHERE}
    if len(places) > 1:
        return "has parameters of several dtypes or devices"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"is in {weight.dtype}"
    if (reason := changed(model, (*KINDS, Int4Experts))) is not None:
        return reason
    if getattr(model.config, "num_hash_layers", 0):
        return "chooses experts by token id"
    for name, part in model.named_modules():
        if isinstance(part, MultiHeadLatentAttention) and isinstance(part.kv_b_proj, Int4Linear):
            return f"{name}.kv_b_proj has four bits"
        if isinstance(part, Int4Linear):
            quick = shortcut_of(part)
            reason = quick.why_not() if isinstance(quick, QuickInt4) else "is not prepared"
            if reason is not None:
                return f"{name} {reason}"
    return None


# Of every kind of module, the parts and settings that steps compute. What a module has beyond them is refused by name.
_BLOCK = "input_layernorm self_attn post_attention_layernorm mlp"
KNOWN = {
    **dict.fromkeys(MODELS, "config embed_tokens layers norm lm_head vision projector"),
    Block: _BLOCK,
    Attention: "qkv_proj o_proj query_heads kv_heads head_dim window sinks",
    MultiHeadLatentAttention: "q_proj q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj "
    "o_proj heads rank nope rope value scale compressed_queries",
    SwiGLU: "gate_up_proj down_proj",
    MoE: "router experts shared_experts shared_expert_gate",
    Router: "hidden_size num_experts top_k scoring_func norm_topk_prob n_group topk_group routed_scaling_factor weight "
    "tid2eid e_score_correction_bias",
    Experts: "num_experts hidden_size intermediate_size swiglu_limit gate_up_proj down_proj",
    RMSNorm: "weight eps",
    nn.Embedding: "weight num_embeddings embedding_dim norm_type",
    nn.Linear: "weight bias in_features out_features",
    SeeingBlock: f"{_BLOCK} cross number",
    GatedCrossAttention: "input_layernorm q_proj kv_proj o_proj query_heads kv_heads head_dim gate mlp "
    "post_attention_layernorm mlp_gate",
    Gate: "weight bias",
}
# A SparseDecoder has such blocks where its first layers are dense; four bits may stand for any linear layer.
KINDS = (*KNOWN, SparseBlock, nn.ModuleList, Int4Linear)
# A field of a configuration that is not among these has to have its default.
FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_theta rope_scaling rms_norm_eps tie_word_embeddings sliding_window attention_sinks "
    "qkv_bias fusion image_hidden_size gate cross_attention_every cross_intermediate_size swin num_experts "
    "num_experts_per_tok moe_intermediate_size n_shared_experts first_k_dense_replace num_hash_layers scoring_func "
    "norm_topk_prob n_group topk_group routed_scaling_factor selection_bias kv_lora_rank q_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim yarn"
).split()
for _kind in (*KINDS, *CACHES):
    written(_kind)


def changed(model: Decoder, kinds: Collection[type] = KINDS) -> str | None:
    """What whoever reads the weights of ``model`` would leave out; None if there is nothing.

    Modules are of the classes ``kinds``, unchanged, and as the configuration makes them; the configuration and all that
    it makes is in the lists above.
    """
    if (reason := unlike_module(model, kinds)) is not None:
        return reason
    found, vision = _parts(model), (model.vision,) if isinstance(model, VisionLanguageDecoder) else ()
    for field in dataclasses.fields(model.config):
        value = getattr(model.config, field.name)
        if field.name not in FIELDS and value != field.default:
            return f"has {field.name}={value!r}, which only the modules compute"
    with as_shapes():  # an image stream, which may be anything, is shared
        wanted = _parts(type(model)(model.config, *vision))
    for name in found | wanted:
        part, like = found.get(name), wanted.get(name)
        if part is None or like is None or not _same(part, like):
            return f"{name} is not what the configuration says"
        held = {**_held(like), **like._modules, **like._buffers}
        there = {key for key, value in held.items() if value is not None and value is not False}
        if type(like) in KNOWN and (more := there - set(KNOWN[type(like)].split())):
            return f"{name or 'the model'} has a {min(more)}, which only the modules compute"
    return None


def unlike_module(model: Decoder, kinds: Collection[type]) -> str | None:
    """Which of the modules is not one of ``kinds``, or changed; None if none is."""
    for name, part in _parts(model).items():
        if (reason := unlike(part, kinds if name else MODELS)) is not None:
            return f"{name} {reason}".strip()
    return None


def _parts(model: Decoder) -> dict[str, nn.Module]:
    """By name, all modules that a token of text goes through."""
    named = model.named_modules(remove_duplicate=False)
    return {name: part for name, part in named if name.partition(".")[0] not in ELSEWHERE}


def _held(part: nn.Module) -> dict:
    """By name, the settings of a module and the shapes of its parameters."""
    held = {name: value for name, value in vars(part).items() if name not in ("forward", "config", *NO_SETTINGS)}
    shapes = {name: value if value is None else value.shape for name, value in part._parameters.items()}
    return {name: value for name, value in (held | shapes).items() if name[0] != "_"}


def _same(part: nn.Module, like: nn.Module) -> bool:
    """Whether a module has kind, sizes and settings of the one that it should be like; others than KNOWN are called."""
    own, wanted = _held(part), _held(like)
    if isinstance(like, nn.Linear) and not isinstance(part, nn.Linear):  # a layer of fewer bits may stand there
        return all(own.get(name) == wanted[name] for name in ("in_features", "out_features"))
    if type(like) not in KNOWN or (type(like) is Experts and type(part) is Int4Experts):
        return True
    return type(part) is type(like) and all(own.get(name) == wanted[name] for name in wanted)
