"""Speculative decoding on a real model, measured beside plain decoding: which guesses stay, and what that is worth.

Apart from :mod:`dslib.performance.speculative` because it loads SmolLM2. Recorded by ``make record PART=speculative``.

Book: ``chapters/performance/speculation.ipynb``.
"""

import copy
from typing import Any

import torch

from dslib import fast
from dslib.architecture.decoder import Decoder, with_layers
from dslib.architecture.generation import generate
from dslib.architecture.int4.layers import quantize_
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.performance.speculative import Draft, ModelDraft, PromptLookup, expected_gain, feed, speculate
from measured.timing import compare, measure, ratio

LIST = "1. Measure the flour.\n2. Warm the milk.\n3. Mix the flour and the milk.\n4. Let the dough rest.\n5. Bake it.\n"
# A text that goes on freely, and one that repeats what it was given, which is where looking up pays.
TEXTS = {
    "prose": "The history of the steam engine begins",
    "a copy": f"Here is a recipe:\n\n{LIST}\nHere is the same recipe again:\n\n1. Measure",
}


def drafts(model: Decoder, max_length: int) -> dict[str, Draft]:
    """Everything here that can guess for ``model``: the text so far, the model's own layers, its own 4-bit weights.

    All of them are prepared; layers are shared, so the model is as well.
    """
    layers = model.config.num_hidden_layers
    coarse = quantize_(copy.deepcopy(model), group_size=32, skip=("embed_tokens",))
    half, most = list(range(layers // 2)), [*range(layers // 2), *range(layers // 2 + 3, layers)]
    few = {"first half of the layers": with_layers(model, half), "all layers but three": with_layers(model, most)}
    smaller = few | {"4-bit weights": coarse}
    for one in (*smaller.values(), model):
        fast.prepare(one)
    return {"prompt lookup": PromptLookup()} | {name: ModelDraft(one, max_length) for name, one in smaller.items()}


def speculative_speed(
    dtype: str = "bfloat16", new_tokens: int = 64, counts: tuple[int, ...] = (2, 4), rounds: int = 3
) -> dict[str, Any]:
    """SmolLM2-135M, greedy, each draft on each text, in rounds beside plain decoding.

    Returns:
        ``plain_step`` in seconds. ``pass_cost``: for each number of guesses, the time of a checking pass over it.
        ``rows``: for each text, draft and number of guesses ``same_tokens``, ``acceptance`` (accepted over proposed),
        ``tokens_per_pass``, ``draft_cost`` (one guess over one plain step), ``times`` (median speed against plain
        decoding, with ``low`` and ``high``) and ``expected`` (the same from acceptance and costs; too low for several
        guesses, as acceptance then is).
    """
    model, tokenizer = load_smollm2(dtype=getattr(torch, dtype))
    texts = {name: tokenizer(text).input_ids for name, text in TEXTS.items()}
    longest = max(map(len, texts.values())) + new_tokens + max(counts)
    made = drafts(model, longest)
    plain_step = _step_seconds(model, 1)
    costs = {count: _step_seconds(model, count + 1) / plain_step for count in counts}
    guess_costs = {name: _step_seconds(d.model, 1) / plain_step for name, d in made.items() if hasattr(d, "model")}
    rows = []
    for text, prompt in texts.items():
        want = generate(model, [prompt], new_tokens)[0].tokens
        runs = {(name, count): speculate(model, prompt, new_tokens, draft, count) for name, draft in made.items()
                for count in counts}  # fmt: skip
        ways = {"plain": lambda prompt=prompt: generate(model, [prompt], new_tokens)}
        for name, count in runs:
            ways[f"{name} {count}"] = lambda prompt=prompt, name=name, count=count: speculate(
                model, prompt, new_tokens, made[name], count
            )
        seconds = compare(ways, rounds=rounds, warmup=0)
        for (name, count), run in runs.items():
            gain, guess = ratio(seconds["plain"], seconds[f"{name} {count}"]), guess_costs.get(name, 0.0)
            rows.append({
                "text": text, "draft": name, "count": count, "same_tokens": run.tokens == want,
                "acceptance": run.acceptance, "tokens_per_pass": run.tokens_per_pass, "draft_cost": guess,
                "times": gain.median, "low": gain.low, "high": gain.high,
                "expected": expected_gain(run.acceptance, count, guess, costs[count]),
            })  # fmt: skip
    return {"pass_cost": {str(count): cost for count, cost in costs.items()}, "plain_step": plain_step, "rows": rows}


@torch.inference_mode()
def _step_seconds(model: Decoder, tokens: int, context: int = 64) -> float:
    """Seconds to feed so many tokens after ``context`` others, in the way that decoding would."""
    cache = model.make_cache("preallocated", max_length=context + tokens)
    model(torch.ones(1, context, dtype=torch.int64), cache)

    def step():
        feed(model, [1] * tokens, cache)
        cache.truncate(context)

    return measure(step, min_runs=10, max_runs=30, max_seconds=1.0).median
