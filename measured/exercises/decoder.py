"""Exercises of ``chapters/architecture/decoder.ipynb``."""

from measured.exercises import exercise, named


@exercise(
    "decoder/kv-bytes",
    cases=[
        {"layers": 24, "heads": 16, "kv_heads": 16, "head_dim": 128, "tokens": 4096, "bytes_per_number": 2},
        {"layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "tokens": 1, "bytes_per_number": 4},
        {"layers": 95, "heads": 64, "kv_heads": 8, "head_dim": 128, "tokens": 4096, "bytes_per_number": 2},
    ],
    mistakes="""
        layers * kv_heads * head_dim * tokens * bytes_per_number
            Half of it: keys are counted, values are not. Both are kept.
        2 * layers * heads * head_dim * tokens * bytes_per_number
            You counted query heads. Queries are used once and dropped; only the key-value heads are kept, and with
            grouped queries there are fewer of them.
        2 * kv_heads * head_dim * tokens * bytes_per_number
            That is one layer. Every layer has keys and values of its own.
        2 * layers * kv_heads * head_dim * tokens * bytes_per_number * 8
            Eight times too much: that is in bits, and the question asks for bytes.
    """,
)
def kv_bytes(layers: int, heads: int, kv_heads: int, head_dim: int, tokens: int, bytes_per_number: int) -> int:
    """Bytes of the keys and values that a decoder keeps for ``tokens`` tokens."""
    return 2 * layers * kv_heads * head_dim * tokens * bytes_per_number


@exercise(
    "decoder/visible-keys",
    cases=named("position window sinks", (9, 4, 0), (9, 4, 2), (2, 4, 2), (1, 2, 4), (6, 1, 1)),
    mistakes="""
        visible_keys(position, window + 1, sinks)
            One key too many: the window counts the token itself, so a window of 4 reaches back 3.
        [key for key in visible_keys(position, window, sinks) if key != position]
            A token may look at itself too: its own key is the last one in its window.
        visible_keys(position, window, 0)
            The sinks are missing: the first positions stay visible after the window has moved on.
        [*range(min(sinks, position + 1)), *range(max(0, position - window + 1), position + 1)]
            Early in the text the window still covers the sinks. Then some keys are listed twice, and attention would
            count them twice.
        sorted({*range(sinks), *range(max(0, position - window + 1), position + 1)})
            At the very beginning some sinks lie ahead of the token. Nothing that comes later may be looked at.
    """,
)
def visible_keys(position: int, window: int, sinks: int) -> list[int]:
    """Positions that the token at ``position`` may look at, in order."""
    return [key for key in range(position + 1) if key > position - window or key < sinks]


@exercise(
    "decoder/rolling-slot",
    cases=named("position window sinks", (3, 4, 0), (13, 4, 0), (1, 4, 2), (8, 4, 2), (13, 5, 3)),
    mistakes="""
        position % window
            This ring runs over the sinks: their slots come first and are never written again.
        position if position < sinks else sinks + position % window
            Nearly: the ring begins where the sinks end, so count positions from there first.
        position % (window + sinks)
            One ring over all slots overwrites the sinks after one round. They need slots of their own.
    """,
)
def slot(position: int, window: int, sinks: int) -> int:
    """Slot of a rolling cache in which ``position`` is kept."""
    return position if position < sinks else sinks + (position - sinks) % window
