"""The whole model: DeepSeek-V3's architecture, at a size that two CPU cores train in an afternoon.

Nothing in it is new. :class:`Whole` puts together what the chapters built: a decoder whose first layer is dense and
whose others are mixtures of fine-grained experts beside a shared one, with latent attention and a selection bias; and
behind it the module that predicts one token more::

    states = decoder(ids[..., :-2])                        # (B, T, C), behind the last norm
    loss   = CE(head(states), next)                        # token t + 1
    loss  += weight * CE(head(module(states, next)), after)  # token t + 2, by the same head
    loss  += alpha * sequence_loss                         # small; the bias balances the load

The files are those of transformers' ``DeepseekV3ForCausalLM``. Shapes: B sequences, T tokens, C hidden size.

Book: ``chapters/architecture/whole.ipynb``. It is trained by :mod:`dslib.performance.pretrain`, in the quicker steps of
:mod:`dslib.fast.training_step`. Sources: DeepSeek-V3 (arXiv 2412.19437): figure 2 for the whole, section 2.2 for the
prediction of more than one token, 4.2 for its sizes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dslib.architecture.balance import total_balance_loss
from dslib.architecture.cache import KVCache
from dslib.architecture.decoder import build, initialise, with_blocks
from dslib.architecture.layers import Block, RMSNorm
from dslib.architecture.sparse_decoder import SparseConfig, SparseDecoder
from dslib.architecture.weights.checkpoint import load_hf_state_dict, to_hf_state_dict
from dslib.architecture.weights.config import config_from_hf, config_to_hf
from dslib.data.files import WeightsNotFound, data_path


class PredictionModule(nn.Module):
    """Multi-token prediction: from the states that predict token t + 1, and that token, the states that predict t + 2.

    A norm for each of the two, one projection from both to C, one block of the decoder's kind, one norm. The embedding
    and the head are the decoder's own.
    """

    def __init__(self, decoder: SparseDecoder):
        super().__init__()
        size, eps = decoder.config.hidden_size, decoder.config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.block = decoder.make_block(decoder.config.num_hidden_layers)  # always a mixture
        self.norm = RMSNorm(size, eps)
        self.apply(initialise)

    def forward(
        self, decoder: SparseDecoder, states: Tensor, next_ids: Tensor, cache: KVCache | None = None, run=Block.__call__
    ) -> Tensor:
        """(B, T, C) states behind the decoder's last norm, (B, T) ids of the tokens after -> (B, T, C)."""
        both = torch.cat((self.enorm(decoder.embed_tokens(next_ids)), self.hnorm(states)), dim=-1)  # (B, T, 2 C)
        x, step, rope = decoder.place(self.eh_proj(both), cache)
        return self.norm(run(self.block, x, rope, step, cache, 0))


class Losses(NamedTuple):
    """Scalars of one batch: cross-entropy in nats a token of the next token, of the one after it, and of the load."""

    next_token: Tensor
    after_next: Tensor
    balance: Tensor


class Whole(nn.Module):
    """A decoder and its prediction module. Generating needs ``decoder`` alone.

    Args:
        config: with latent attention or without, with experts; ``tiny_deepseek()`` by default.
    """

    def __init__(self, config: SparseConfig | None = None):
        super().__init__()
        self.decoder: SparseDecoder = build(config or tiny_deepseek())
        self.config, self.prediction = self.decoder.config, PredictionModule(self.decoder)

    def states(self, input_ids: Tensor, run=Block.__call__) -> Tensor:
        """(B, T) ids -> (B, T, C), what the head makes logits of. ``run`` calls a block; another may do so sooner."""
        decoder = self.decoder
        x, step, rope = decoder.place(decoder.embed_tokens(input_ids))
        for layer, block in enumerate(decoder.layers):
            x = run(block, x, rope, step, None, layer, input_ids)
        return decoder.norm(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, V) logits of the next token."""
        return self.decoder.lm_head(self.states(input_ids))

    def losses(self, rows: Tensor, predicted: int | None = None, run=Block.__call__, head_loss=None) -> Losses:
        """Losses of (B, T + 2) token ids: T are read, T are predicted once and T twice.

        ``predicted`` is how many of the B rows the prediction module sees; None for all. It costs half of what the
        decoder does, and a share of the rows gives the same gradient on average. ``run`` is as in :meth:`states`,
        ``head_loss`` what stands for :meth:`cross_entropy`.
        """
        head_loss = head_loss or self.cross_entropy
        states = self.states(rows[:, :-2], run)  # (B, T, C)
        some = rows[:predicted]
        further = self.prediction(self.decoder, states[: len(some)], some[:, 1:-1], run=run)
        balance = total_balance_loss(self.decoder, sequence=1.0, batch_size=len(rows))
        balance = balance + total_balance_loss(self.prediction, sequence=1.0, batch_size=len(some))
        return Losses(head_loss(states, rows[:, 1:-1]), head_loss(further, some[:, 2:]), balance)

    def cross_entropy(self, states: Tensor, targets: Tensor) -> Tensor:
        """Mean over (B, T) targets, in nats, of the head's logits of (B, T, C) states."""
        return F.cross_entropy(self.decoder.lm_head(states).flatten(0, 1).float(), targets.flatten())


