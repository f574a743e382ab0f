"""The speed of a mixture-of-experts layer, beside transformers' and beside the dense layer that bounds it.

Book: ``chapters/architecture/moe.ipynb``. ``python -m measured.bench moe`` prints the whole grid.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dslib import fast
from dslib.architecture.layers import SwiGLU
from dslib.architecture.moe import MoE, Router
from dslib.fast.linear import onednn, packed_product
from measured.machine import as_device
from measured.timing import compare

# (experts, experts a token) and one expert's size as a share of the hidden size.
SHAPES = {(16, 2): 1.375, (64, 6): 0.5}
TOKENS = (1, 64, 512, 4096)
LARGEST_COPY = 2 << 30  # bytes; transformers' batched_mm copies an expert's weights for each pair


def transformers_block(moe: MoE) -> nn.Module:
    """transformers' Mixtral block with the same weights, shared; another rule or shared experts are a ValueError."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    router, experts = moe.router, moe.experts
    mixtral = router.scoring_func == "softmax" and router.norm_topk_prob and router.n_group == 1
    plain = moe.shared_experts is None and experts.swiglu_limit is None
    if not mixtral or not plain or router.routed_scaling_factor != 1.0:
        raise ValueError(
            "moe: expected Mixtral's rule (softmax, norm_topk_prob=True, one group), no shared experts and no limit"
        )
    config = MixtralConfig(
        hidden_size=router.hidden_size, intermediate_size=experts.intermediate_size,
        num_local_experts=router.num_experts, num_experts_per_tok=router.top_k,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"  # a whole model would have chosen it; a block alone has to be told
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = router.weight
    block.experts.gate_up_proj, block.experts.down_proj = experts.gate_up_proj, experts.down_proj
    return block.eval()


def implementations() -> list[str]:
    """The ``experts_implementation`` names that transformers has, the default (grouped_mm) first."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return sorted({"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()}, key=lambda name: (name != "grouped_mm", name))


def moe_speed(
    hidden_size: int = 256, num_experts: int = 16, top_k: int = 2, tokens: int = 64, dtype: str = "float32",
    training: bool = False, precision: str = "highest", rounds: int = 5, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Time one layer, router included, in every way there is on the best device, side by side: same weights and tokens.

    Args:
        num_experts, top_k: one of the keys of ``SHAPES``.
        training: forward and backward pass, gradients of all weights made anew, instead of a forward pass.
        precision: ``torch.set_float32_matmul_precision`` for everybody: "highest" is the default, and with "medium"
            oneDNN multiplies everywhere (on a CPU without AMX still in float32).

    Returns:
        ``seconds``: a Timing each for ``"dense"`` (one SwiGLU layer of the size that a token uses), ``"dense, oneDNN"``
        (the same on the faster library, where there is one), ``"ours"``, ``"ours, packed"``, and ``"transformers, …"``
        for each implementation that runs here. ``failed``: why the others do not. ``largest_difference`` of the
        outputs, ours against transformers' default, and ``expert_bytes``, the size of all expert weights.

    Raises:
        ValueError: a shape that is not in ``SHAPES``.
    """
    if (num_experts, top_k) not in SHAPES:
        raise ValueError(f"num_experts, top_k: got {(num_experts, top_k)}, expected one of {list(SHAPES)}")
    kind, inner = getattr(torch, dtype), int(hidden_size * SHAPES[num_experts, top_k])
    device = as_device(None)
    torch.manual_seed(seed)
    router = Router(hidden_size, num_experts, top_k, norm_topk_prob=True)
    ours = MoE(hidden_size, inner, router).to(device, kind).eval()
    dense = SwiGLU(hidden_size, top_k * inner).to(device, kind)
    theirs, copy = transformers_block(ours), MoE(hidden_size, inner, router).to(device, kind).eval()
    copy.experts.load_state_dict(ours.experts.state_dict())  # packing moves weights: these are its own
    x = torch.randn(1, tokens, hidden_size).to(device, kind).requires_grad_(training)
    grad = torch.randn_like(x)

    def step(module: nn.Module, call: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            if not training:
                return call(x)
            module.zero_grad(set_to_none=True)
            x.grad = None
            out = call(x)
            out.backward(grad)
            return out

        return run

    def with_implementation(name: str) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            theirs.experts.config._experts_implementation = name
            return theirs(x)

        return call

    fast.prepare(ours)
    ways: dict[str, Callable[[], Tensor]] = {"dense": step(dense, dense), "ours": step(ours, ours)}
    if not training and device.type == "cpu" and onednn():
        ways["dense, oneDNN"] = lambda: _dense_onednn(dense, x)
        fast.prepare(copy, pack_experts=True)
        ways["ours, packed"] = step(copy, copy)
    failed = {}
    with torch.set_grad_enabled(training), _precision(precision):
        for name in implementations():
            run = step(theirs, with_implementation(name))
            if name == "batched_mm" and tokens * top_k * ours.experts.down_proj[0].nbytes * 3 > LARGEST_COPY:
                failed[name] = "would copy more than 2 GiB of weights"
                continue
            try:
                run()
                ways[f"transformers, {name}"] = run
            except Exception as error:  # whatever keeps it from running here is the answer
                failed[name] = str(error).splitlines()[0][:120]
        gap = (ways["ours"]() - ways["transformers, grouped_mm"]()).abs().max().item()
        seconds = compare(ways, rounds=rounds, warmup=1, device=device)
    size = sum(p.nbytes for p in ours.experts.parameters())
    return {"seconds": seconds, "failed": failed, "largest_difference": gap, "expert_bytes": size}


def moe_grid(dtype: str = "float32", training: bool = False, precision: str = "highest", rounds: int = 5) -> dict:
    """:func:`moe_speed` for hidden size 256 and 1024, both shapes, and 1 to 4096 tokens, as ``{"points": [...]}``."""
    points = []
    for hidden_size in (256, 1024):
        for experts, top_k in SHAPES:
            for tokens in TOKENS:
                place = {"hidden_size": hidden_size, "num_experts": experts, "top_k": top_k, "tokens": tokens}
                call = {"dtype": dtype, "training": training, "precision": precision}
                points.append(place | moe_speed(**place, **call, rounds=rounds))
    return {"points": points}


def ratios(point: dict[str, Any]) -> dict[str, float]:
    """What the medians of one point say: how many times as fast as transformers, and how far from the bound.

    ``default``, ``best`` and ``eager``: transformers' default, its fastest implementation and that one over our
    fastest; ``unpacked_best``: its fastest over ours unpacked; ``bound``: our fastest over the fastest dense layer.
    """
    times = {name: t["median"] if isinstance(t, dict) else t.median for name, t in point["seconds"].items()}
    ours = min(t for name, t in times.items() if name.startswith("ours"))
    theirs = {name.removeprefix("transformers, "): t for name, t in times.items() if name.startswith("transformers")}
    dense = min(t for name, t in times.items() if name.startswith("dense"))
    found = {"default": theirs["grouped_mm"] / ours, "best": min(theirs.values()) / ours}
    found |= {"unpacked_best": min(theirs.values()) / times["ours"], "eager": theirs["eager"] / ours}
    return found | {"bound": ours / dense}


def _dense_onednn(layer: SwiGLU, x: Tensor) -> Tensor:
    gate, up = packed_product(x[0], layer.gate_up_proj.weight).chunk(2, dim=-1)
    return packed_product(nn.functional.silu(gate, inplace=True).mul_(up), layer.down_proj.weight)


@contextmanager
def _precision(name: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
