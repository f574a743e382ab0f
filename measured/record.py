"""``make record``: measure this machine and write ``data/recordings/<machine>.json``.

``python -m measured.record gpu`` records what the chapters' GPU cells show, with the very same functions and arguments,
the most wanted first. It needs nothing but torch, transformers and numpy: no network, no weights, no make and no git. A
cluster node without git is told its commit (``--commit … --tree …``, printed by ``make record-key``), works through the
list, writes each result as it is there, and stops in time (``--minutes 8``). ``--merge FILE`` brings its file home, if
its code is that commit's. On a CPU, ``machine`` runs the same functions at the ``tiny`` size.

The other parts take longer than a page should, up to half an hour each, and are made on a CPU with nothing else
running: ``make record PART=experts``. ``make record STALE=1`` measures again what no recording answers any more, and
``ALL=1`` also what was made by older code (see :mod:`measured.provenance`), in one part or in all.

``make record PART=probes`` runs the functions whose results are no timings at a size of about a second. Tests compare
their numbers with a new run, so that code that now gives other results is noticed though its recordings are old.

A checkout with changes is refused: a recording belongs to a commit.
"""

import argparse
import importlib
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dslib.data.files import data_path
from measured import provenance, recordings

# Functions by module and name, imported when their turn comes: a part asks for no package that only another one needs.
ROOF, GAP = "measured.probes:roof_figures", "measured.probes:launch_gap"
DECODE, WINDOW = "measured.experiments.decoder:decode_speed", "measured.experiments.decoder:window_speed"
MACHINE, EXPERTS = "measured.experiments.speed:machine_speed", "measured.experiments.moe_speed:moe_grid"
DESIGNS, BALANCE = "measured.experiments.moe:train_designs", "measured.experiments.balance"

STEP = "measured.experiments.training_precision:training_step"
CALLS, COMPILED = ["calls", "graph"], ["calls", "graph", "compiled graph"]
LITE = {"hidden_size": 2048, "inner": 1408, "num_experts": 64, "top_k": 6}
CURVE = {"name": "V1", "batches": [1, 2, 4, 8, 16, 32, 64, 128, 256], "prompts": [], "ways": ["graph"]}

