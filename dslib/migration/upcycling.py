"""Upcycling: a trained dense decoder becomes a mixture of experts that computes at first what it did.

Every expert begins as a copy of the layer's feed-forward network f. A token that chooses k of E copies gets

    y = sum over the chosen of w_e f(x) = (sum of w_e) f(x)              # f(x), if and only if the weights sum to 1

so the router may be anything, as long as its weights are made to sum to one. Two more ways, exact too:

* *split*: a network cut along its inner layer is the sum of g small ones. E copies of g slices are E g fine-grained
  experts. The router scores the slices of a copy alike at first, so a token that chooses k g of them chooses k copies,
  and the factor g makes up for weights that sum to one over k g.
* *shared*: f becomes the shared expert, which always runs; routed experts begin with ``down`` at zero. Exact under any
  rule, as nothing is added.

With identical experts and weights that sum to one, what the router chooses changes nothing: its gradient from the
language loss is zero. It can learn only when the experts differ (``noise``, training), or from another target.

Shapes: H hidden size, I inner size, E experts.

Book: ``chapters/migration/upcycling.ipynb``. Sources: Sparse Upcycling (arXiv 2212.05055), virtual groups (arXiv
2410.07524), DeepSeekMoE (arXiv 2401.06066, section 3) for slices and the shared expert.
"""

import dataclasses

import torch
from torch import Tensor, nn

from dslib import check
from dslib.architecture.decoder import Decoder, DecoderConfig, build
from dslib.architecture.layers import SwiGLU
from dslib.architecture.moe import MoE
from dslib.architecture.sparse_decoder import SparseConfig, SparseDecoder

WAYS = ("copies", "shared")


@torch.no_grad()
def upcycle(
    model: Decoder, num_experts: int = 4, top_k: int = 2, *, split: int = 1, way: str = "copies", noise: float = 0.0,
    seed: int = 0, **rule,
) -> SparseDecoder:  # fmt: skip
    """A mixture with the weights of ``model``, which is not changed; dtype and device are its own.

    Args:
        num_experts, top_k: E copies, of which a token uses k. With ``split`` there are E g experts and k g are used.
        split: g, slices of each copy; a divisor of the inner size.
        way: ``"copies"``; or ``"shared"``, the network always runs and E g routed experts of I / g begin at zero.
        noise: normal noise on every routed expert, in standard deviations of its matrix; 0 for none.
        rule: fields of :class:`SparseConfig` for the router; weights sum to 1 unless it says otherwise, see
            :func:`starts_equal`.

    Raises:
        ValueError: a model with experts, a split that does not divide, or what :class:`SparseConfig` refuses.
    """
    if any(isinstance(part, MoE) for part in model.modules()):
        raise ValueError("model: has experts already, expected a dense one")
    if any(not isinstance(block.mlp, SwiGLU) for block in model.layers):
        kind = type(model.layers[0].mlp).__name__
        raise ValueError(f"model: its feed-forward networks are {kind}, expected SwiGLU with float weights")
    check.whole(1, split=split)
    check.one_of(WAYS, way=way)
    check.at_least(0, noise=noise)
    config = _config(model.config, num_experts, top_k, split, way, rule)
    first = model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    made = _with_routers(config, first, seed, generator)
    there = made.state_dict()
    made.load_state_dict({name: value for name, value in model.state_dict().items() if name in there}, strict=False)
    for old, new in zip(model.layers, made.layers, strict=True):
        _grow(new.mlp, old.mlp, split, way, noise, generator)
    return made.train(model.training)


def _config(dense: DecoderConfig, num_experts: int, top_k: int, split: int, way: str, rule: dict) -> SparseConfig:
    if dense.intermediate_size % split:
        raise ValueError(f"split: got {split}, expected a divisor of the inner size {dense.intermediate_size}")
    fields = {field.name: getattr(dense, field.name) for field in dataclasses.fields(dense)}
    fields |= {
        "num_experts": num_experts * split, "num_experts_per_tok": top_k * split, "first_k_dense_replace": 0,
        "moe_intermediate_size": dense.intermediate_size // split, "norm_topk_prob": True,
        "n_shared_experts": split if way == "shared" else 0,
    }  # fmt: skip
    if way == "copies":
        fields["routed_scaling_factor"] = float(split)
    return SparseConfig(**fields | rule)