def tiny_deepseek(**changes) -> SparseConfig:
    """The shape of the course's own model: DeepSeek-V3's parts with 4.8 million parameters, 3.0 of them active."""
    fields = {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "kv_lora_rank": 64, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16,
        "v_head_dim": 64, "first_k_dense_replace": 1, "num_experts": 16, "num_experts_per_tok": 4,
        "moe_intermediate_size": 48, "n_shared_experts": 1, "scoring_func": "sigmoid", "norm_topk_prob": True,
        "selection_bias": True,
    }  # fmt: skip
    return SparseConfig(**fields | changes)


WEIGHTS, PREDICTION, HASHES = "model.safetensors", "prediction.safetensors", "hashes.json"


def save(model: Whole, folder: str | Path, *, joined: bool = False) -> None:
    """Write ``config.json`` and the weights in bfloat16 into ``folder``, as transformers' ``DeepseekV3ForCausalLM`` has
    them, experts apart.

    The prediction module has the number of the layer after the last. transformers names it unexpected unless told, so
    that it travels in a file of its own; ``joined`` puts it where DeepSeek's files have it, into the one file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    longer, own, here = _longer(model)
    tensors = to_hf_state_dict(longer, "apart") | own
    module = {name: tensors.pop(name) for name in list(tensors) if name.startswith(here)}
    files = {WEIGHTS: tensors | module} if joined else {WEIGHTS: tensors, PREDICTION: module}
    for name, tensors in files.items():
        save_file({key: _stored(key, value) for key, value in tensors.items()}, folder / name, {"format": "pt"})
    hashes = {name: _sha256(folder / name) for name in files}
    for name, value in (("config.json", config_to_hf(model.config)), (HASHES, hashes)):
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def load(folder: str | Path | None = None, *, dtype: torch.dtype = torch.float32) -> tuple[Whole, Any]:
    """The model in ``folder`` and its tokenizer (of transformers); by default the one that ships with the book.

    Raises WeightsNotFound naming a missing file, ValueError for one that is not what was saved or of another shape.
    """
    from transformers import AutoTokenizer  # slow to import, and only needed here

    folder = data_path("tiny-deepseek") if folder is None else Path(folder)
    for name in ("config.json", WEIGHTS, PREDICTION, HASHES):
        if not (folder / name).is_file():
            raise WeightsNotFound(f"{name}: not in {folder}; `make model` trains the weights")
    for name, wanted in json.loads((folder / HASHES).read_text(encoding="utf-8")).items():
        if (found := _sha256(folder / name)) != wanted:
            raise ValueError(f"{folder / name}: altered or cut short (sha256 {found[:12]}…, expected {wanted[:12]}…)")
    model = Whole(config_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    read(model, folder)
    return model.to(dtype).eval(), AutoTokenizer.from_pretrained(folder)


def read(model: Whole, folder: Path) -> None:
    """Copy the weights in ``folder`` into ``model``. Raises ValueError where they are not of its configuration."""
    tensors, (longer, own, _) = load_file(folder / WEIGHTS) | load_file(folder / PREDICTION), _longer(model)
    if missing := sorted(set(own) - set(tensors)):
        raise ValueError(f"{PREDICTION}: has no {missing[0]}, expected the prediction module of this configuration")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(tensors.pop(name))
    load_hf_state_dict(longer, tensors)


def _longer(model: Whole) -> tuple[SparseDecoder, dict[str, Tensor], str]:
    """A decoder with the module's block as one more layer; its other weights by names in files; their prefix."""
    last, module = model.config.num_hidden_layers, model.prediction
    longer = with_blocks(model.decoder, [*model.decoder.layers, module.block], range(last + 1))
    own = {"enorm": module.enorm, "hnorm": module.hnorm, "eh_proj": module.eh_proj, "shared_head.norm": module.norm}
    here = f"model.layers.{last}."
    return longer, {f"{here}{name}.weight": part.weight for name, part in own.items()}, here


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _stored(name: str, tensor: Tensor) -> Tensor:
    """In bfloat16; the selection bias stays in float32, as in DeepSeek's files: it settles close calls."""
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
    return tensor.detach().to(dtype).contiguous().clone()
