"""Exercises of ``chapters/performance/speed.ipynb``. Units: bytes, seconds, and what a name ends in."""

from measured.exercises import exercise, named


@exercise(
    "speed/decode-floor",
    cases=named(
        "parameters bits_per_weight kv_bytes_per_token context bandwidth_gb_s",
        (1.28e9, 16, 196_608, 4096, 1555),
        (7e9, 4.5, 131_072, 16_384, 3350),
        (135e6, 32, 46_080, 512, 45),
    ),
    tolerance=1e-3,
    mistakes="""
        decode_floor_ms(parameters, 8 * bits_per_weight, kv_bytes_per_token, context, bandwidth_gb_s)
            Eight times too much for the weights: a weight of 16 bits has 2 bytes, and the bandwidth is in bytes.
        decode_floor_ms(parameters, bits_per_weight, kv_bytes_per_token, 0, bandwidth_gb_s)
            The weights alone. Each token also reads the keys and values of its whole context.
        decode_floor_ms(parameters, bits_per_weight, kv_bytes_per_token, context, bandwidth_gb_s * 2**30 / 1e9)
            7 % too short: a bandwidth in GB/s counts 10**9 bytes, not 2**30 (that would be GiB/s).
        decode_floor_ms(parameters, bits_per_weight, kv_bytes_per_token, context, bandwidth_gb_s * 1e3)
            That is in seconds. The question asks for milliseconds.
    """,
    hint="Bytes of the weights, plus bytes of keys and values times context, over bytes per second, in ms.",
)
def decode_floor_ms(
    parameters: float, bits_per_weight: float, kv_bytes_per_token: float, context: int, bandwidth_gb_s: float
) -> float:
    """Least milliseconds for one token of one reader: weights, and the keys and values of the context, read once."""
    moved = parameters * bits_per_weight / 8 + kv_bytes_per_token * context
    return moved / (bandwidth_gb_s * 1e9) * 1e3


@exercise(
    "speed/batch",
    cases=named("batch step_seconds", (32, 0.004), (8, 0.025), (3, 0.5)),
    mistakes="""
        (step_seconds * 1e3 / batch, batch / step_seconds)
            You divided the latency by the batch. A step gives every reader one token, and each of them waits for the
            whole step.
        (step_seconds * 1e3, 1 / step_seconds)
            That is the rate of one reader. A step gives a token to each sequence of the batch.
        (step_seconds, batch / step_seconds)
            The wait is in seconds. The question asks for milliseconds.
        (batch * step_seconds * 1e3, batch / step_seconds)
            The readers do not wait for one another's turn: the step works on all of them at once.
    """,
    hint="One step gives every sequence of the batch one token.",
)
def rates(batch: int, step_seconds: float) -> tuple[float, float]:
    """(milliseconds that each reader waits for a token, tokens per second of all readers together)."""
    return step_seconds * 1e3, batch / step_seconds


@exercise(
    "speed/timing",
    cases=[
        {"events": [("started", 1.0), ("returned", 1.002), ("finished", 1.35)]},
        {"events": [("built", 0.0), ("started", 2.0), ("returned", 2.0005), ("finished", 2.03)]},
        {"events": [("started", 5.0), ("returned", 5.9), ("finished", 5.95), ("printed", 7.0)]},
    ],
    mistakes="""
        dict(events)["returned"] - dict(events)["started"]
            You stopped the clock when the call returned. It had only been handed over by then: wait for the device,
            then look at the clock.
        events[-1][1] - events[0][1]
            From the first entry to the last: that also times building and printing.
        dict(events)["finished"] - dict(events)["returned"]
            The work began when it was started, not when the call returned.
    """,
    hint="The work lies between 'started' and 'finished'.",
)
def timed(events: list[tuple[str, float]]) -> float:
    """Seconds that the work took, from a log of (what happened, when)."""
    when = dict(events)
    return when["finished"] - when["started"]