# What the GPU cells of the chapters ask for, the most wanted first; tests hold the two together.
GPU_CALLS = (
    (ROOF, {}),
    (GAP, {"side": 8192}),
    (MACHINE, {"name": "V1"}),
    (MACHINE, {"name": "V1", "weights": "int4", "ways": COMPILED}),
    (DECODE, {"name": "1.3b", "dtype": "bfloat16"}),
    (WINDOW, {"length": 16384, "window": 1024, "heads": 16, "head_dim": 128, "dtype": "bfloat16"}),
    (STEP, {}),
    (MACHINE, CURVE),
    (MACHINE, {"name": "V3", "ways": CALLS}),
    (MACHINE, {"name": "V2", "ways": CALLS}),
    (MACHINE, {"name": "V1", "weights": "int8", "ways": COMPILED}),
    (EXPERTS, {"dtype": "bfloat16", "rounds": 7}),  # 7: another call than the one recorded on CPUs
    (MACHINE, {**CURVE, "weights": "int4"}),
    (MACHINE, {"name": "V1", "dtype": "float16", "ways": CALLS}),
    (f"{BALANCE}:load_cost", {**LITE, "tokens": 8192, "dtype": "bfloat16", "loads": [0.0, 1.0, 3.0, 9.0]}),
    ("measured.experiments.sampling:sampling_times", {"vocab_size": 129_280, "batch": 64}),
    ("measured.experiments.whole:training_speed", {}),
    ("measured.experiments.adapters_many:step_times", {"size": "1.3b", "dtype": "bfloat16"}),
    (
        "measured.experiments.adapters_many:step_times",
        {"size": "1.3b", "dtype": "bfloat16", "targets": "every linear layer"},
    ),
    (
        "measured.experiments.upcycling:layer_cost",
        {"hidden_size": 2048, "inner": 5504, "tokens": [1, 64, 2048], "dtype": "bfloat16", "rounds": 7},
    ),
    ("measured.experiments.does_it_help:token_seconds", {}),
)
SMALL = {
    "size": "tiny", "batches": [1, 4], "prompts": [16, 64], "prompt_tokens": 16, "new_tokens": 16, "roof_seconds": 0.05,
}  # fmt: skip
CPU_CALLS = (
    (ROOF, {"dtypes": ["float32"], "max_seconds": 0.2}),
    (GAP, {"side": 256}),
    (MACHINE, {**SMALL, "name": "V1", "dtype": "float32"}),
    (MACHINE, {**SMALL, "name": "V1", "weights": "int4"}),
    (MACHINE, {**SMALL, "name": "V1", "weights": "int8"}),
    (MACHINE, {**SMALL, "name": "V2", "dtype": "float32"}),
    (MACHINE, {**SMALL, "name": "V3", "dtype": "float32"}),
    (STEP, {"size": "tiny", "batch_size": 2, "length": 32, "precisions": ["float32", "bfloat16"], "rounds": 2}),
    (DECODE, {"name": "tiny", "dtype": "float32", "prompt_tokens": 16, "new_tokens": 32}),
    (WINDOW, {"length": 1024, "window": 64, "heads": 2, "head_dim": 32, "rounds": 3}),
)
LARGER = {"hidden_size": 128, "length": 64, "steps": 400}
HASTY = ["bias", "64, top 8", "63, top 7, 1 shared", "dense, active size"]
PRECISION = "measured.experiments.training_precision:precision_runs"
ISOLATION = "measured.experiments.training_isolation:isolation_runs"
LATE = {"seed_steps": 400, "steps": 300, "mix_steps": 100}
BRANCHED = ["isolated, then mixed", "isolated to the end", "joint", "joint, equal compute"]
ANSWERS, WRITTEN = "measured.experiments.accuracy:answer_run", "measured.experiments.accuracy:written_run"
LAYOUTS = ("mmlu", "no header", "in brackets", "no space", "chat", "text, listed")
BRIEF = {"dtype": "bfloat16"}
LM_EVAL = "measured.experiments.accuracy:against_lm_eval"
RUN, SPEED = "measured.experiments.fusion_evaluation:vision_run", "measured.experiments.fusion_speed"
BALANCE_CALLS = tuple((f"{BALANCE}:balance_runs", {"seed": seed}) for seed in range(7))
VISION_CALLS = tuple((RUN, {"seed": seed}) for seed in range(3))
WORDS = "measured.experiments.sampling"
FOUR_BITS = "measured.experiments.int4_speed"
QUALITY = "measured.experiments.int4"
NGRAMS, XZ = "measured.experiments.ngram:ngram_baselines", "measured.experiments.ngram:xz_rate"
QUALITY_CALLS = (
    (f"{QUALITY}:smollm2_quality", {}),
    (f"{QUALITY}:smollm2_quality", {"symmetric": True, "shuffles": [0]}),
    (f"{QUALITY}:smollm2_quality", {"method": "hqq", "shuffles": [0]}),
    (f"{QUALITY}:layer_quality", {}),
    (f"{QUALITY}:trained_quality", {}),
)
WHOLE = "measured.experiments.whole"
WHOLE_CALLS = (
    (f"{WHOLE}:window_lines", {}),
    (f"{WHOLE}:texts", {}),
    *((f"{WHOLE}:model_bits", {"split": split}) for split in ("validation", "test")),
    (f"{WHOLE}:module_drafts", {}),
    (f"{WHOLE}:sampled_drafts", {}),
    (f"{WHOLE}:step_parts", {}),
    (f"{WHOLE}:step_speed", {}),
    (f"{WHOLE}:step_speed", {"compiled": False, "rows": [16], "rounds": 5}),
    (f"{WHOLE}:step_speed", {"precision": "bfloat16"}),
)
HELP, RATES = "measured.experiments.does_it_help", (4e-3, 8e-3, 16e-3)
HELP_ARMS = (
    "fine-grained, shared", "dense, active size", "dense, total size", "16 experts, top 2", "frozen router",
    "auxiliary loss",
)  # fmt: skip
ADAPTERS, REALTIME = "measured.experiments.adapters", "measured.experiments.realtime"
FREE, FROZEN = (1e-4, 3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2, 3e-2)  # rates where the base moves, and where it does not
ADAPTER_RATES = {
    "all weights": FREE, "LoRA": FROZEN, "the article's": FREE, "zero start": FREE, "frozen base": FROZEN,
    "zero start, frozen base": FROZEN,
}  # fmt: skip
ADAPTER_BEST = {arm: rates[3 if rates is FREE else 2] for arm, rates in ADAPTER_RATES.items()}  # as the page finds them
UPCYCLING, GROWN = (
    "measured.experiments.upcycling",
    ("dense, continued", "copies with noise", "slices", "shared", "from scratch"),
)
COMPLEX, REASONING = "measured.experiments.complex", "measured.experiments.reasoning"
REWARDED = ("GRPO", "knows nothing", "coins", "form only", "KL", "stale", "stale, KL")
CURES = ("stale, masked", "stale, KL unbiased", "stale, not scaled", "stale, top-p", "stale, top-p kept")
NGRAM_CALLS = ((NGRAMS, {}), (XZ, {"split": "validation"}), (XZ, {"split": "test"}))
TINY = {"seeds": 1, "steps": 3, "hidden_size": 16, "layers": 2, "length": 16}
PROBES = (
    (DESIGNS, {**TINY, "designs": ["no cure", "bias", "63, top 7, 1 shared", "dense, active size"], "batch_size": 2}),
    (
        f"{BALANCE}:balance_runs",
        {"arms": ["switch 0.1", "sequence 0.1", "bias 0.005", "softmax"], "steps": 3, "hidden_size": 16, "length": 16},
    ),
    ("measured.experiments.depth:exit_runs", {**TINY, "min_layers": 1}),
    (ISOLATION, {**TINY, "seed_steps": 2, "mix_steps": 2, "batch_size": 3}),
    (PRECISION, {**TINY, "arms": ["float32", "bfloat16"], "batch_size": 2}),
    (RUN, {"steps": 2, "text_steps": 1, "label_steps": 2, "batch_size": 4, "variants": ["token gate"]}),
    (f"{QUALITY}:trained_quality", {"passages": 4, "length": 64, "group_sizes": [32]}),
    ("measured.experiments.multimodal:legibility_runs", {"heights": [20], "pages": 1}),
    (NGRAMS, {"order": 3, "every": 60}),
)
PROBES_FILE = "recordings/probes/results.json"
PARTS = {
    "machine": CPU_CALLS,
    "gpu": GPU_CALLS,
    "experts": tuple(
        (EXPERTS, {"dtype": dtype, "precision": precision})
        for dtype, precision in (("float32", "highest"), ("float32", "medium"), ("bfloat16", "highest"))
    ),
    "experts-training": tuple((EXPERTS, {"dtype": dtype, "training": True}) for dtype in ("float32", "bfloat16")),
    "training": (
        (DESIGNS, {**LARGER, "seeds": 5, "learning_rate": 1.5e-3}),
        (DESIGNS, {**LARGER, "seeds": 3, "learning_rate": 3e-3, "designs": HASTY}),
    ),
    "balance": BALANCE_CALLS,
    **{f"balance-{seed}": (call,) for seed, call in enumerate(BALANCE_CALLS)},
    "depth": (("measured.experiments.depth:exit_runs", {"seeds": 3}),),
    "isolation-rates": tuple(
        (ISOLATION, {**LATE, "learning_rate": r, "seeds": 2, "seed": 100}) for r in (1e-3, 2e-3, 4e-3)
    ),
    "isolation": tuple(
        (ISOLATION, {**LATE, "arms": arms, "learning_rate": rate, "seeds": 5})  # each arm at its best rate of those
        for arms, rate in ((BRANCHED, 2e-3), (["joint from scratch"], 4e-3))
    ),
    "accuracy": (
        (ANSWERS, {}),
        (ANSWERS, {"prompt": "text"}),
        *((ANSWERS, {**BRIEF, "prompt": prompt}) for prompt in LAYOUTS),
        *((ANSWERS, {**BRIEF, "rotate": places}) for places in (1, 2, 3)),
        *((ANSWERS, {**BRIEF, "questions": name}) for name in ("medmcqa", "jee-math", "us_tort_law")),
        *((WRITTEN, {**BRIEF, "prompt": prompt}) for prompt in ("mmlu", "chat")),
        (ANSWERS, {**BRIEF, "shots": 2}),
    ),
    "evaluation": (
        (LM_EVAL, {"rounds": 1}),  # all of them, for the scores
        (LM_EVAL, {"every": 4, "rounds": 3}),  # and fewer, more often, for the times
        (LM_EVAL, {"dtype": "bfloat16", "every": 4, "rounds": 3}),
        (LM_EVAL, {"prompt": "text", "every": 8, "rounds": 3}),
    ),
    "vision": VISION_CALLS,
    **{f"vision-{seed}": (call,) for seed, call in enumerate(VISION_CALLS)},
    "vision-speed": ((f"{SPEED}:look_cost", {}), (f"{SPEED}:look_cost", {"every": 4})),
    "vision-answer": ((f"{SPEED}:stream_cost", {"rounds": 9}),),
    "int4-speed": ((f"{FOUR_BITS}:int4_grid", {}), (f"{FOUR_BITS}:decode_int4", {"rounds": 5})),
    "llama-cpp": (("measured.experiments.speed_llama_cpp:beside_llama_cpp", {}),),
    "sampling": (
        *(
            (f"{WORDS}:rule_text", {"rule": rule})
            for rule in ("greedy", "T 0.6", "T 1, top-p 0.95", "T 0.6, top-p 0.95")
        ),
        *((f"{WORDS}:loop_heads", {"silent": silent}) for silent in ("none", "induction")),
        *((f"{WORDS}:loop_heads", {"silent": "others", "seed": seed}) for seed in range(3)),
        *((f"{WORDS}:rule_text", {"rule": rule}) for rule in ("T 1", "the novel")),
    ),
    "speculative": (("measured.experiments.speed_speculative:speculative_speed", {}),),
    "precision": ((PRECISION, {"seeds": 5, "learning_rate": 1e-3}), (PRECISION, {"seeds": 5})),
    "int4-quality": QUALITY_CALLS,
    **{f"int4-quality-{number}": (call,) for number, call in enumerate(QUALITY_CALLS)},
    "probes": PROBES,
    "ngrams": NGRAM_CALLS,
    **{f"ngrams-{number}": (call,) for number, call in enumerate(NGRAM_CALLS)},
    "whole": WHOLE_CALLS,
    **{f"whole-{number}": (call,) for number, call in enumerate(WHOLE_CALLS)},
    **{
        f"help-rates-{number}": tuple(
            (f"{HELP}:run", {"arm": arm, "seed": 100, "rate": rate, "steps": 240}) for rate in RATES
        )
        for number, arm in enumerate(HELP_ARMS)
    },
    **{
        f"help-{seed}": tuple(
            (f"{HELP}:run", {"arm": arm, "seed": seed, "rate": 8e-3, "steps": 600, "every": 60}) for arm in HELP_ARMS
        )
        for seed in range(5)
    },
    "help-seconds": ((f"{HELP}:token_seconds", {}),),
    **{
        f"adapters-rates-{number}": tuple(
            (f"{ADAPTERS}:forgetting", {"arm": arm, "seed": 100, "rate": rate}) for rate in rates
        )
        for number, (arm, rates) in enumerate(ADAPTER_RATES.items())
    },
    **{
        f"adapters-{seed}": tuple(
            (f"{ADAPTERS}:forgetting", {"arm": arm, "seed": seed, "rate": rate}) for arm, rate in ADAPTER_BEST.items()
        )
        for seed in range(5)
    },
    "adapters-step": ((f"{ADAPTERS}:beside_peft", {}),),
    "adapters-many": tuple(
        (f"{ADAPTERS}_many:step_times", {"size": "smollm2-135m", "targets": targets})
        for targets in ("queries, keys, values", "every linear layer")
    ),
    **{
        f"upcycling-rates-{number}": tuple(
            (f"{UPCYCLING}:grow", {"arm": arm, "seed": 100, "rate": rate, "before": 120, "steps": 120})
            for rate in RATES
        )
        for number, arm in enumerate(GROWN)
    },
    **{
        f"upcycling-{number}": ((f"{UPCYCLING}:grow", {"arm": arm, "seed": seed}),)
        for number, (arm, seed) in enumerate(itertools.product(GROWN, range(3)))
    },
    "realtime": tuple((f"{REALTIME}:{name}", {}) for name in ("throughput", "prefix", "long_prompt", "overhead")),
    "complex": (
        (f"{COMPLEX}:atlas", {}),
        (f"{COMPLEX}_answers:answers", {}),
        (f"{COMPLEX}:own_experts", {}),
        (f"{COMPLEX}_answers:answers", {"way": "worked"}),
        (f"{COMPLEX}:forced", {"count": 16}),
        (f"{COMPLEX}:forced", {"count": 16, "greedy": True}),
        (f"{COMPLEX}:atlas", {"source": "own"}),
        (f"{COMPLEX}:forced", {"minimum": 1024, "count": 4}),
        *((f"{COMPLEX}:two_of_sixteen", {"seed": seed}) for seed in range(3)),
    ),
    **{
        f"reasoning-{seed}": (
            *((f"{REASONING}:learned", {"arm": arm, "seed": seed}) for arm in REWARDED),
            *(
                (f"{REASONING}:distilled", {"way": way, "seed": seed})
                for way in ("teacher's answers", "teacher's probabilities", "rewards")
            ),
        )
        for seed in range(5)
    },
    "reasoning-cures": tuple((f"{REASONING}:learned", {"arm": arm}) for arm in CURES),
    **{
        f"reasoning-cures-{seed}": tuple((f"{REASONING}:learned", {"arm": arm, "seed": seed}) for arm in CURES)
        for seed in range(1, 5)
    },
    "reasoning-apart": tuple(
        (f"{REASONING}:learned", {"seed": seed, **change})
        for change in ({"learning_rate": 1e-3}, {"updates": 8}, {"learning_rate": 1e-3, "steps": 320})
        for seed in range(5)
    ),
    "reasoning-split": tuple((f"{REASONING}:split", {"seed": seed}) for seed in range(4)),
    "reasoning-again": tuple((f"{REASONING}:learned", {"again": again}) for again in range(1, 5)),
    "realtime-vllm": ((f"{REALTIME}_vllm:beside_vllm", {}),),
    "load": (
        (f"{REALTIME}_load:sweep", {}),
        (f"{REALTIME}_simulator:held_against", {}),
        *((f"{REALTIME}_simulator:real_gaps", {"trace": trace}) for trace in ("code", "conv")),
    ),
    "recipes": tuple((f"measured.experiments.recipes:known_to_{engine}", {}) for engine in ("vllm", "sglang")),
    "ocr": (("measured.experiments.multimodal:legibility_runs", {}),),
    "retrieval": (("measured.experiments.multimodal_retrieval:retrieval_runs", {}),),
    "preprocessing": (
        ("measured.experiments.multimodal_speed:preparation", {}),
        ("measured.experiments.multimodal_speed:overlap", {}),
    ),
}


