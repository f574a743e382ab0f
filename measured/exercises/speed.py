"""Exercises of ``chapters/performance/speed.ipynb``. Units: bytes, seconds, and what a name ends in."""

from measured.exercises import Exercise, Mistake


def decode_floor_ms(
    parameters: float, bits_per_weight: float, kv_bytes_per_token: float, context: int, bandwidth_gb_s: float
) -> float:
    """Least milliseconds for one token of one reader: weights, and the keys and values of the context, read once."""
    moved = parameters * bits_per_weight / 8 + kv_bytes_per_token * context
    return moved / (bandwidth_gb_s * 1e9) * 1e3


def rates(batch: int, step_seconds: float) -> tuple[float, float]:
    """(milliseconds that each reader waits for a token, tokens per second of all readers together)."""
    return step_seconds * 1e3, batch / step_seconds


def tokens_per_pass(acceptance: float, count: int) -> float:
    """Tokens that one checking pass yields on average, if every guess stays with chance ``acceptance``."""
    return sum(acceptance**power for power in range(count + 1))


def timed(events: list[tuple[str, float]]) -> float:
    """Seconds that the work took, from a log of (what happened, when)."""
    when = dict(events)
    return when["finished"] - when["started"]


def _floor(**changes):
    """A version of :func:`decode_floor_ms` in which some of the arguments are read wrongly."""

    def wrong(parameters, bits_per_weight, kv_bytes_per_token, context, bandwidth_gb_s):
        given = {
            "parameters": parameters, "bits_per_weight": bits_per_weight, "kv_bytes_per_token": kv_bytes_per_token,
            "context": context, "bandwidth_gb_s": bandwidth_gb_s,
        }  # fmt: skip
        return decode_floor_ms(**(given | {name: change(given) for name, change in changes.items()}))

    return wrong


EXERCISES = [
    Exercise(
        name="speed/decode-floor",
        cases=[
            {
                "parameters": 1.28e9,
                "bits_per_weight": 16,
                "kv_bytes_per_token": 196_608,
                "context": 4096,
                "bandwidth_gb_s": 1555,
            },
            {
                "parameters": 7e9,
                "bits_per_weight": 4.5,
                "kv_bytes_per_token": 131_072,
                "context": 16_384,
                "bandwidth_gb_s": 3350,
            },
            {
                "parameters": 135e6,
                "bits_per_weight": 32,
                "kv_bytes_per_token": 46_080,
                "context": 512,
                "bandwidth_gb_s": 45,
            },
        ],
        reference=decode_floor_ms,
        tolerance=1e-3,
        mistakes=[
            Mistake(
                _floor(bits_per_weight=lambda given: 8 * given["bits_per_weight"]),
                "Eight times too much for the weights: a weight of 16 bits has 2 bytes, and the bandwidth is in bytes.",
            ),
            Mistake(
                _floor(context=lambda given: 0),
                "The weights alone. Each token also reads the keys and values of its whole context.",
            ),
            Mistake(
                _floor(bandwidth_gb_s=lambda given: given["bandwidth_gb_s"] * 2**30 / 1e9),
                "7 % too short: a bandwidth in GB/s counts 10**9 bytes, not 2**30 (that would be GiB/s).",
            ),
            Mistake(
                _floor(bandwidth_gb_s=lambda given: given["bandwidth_gb_s"] * 1e3),
                "That is in seconds. The question asks for milliseconds.",
            ),
        ],
        hint="Bytes of the weights, plus bytes of keys and values times context, over bytes per second, in ms.",
    ),
    Exercise(
        name="speed/batch",
        cases=[
            {"batch": 32, "step_seconds": 0.004},
            {"batch": 8, "step_seconds": 0.025},
            {"batch": 3, "step_seconds": 0.5},
        ],
        reference=rates,
        tolerance=1e-6,
        mistakes=[
            Mistake(
                lambda batch, step_seconds: (step_seconds * 1e3 / batch, batch / step_seconds),
                "You divided the latency by the batch. A step gives every reader one token, and each of them waits for "
                "the whole step.",
            ),
            Mistake(
                lambda batch, step_seconds: (step_seconds * 1e3, 1 / step_seconds),
                "That is the rate of one reader. A step gives a token to each sequence of the batch.",
            ),
            Mistake(
                lambda batch, step_seconds: (step_seconds, batch / step_seconds),
                "The wait is in seconds. The question asks for milliseconds.",
            ),
            Mistake(
                lambda batch, step_seconds: (batch * step_seconds * 1e3, batch / step_seconds),
                "The readers do not wait for one another's turn: the step works on all of them at once.",
            ),
        ],
        hint="One step gives every sequence of the batch one token.",
    ),
    Exercise(
        name="speed/timing",
        cases=[
            {"events": [("started", 1.0), ("returned", 1.002), ("finished", 1.35)]},
            {"events": [("built", 0.0), ("started", 2.0), ("returned", 2.0005), ("finished", 2.03)]},
            {"events": [("started", 5.0), ("returned", 5.9), ("finished", 5.95), ("printed", 7.0)]},
        ],
        reference=timed,
        tolerance=1e-6,
        mistakes=[
            Mistake(
                lambda events: dict(events)["returned"] - dict(events)["started"],
                "You stopped the clock when the call returned. It had only been handed over by then: wait for the "
                "device, then look at the clock.",
            ),
            Mistake(
                lambda events: events[-1][1] - events[0][1],
                "From the first entry to the last: that also times building and printing.",
            ),
            Mistake(
                lambda events: dict(events)["finished"] - dict(events)["returned"],
                "The work began when it was started, not when the call returned.",
            ),
        ],
        hint="The work lies between 'started' and 'finished'.",
    ),
    Exercise(
        name="speed/tokens-per-pass",
        cases=[
            {"acceptance": 0.8, "count": 4},
            {"acceptance": 0.5, "count": 1},
            {"acceptance": 0.25, "count": 6},
        ],
        reference=tokens_per_pass,
        tolerance=1e-6,
        mistakes=[
            Mistake(
                lambda acceptance, count: 1 + acceptance * count,
                "A guess behind one that failed is lost too. The second stays only if the first does, with chance "
                "acceptance squared, and so on.",
            ),
            Mistake(
                lambda acceptance, count: sum(acceptance**power for power in range(1, count + 1)),
                "The pass yields one token of its own besides the guesses that stay.",
            ),
            Mistake(
                lambda acceptance, count: 1 / (1 - acceptance),
                "That is the limit for endlessly many guesses. Here there are only so many.",
            ),
            Mistake(
                lambda acceptance, count: 1 + count * acceptance**count,
                "You counted passes in which all guesses stay. Those in which only the first few do count as well.",
            ),
        ],
        hint="Add the chances that at least one, at least two, … guesses stay; the pass itself gives one more token.",
    ),
]