def _with_routers(config: SparseConfig, like: Tensor, seed: int, generator: torch.Generator) -> SparseDecoder:
    """A mixture of which only the routers are drawn: all else is written over, and drawing experts takes longest."""
    if config.num_hash_layers:  # tables are drawn, too
        return build(config, seed=seed, device=like.device, dtype=like.dtype)
    made = build(config, device="meta", dtype=like.dtype).to_empty(device=like.device)
    made.tie_weights()
    for layer in (part for part in made.modules() if isinstance(part, MoE)):
        drawn = torch.randn(layer.router.weight.shape, generator=generator)
        layer.router.weight.copy_(0.02 * drawn)
        if layer.router.e_score_correction_bias is not None:
            layer.router.e_score_correction_bias.zero_()
    return made


def _grow(mixture: MoE, dense: SwiGLU, split: int, way: str, noise: float, generator: torch.Generator) -> None:
    experts, router = mixture.experts, mixture.router
    copies, weight = experts.num_experts // split, dense.gate_up_proj.weight
    gate, up = weight.chunk(2)  # (I, H) each
    slices = [torch.cat(parts) for parts in zip(gate.chunk(split), up.chunk(split), strict=True)]  # g of (2 I / g, H)
    experts.gate_up_proj.copy_(torch.stack(slices * copies))
    experts.down_proj.copy_(torch.stack(list(dense.down_proj.weight.chunk(split, dim=1)) * copies))
    if way == "shared":
        mixture.shared_experts.load_state_dict(dense.state_dict())
    elif split > 1:  # the router scores the slices of a copy alike
        router.weight.copy_(router.weight[::split].repeat_interleave(split, dim=0))
    for matrices in (experts.gate_up_proj, experts.down_proj):
        if noise:
            drawn = torch.randn(matrices.shape, generator=generator).to(matrices)
            matrices += noise * matrices.float().std().to(matrices.dtype) * drawn
    if way == "shared":
        experts.down_proj.zero_()


def starts_equal(config: SparseConfig, split: int = 1) -> bool:
    """Whether copies under this rule give at first what the dense network gave, whatever the router scores them.

    Weights have to sum to ``split``: made to sum to one, times that factor; or softmax weights of all experts.
    """
    all_chosen = config.scoring_func == "softmax" and config.num_experts_per_tok == config.num_experts
    return (config.norm_topk_prob or all_chosen) and config.routed_scaling_factor == split


@torch.no_grad()
def merge_experts(model: SparseDecoder, shares: list[Tensor] | None = None) -> Decoder:
    """The way home: one dense network a layer, the mean of its experts.

    Exact only while they are equal; how much it costs later is to be measured. ``shares`` weighs them, (E,) for each
    layer, of sum one: their load, for instance; equally by default.

    Raises:
        ValueError: experts that are slices or stand beside a shared one, shares of another shape.
    """
    config = model.config
    if config.n_shared_experts or config.moe_intermediate_size != config.intermediate_size:
        raise ValueError("model: expected whole copies without a shared expert, which no mean brings together")
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if config.kv_lora_rank is None:
        dense = DecoderConfig(**{field.name: fields[field.name] for field in dataclasses.fields(DecoderConfig)})
    else:
        dense = dataclasses.replace(config, first_k_dense_replace=config.num_hidden_layers)
    made = build(dense, device=model.embed_tokens.weight.device, dtype=model.embed_tokens.weight.dtype)
    there = made.state_dict()
    made.load_state_dict({name: value for name, value in model.state_dict().items() if name in there}, strict=False)
    shares = shares or [torch.full((config.num_experts,), 1 / config.num_experts)] * config.num_hidden_layers
    for old, new, share in zip(model.layers, made.layers, shares, strict=True):
        experts: nn.Module = old.mlp.experts
        if share.shape != (config.num_experts,):
            raise ValueError(f"shares: got shape {tuple(share.shape)}, expected ({config.num_experts},)")
        share = share.to(experts.down_proj.device, torch.float32)
        for mean, stack in ((new.mlp.gate_up_proj, experts.gate_up_proj), (new.mlp.down_proj, experts.down_proj)):
            mean.weight.copy_(torch.einsum("e,eij->ij", share, stack.float()))
    return made.train(model.training)