def find(name: str) -> Callable[..., Any]:
    """The function behind ``"module:name"``."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


class TimeUp(BaseException):
    """The time is over. Not an Exception: measurements that report their own failures must not take it for one."""


@contextmanager
def stopping_after(minutes: float | None) -> Iterator[None]:
    """Raise :class:`TimeUp` inside the block when the time is over, wherever it is (at the next line of Python)."""
    if minutes is None:
        yield
        return

    def ring(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def choose(part: str | None, redo: tuple[str, ...] | None) -> list[tuple[str, dict[str, Any]]]:
    """The calls of a part (None: of all that run on a CPU); of these, where ``redo`` names how a recording may stand,
    those whose best recording stands so."""
    parts = [part] if part else [name for name in PARTS if name not in ("gpu", "probes")]
    calls = {json.dumps(call): call for name in parts for call in PARTS[name]}.values()
    return [call for call in calls if redo is None or recordings.best_standing(find(call[0]), call[1]) in redo]


def run(calls: list[tuple[str, dict[str, Any]]], out: Path | str | None, minutes: float | None, origin) -> int:
    """Measure these calls, writing after each, so that a stop loses one and not all; the exit status."""
    path, failures, left = None, [], list(calls)
    try:
        with stopping_after(minutes):
            while left:
                name, call = left[0]
                said = f"{name.partition(':')[2]}({', '.join(f'{key}={value!r}' for key, value in call.items())})"
                print(said, flush=True)
                try:
                    made = recordings.record(find(name), origin, **call)
                    path = recordings.write(out, [made])
                except Exception:  # the others may still be worth having; the exit status tells
                    traceback.print_exc()
                    failures.append(said)
                left.pop(0)
    except TimeUp:
        print(f"time is up; not measured: {', '.join(name.partition(':')[2] + str(call) for name, call in left)}")
    print(f"wrote {path}" if path else "wrote nothing", f"({len(failures)} calls failed)" if failures else "")
    return min(len(failures), 1)


def merge(file: str) -> int:
    """Put the recordings of another machine's file with ours, if each belongs to the commit that it names."""
    made = recordings.read(file)
    for recording in made:
        if recording.tree is None:
            raise ValueError(f"{file}: {recording.function} has no tree, wanted one made with --commit and --tree")
    for commit, tree in sorted({(recording.commit, recording.tree) for recording in made}):
        provenance.check(commit, tree)
    print(f"wrote {recordings.write(data_path('recordings') / Path(file).name, made)}: {len(made)} recordings")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m measured.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS, default=None, help="what to measure (default: machine)")
    parser.add_argument("--stale", action="store_true", help="only what no recording answers (default: of all parts)")
    parser.add_argument("--all", action="store_true", help="and what only older code answers")
    parser.add_argument("--out", default=None, help="file to write (default: data/recordings/<machine>.json)")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long, keeping what is done")
    parser.add_argument("--commit", default=None, help="commit of these files, where there is no git")
    parser.add_argument("--tree", default=None, help="fingerprint that these files must have, with --commit")
    parser.add_argument("--key", action="store_true", help="print --commit and --tree for such a machine, and stop")
    parser.add_argument("--merge", metavar="FILE", default=None, help="bring home a file made on another machine")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, and nothing waits for a network
    try:
        if options.key:
            print(provenance.key())
            return 0
        if options.merge:
            return merge(options.merge)
        if options.minutes is not None and not options.minutes > 0:
            raise ValueError(f"minutes: got {options.minutes}, wanted more than 0")
        if options.part == "gpu" and not torch.cuda.is_available():
            raise ValueError("gpu: no CUDA device here; `machine` runs the same functions at the tiny size")
        origin = provenance.origin(options.commit, options.tree)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    redo = ("absent", "stale", "older code") if options.all else ("absent", "stale") if options.stale else None
    calls = choose(options.part or (None if redo else "machine"), redo)
    out = options.out or (data_path("recordings").parent / PROBES_FILE if options.part == "probes" else None)
    return run(calls, out, options.minutes, origin)


if __name__ == "__main__":
    sys.exit(main())
