"""When one token of one sequence may take the lean way: :class:`~dslib.fast.lean_step.LeanStep` for the modules.

:class:`TokenStep` is the shortcut of a whole decoder. It stands for the model's ``forward``, and hands a call on to the
lean step if it asks for one new token of one sequence and every module that the step leaves out is what it was written
for. Any other call, and any model in which something was changed, goes through the modules.

``tests/fast/test_token_step.py`` holds the step to the decoder, ``tests/fast/test_exact.py`` the choice to whole
passes.
"""

import math

import torch
from torch import Tensor, nn

from dslib.architecture.cache import KVCache, PreallocatedCache
from dslib.architecture.decoder import Decoder
from dslib.architecture.fusion import VisionLanguageDecoder
from dslib.architecture.int4.layers import Int4Linear
from dslib.architecture.layers import Attention, Block, RMSNorm, SwiGLU
from dslib.architecture.sparse_decoder import SparseBlock, SparseDecoder
from dslib.architecture.vision.cross_attention import Gate, GatedCrossAttention, ImageContext, SeeingBlock
from dslib.architecture.window import RollingCache
from dslib.exact import first_unlike, own_method
from dslib.fast.int4 import QuickInt4
from dslib.fast.lean_step import LeanStep
from dslib.fast.shortcut import Shortcut, Snapshot, shortcut_of, watched

MODELS = (Decoder, SparseDecoder, VisionLanguageDecoder)
KINDS = (  # a SparseDecoder has such blocks where its first layers are dense
    nn.ModuleList, nn.Embedding, nn.Linear, Int4Linear, RMSNorm, Block, SparseBlock, SeeingBlock, Attention, SwiGLU,
    GatedCrossAttention, Gate,
)  # fmt: skip
ELSEWHERE = ("vision", "projector")  # parts of a model that a token of text does not go through


class TokenStep(Shortcut):
    """The forward pass of a decoder, by :class:`LeanStep` where one new token of one sequence is asked for."""

    what = "one token of one sequence without module calls"

    def __init__(self, module: Decoder):
        super().__init__(module)
        self._snapshot: Snapshot | None = None
        self._step: LeanStep | None = None
        self._reason: str | None = None

    def __call__(
        self, input_ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
        logits_at: Tensor | None = None, image: ImageContext | None = None,
    ) -> Tensor:  # fmt: skip
        """As :meth:`Decoder.forward`."""
        if self._is_one_token(input_ids, cache, positions, logits_at, image) and self.why_not() is None:
            return self._step(int(input_ids), cache, image).unsqueeze(1)  # (1, 1, vocab_size)
        seen = {} if image is None else {"image": image}
        return self.plain(input_ids, cache, positions, logits_at, **seen)

    def _is_one_token(self, input_ids, cache, positions, logits_at, image) -> bool:
        """Whether this call is one that the loop is for. Calls that are wrong go to the model, which says why."""
        model = self.stands_for
        config = model.config
        return (
            input_ids.shape == (1, 1) and positions is None and logits_at is None and not watched()
            and input_ids.dtype in (torch.int64, torch.int32) and input_ids.device.type == "cpu"
            and 0 <= int(input_ids) < config.vocab_size
            and type(cache) in (PreallocatedCache, RollingCache) and cache.batch_size == 1
            and (cache.window, cache.sinks) == (config.sliding_window, config.attention_sinks)
            and not (cache.sinks and type(cache) is PreallocatedCache)  # they leave a gap, which needs a mask
            and cache.length < getattr(cache, "max_length", math.inf)
            and (cache.buffer.dtype, cache.buffer.device.type) == (model.embed_tokens.weight.dtype, "cpu")
            and (image is None or (
                type(model) is VisionLanguageDecoder and image.batch_size == 1
                and (image.tokens is None) == (config.fusion == "cross") and not image.enters(cache)
            ))
        )  # fmt: skip

    def why_not(self) -> str | None:
        """Why modules run one by one for now; None if the loop stands for them."""
        if self._snapshot is None or not self._snapshot.same():
            self._reason = why_not(self.stands_for)
            with torch.inference_mode(False), torch.no_grad():  # what is made here has to serve in both modes
                self._step = LeanStep(self.stands_for) if self._reason is None else None
            self._snapshot = Snapshot(self.stands_for, skip=ELSEWHERE)
        return self._reason


def why_not(model: Decoder) -> str | None:
    """What keeps :class:`LeanStep` from standing for the modules of ``model``; None if nothing does.

    Blocks have plain attention and a dense feed-forward network, on a CPU, in the sizes that the configuration says.
    Weights of four bits need their kernel.
    """
    if type(model) not in MODELS:
        return f"is a {type(model).__name__}"
    weight = model.embed_tokens.weight
    if weight.device.type != "cpu":  # elsewhere, kernel launches and not Python set the pace
        return f"is on {weight.device.type}"
    places = {(p.dtype, p.device) for n, p in model.named_parameters() if n.partition(".")[0] not in ELSEWHERE}
    if len(places) > 1:
        return "has parameters of several dtypes or devices"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"is in {weight.dtype}"
    if (own := own_method(model)) is not None:
        return f"has a {own} of its own"
    if (reason := first_unlike(model, KINDS, biased=("qkv_proj", "gate", "mlp_gate"), skip=ELSEWHERE)) is not None:
        return reason
    for name, part in model.named_modules():
        if isinstance(part, Int4Linear):
            quick = shortcut_of(part)
            reason = quick.why_not() if isinstance(quick, QuickInt4) else "is not prepared"
            if reason is not None:
                return f"{name} {reason}"
    found, wanted = _shape(model), _shape(_as_configured(model))
    different = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    return f"{different[0]} is not what the configuration says" if different else None


def _as_configured(model: Decoder) -> Decoder:
    """A model of the same configuration, without memory; an image stream, which does not matter here, is shared."""
    vision = (model.vision,) if isinstance(model, VisionLanguageDecoder) else ()
    with torch.device("meta"):
        return type(model)(model.config, *vision)


def _shape(model: Decoder) -> dict[str, tuple]:
    """By name, what the loop relies on: kinds, sizes and settings of all modules that a token of text goes through."""
    found = {}
    for name, part in model.named_modules(remove_duplicate=False):
        if name.partition(".")[0] in ELSEWHERE:
            continue
        if isinstance(part, nn.Linear | Int4Linear):  # either may stand where a Linear is configured
            found[name] = (part.in_features, part.out_features, part.bias is not None)
        else:
            sizes = tuple(weight.shape for weight in part._parameters.values() if weight is not None)
            found[name] = (type(part), sizes, *(vars(part).get(key) for key in Snapshot.SETTINGS if key != "config"))
    return found
