"""The speed of a 4-bit layer beside the formats and libraries it competes with, and of a model made of such layers.

A layer that has just been used lies in the processor's cache, and in decoding it never does: all the other layers have
been read since. So every way goes through several layers of its own, too many for a cache.

Book: ``chapters/architecture/int4.ipynb``.
"""

import copy
import functools
import json
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dslib import fast
from dslib.architecture.generation import generate
from dslib.architecture.int4.layers import Int4Linear, quantize_
from dslib.architecture.int4.levels import unpack
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.architecture.weights.twin import hf_twin
from dslib.fast import int4_rows
from dslib.fast.int4 import cpu_kernel
from dslib.performance.speed import weight_bytes
from measured.probes import read_bandwidth
from measured.timing import Timing, compare, measure

PROMPT = "The history of the steam engine begins"
NOT_IN_CACHE = 128 << 20  # bytes of weights


def int4_speed(
    in_features: int = 2048, out_features: int = 2048, rows: int = 1, group_size: int = 32, rounds: int = 9,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Time one product ``x Wᵀ`` in every format, side by side.

    Returns:
        ``seconds``: a Timing each for ``"float32"`` and ``"bfloat16"`` (``F.linear``), ``"ours"`` (activations in
        bfloat16), ``"ours, float32"`` (converted there and back) and, for a few rows and where there is one,
        ``"ours, int8"`` (activations in eight bits); ``"torch int4"`` (its packed product alone, where this CPU has
        it); and where it is installed ``"onnxruntime"`` (MatMulNBits at accuracy level 1, activations in float32) and
        ``"onnxruntime, int8"`` (level 4, which rounds activations to 8 bits). These run in processes of their own:
        two thread pools in one would disturb each other.
        ``layers``: through how many each reading goes; the seconds are those of all of them. ``bytes``: of one layer's
        weights. ``error``: of each 4-bit way against the same weights in float32, relative.
    """
    layer, x = _layer(in_features, out_features, rows, group_size, seed)
    fast.prepare(layer)
    layers = {"float32": [layer.dequantize()], "bfloat16": [layer.dequantize(torch.bfloat16)], "ours": [layer]}
    sizes = {"float32": layers["float32"][0].nbytes, "bfloat16": layers["bfloat16"][0].nbytes}
    sizes["ours"] = layer.packed.nbytes + layer.scales.nbytes
    for name, some in layers.items():
        some.extend(copy.deepcopy(some[0]) for _ in range(_copies(sizes[name], rows) - 1))
    half = x.bfloat16()
    ways = {
        "float32": lambda: [F.linear(x, weight) for weight in layers["float32"]],
        "bfloat16": lambda: [F.linear(half, weight) for weight in layers["bfloat16"]],
        "ours": lambda: [layer(half) for layer in layers["ours"]],
        "ours, float32": lambda: [layer(x) for layer in layers["ours"]],
    }
    exact = Int4Linear.forward(layer, x)
    error = {"ours": _distance(layer(x), exact)}
    if rows <= int4_rows.FEW and int4_rows.why_not(layer.packed, group_size) is None:
        products = [_int8_product(some) for some in layers["ours"]]
        multiply = products[0]
        ways["ours, int8"] = lambda: [multiply(x) for multiply in products]
        error["ours, int8"] = _distance(multiply(x), exact)
    if cpu_kernel() and x.device.type == "cpu":
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        ways["torch int4"] = lambda: [kernel(half, a.packed, group_size, a.forward.pairs()) for a in layers["ours"]]
    with torch.no_grad():
        seconds = compare(ways, rounds=rounds)
    found = {name: len(layers.get(name, layers["ours"])) for name in ways}
    for name, level in (("onnxruntime", 1), ("onnxruntime, int8", 4)):
        other = onnxruntime_speed(level, in_features, out_features, rows, group_size, seed)
        if other is not None:
            seconds[name] = Timing(tuple(other["seconds"]), other["calls"])
            found[name], sizes[name], error[name] = other["layers"], other["bytes"], other["error"]
    return {"seconds": seconds, "layers": found, "bytes": sizes, "error": error}


def int4_grid(group_sizes: tuple[int, ...] = (32, 128), rounds: int = 7) -> dict[str, Any]:
    """:func:`int4_speed` for 2048 to 2048 and to 5632 features, 1 and 512 rows, as ``{"points": [...]}``."""
    points = []
    for group_size in group_sizes:
        for out_features in (2048, 5632):
            for rows in (1, 512):
                place = {"out_features": out_features, "rows": rows, "group_size": group_size}
                points.append(place | int4_speed(**place, rounds=rounds if rows == 1 else 3))
    return {"points": points}


def decode_int4(new_tokens: int = 128, rounds: int = 3, group_size: int = 32) -> dict[str, Any]:
    """SmolLM2-135M, batch 1, greedy: transformers and ours in float32 and bfloat16, and ours in four bits.

    The 4-bit model keeps its embedding, and once its head too, which is then the same matrix. Once it rounds
    activations to eight bits.

    Returns:
        ``seconds`` for ``new_tokens`` by way; ``bytes`` of weights that a token reads; ``read_bandwidth``, bytes a
        second; ``new_tokens``.
    """
    models, tokenizer = {}, None
    for dtype in (torch.float32, torch.bfloat16):
        models[str(dtype)[6:]], tokenizer = load_smollm2(dtype=dtype)
    for name, skip in (("int4, head in bfloat16", ("embed_tokens", "lm_head")), ("int4", ("embed_tokens",))):
        models[name] = quantize_(load_smollm2(dtype=torch.bfloat16)[0], group_size, skip=skip)
    half = load_smollm2(dtype=torch.bfloat16)[0]
    models["int4, int8 rows"] = quantize_(half, group_size, skip=("embed_tokens",), activations="int8")
    for model in models.values():
        fast.prepare(model)
    prompt = tokenizer(PROMPT).input_ids
    ways = {f"ours, {name}": functools.partial(generate, model, [prompt], new_tokens) for name, model in models.items()}
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    for name in ("float32", "bfloat16"):
        twin = hf_twin(models[name])
        ways[f"transformers, {name}"] = functools.partial(twin.generate, torch.tensor([prompt]), **options)
    with torch.inference_mode():
        seconds = compare(ways, rounds=rounds, warmup=1)
    read = {name: round(weight_bytes(model)) for name, model in models.items()}
    return {"seconds": seconds, "bytes": read, "read_bandwidth": read_bandwidth("cpu"), "new_tokens": new_tokens}


def onnxruntime_speed(*call: int) -> dict[str, Any] | None:
    """ONNX Runtime's 4-bit product, in a process of its own; None where it or onnx is not installed.

    Args:
        call: accuracy level, then in_features, out_features, rows, group_size and seed, as of :func:`int4_speed`.

    Raises:
        RuntimeError: it did not run, with its reason.
    """
    run = [sys.executable, "-m", "measured.experiments.int4_speed", *map(str, (torch.get_num_threads(), *call))]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode == NOT_INSTALLED:
        return None
    if done.returncode:
        raise RuntimeError(f"onnxruntime: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)


NOT_INSTALLED = 3  # exit status


def _onnxruntime(
    threads: int, accuracy_level: int, in_features: int, out_features: int, rows: int, group_size: int, seed: int
) -> dict[str, Any]:
    """In that process: the same codes and scales in the form that MatMulNBits wants, as many layers one by one."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    layer, x = _layer(in_features, out_features, rows, group_size, seed)
    codes, groups = unpack(layer.packed), in_features // group_size  # uint8 (out, in)
    pairs = codes.view(out_features, groups, group_size // 2, 2)
    scales, zeros = layer.scales.float().transpose(0, 1).unbind(-1)  # (out, groups)
    # Its zero points are codes of four bits, so a group's zero goes to the nearest one.
    points = (8 - zeros / scales).round().clamp(0, 15).to(torch.uint8)
    exact = F.linear(
        x, ((codes.view(out_features, groups, -1) - points.float()[..., None]) * scales[..., None]).flatten(1)
    )
    points = F.pad(points, (0, groups % 2))
    tensors = {
        "codes": pairs[..., 0] | pairs[..., 1] << 4,
        "scales": scales.reshape(-1),
        "points": (points[:, ::2] | points[:, 1::2] << 4).reshape(-1),
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    count = _copies(size, rows)
    shape = {"K": in_features, "N": out_features, "bits": 4, "block_size": group_size}
    nodes, weights, results = [], [], []
    for i in range(count):
        names = [f"{name}{i}" for name in tensors]
        # Equal tensors it would keep once, and so multiply by weights from the cache. The first layer is as it was.
        own = (tensor.view(-1).roll(i * 64).view_as(tensor) for tensor in tensors.values())
        weights += [numpy_helper.from_array(t.numpy(), name) for t, name in zip(own, names, strict=True)]
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", *names], [f"y{i}"], domain="com.microsoft", accuracy_level=accuracy_level, **shape
            )
        )
        results.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [rows, out_features]))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, in_features])]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "products", given, results, weights)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    seconds = measure(lambda: session.run(None, feed))
    error = _distance(torch.from_numpy(session.run(None, feed)[0]), exact)
    return {"seconds": seconds.seconds, "calls": seconds.calls, "layers": count, "bytes": size, "error": error}


def _layer(in_features: int, out_features: int, rows: int, group_size: int, seed: int) -> tuple[Int4Linear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    return Int4Linear.from_weight(weight, group_size), torch.randn(rows, in_features, generator=generator)


def _int8_product(layer: Int4Linear):
    """The prepared layer's product with rows in eight bits."""
    layer.activations = "int8"
    product = layer.forward.int8_product()
    layer.activations = "bfloat16"
    return product


def _copies(size: int, rows: int) -> int:
    """Layers to go through. For many rows one will do: its weights are used many times before they leave the cache."""
    return 1 if rows > 64 else -(-NOT_IN_CACHE // size)


def _distance(got: Tensor, exact: Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    try:
        result = _onnxruntime(*map(int, sys.argv[1:]))
    except ImportError:
        sys.exit(NOT_INSTALLED)
    print(json.dumps(result))
