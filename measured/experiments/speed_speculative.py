"""Speculative decoding on a real model, measured beside plain decoding: which guesses stay, and what that is worth.

Apart from :mod:`dslib.performance.speculative` because it loads SmolLM2. Recorded by ``make record PART=speculative``.

Book: ``chapters/performance/speculation.ipynb``.
"""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dslib import fast
from dslib.architecture.decoder import Decoder, with_layers
from dslib.architecture.generation import generate
from dslib.architecture.int4.layers import quantize_
from dslib.architecture.weights.pretrained import load_smollm2
from dslib.performance.speculative import Draft, ModelDraft, PromptLookup, expected_gain, feed, speculate
from measured.timing import compare, ratio

LIST = "1. Measure the flour.\n2. Warm the milk.\n3. Mix the flour and the milk.\n4. Let the dough rest.\n5. Bake it.\n"
STEPS = 10  # in one reading: a step by itself is too short beside a run of a whole text
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
    dtype: str = "bfloat16", new_tokens: int = 64, counts: tuple[int, ...] = (2, 4), rounds: int = 7
) -> dict[str, Any]:
    """SmolLM2-135M, greedy: each draft on each text, plain decoding, and what a round is made of, all in turn.

    Returns:
        ``plain_step`` in seconds, for one token behind 64 others. ``pass_cost``: for each number of guesses, the time
        of a checking pass over it. ``rows``: for each text, draft and number of guesses ``same_tokens``,
        ``acceptance`` (accepted over proposed), ``tokens_per_pass``, ``guesses_per_pass`` (fewer than asked for where
        nothing is found), ``draft_cost`` (one guess over one plain step), ``times`` (median speed against plain
        decoding, with quartiles ``low`` and ``high``), ``expected`` (from acceptance and costs; too low for several
        guesses, as acceptance then is) and ``accounted`` (tokens a pass over what its guesses and its check cost).
    """
    model, tokenizer = load_smollm2(dtype=getattr(torch, dtype))
    texts = {name: tokenizer(text).input_ids for name, text in TEXTS.items()}
    longest = max(map(len, texts.values())) + new_tokens + max(counts)
    made = drafts(model, longest)
    ways = {("step", count): _step(model, count) for count in (1, *(count + 1 for count in counts))}
    ways |= {("guess", name): _step(draft.model, 1) for name, draft in made.items() if hasattr(draft, "model")}
    plain, runs = {}, {}
    for text, prompt in texts.items():
        plain[text] = ways["plain", text] = partial(generate, model, [prompt], new_tokens)
        for name, count in itertools.product(made, counts):
            way = partial(speculate, model, prompt, new_tokens, made[name], count)
            runs[text, name, count], ways[text, name, count] = way(), way
    seconds = compare(ways, rounds=rounds, warmup=0)
    step = seconds["step", 1]
    costs = {count: ratio(seconds["step", count + 1], step).median for count in counts}
    guesses = {key[1]: ratio(seconds[key], step).median for key in ways if key[0] == "guess"}
    wanted, rows = {text: way()[0].tokens for text, way in plain.items()}, []
    for (text, name, count), run in runs.items():
        gain, guess, each = ratio(seconds["plain", text], seconds[text, name, count]), guesses.get(name, 0.0), 0.0
        if run.passes:
            each = run.proposed / run.passes
        rows.append({
            "text": text, "draft": name, "count": count, "same_tokens": run.tokens == wanted[text],
            "acceptance": run.acceptance, "tokens_per_pass": run.tokens_per_pass, "guesses_per_pass": each,
            "draft_cost": guess, "times": gain.median, "low": gain.low, "high": gain.high,
            "expected": expected_gain(run.acceptance, count, guess, costs[count]),
            "accounted": run.tokens_per_pass / (each * guess + costs[count]),
        })  # fmt: skip
    return {
        "pass_cost": {str(count): cost for count, cost in costs.items()},
        "plain_step": step.median / STEPS,
        "rows": rows,
    }


def _step(model: Decoder, tokens: int, context: int = 64) -> Callable[[], None]:
    """A call that feeds so many tokens after ``context`` others, in the way that decoding would."""
    cache = model.make_cache("preallocated", max_length=context + tokens)
    with torch.no_grad():
        model(torch.ones(1, context, dtype=torch.int64), cache)

    @torch.inference_mode()
    def step() -> None:
        for _ in range(STEPS):
            feed(model, [1] * tokens, cache)
            cache.truncate(context)

    return step
