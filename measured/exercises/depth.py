"""Exercises of ``chapters/architecture/depth.ipynb``."""

from measured.exercises import exercise, named


@exercise(
    "depth/exit",
    cases=[
        {"confidence": [0.95, 0.2, 0.5, 0.92, 0.97, 0.4], "threshold": 0.9, "min_layers": 2},
        {"confidence": [0.1, 0.3, 0.6, 0.7, 0.8, 0.85], "threshold": 0.9, "min_layers": 2},
        {"confidence": [0.1, 0.95, 0.6, 0.99, 0.3], "threshold": 0.5, "min_layers": 4},
        {"confidence": [0.7, 0.9, 0.1, 0.8], "threshold": 0.6, "min_layers": 1},
        {"confidence": [0.2, 0.9, 0.95, 0.1], "threshold": 0.9, "min_layers": 1},
    ],
    mistakes="""
        exit_depth(confidence, threshold, 1)
            A token left too early: before min_layers it may not leave, however sure it is.
        exit_depth(confidence, threshold, min_layers) - 1
            One too few: a depth is a number of layers, and confidence[0] is after layer 1.
        max((depth for depth, sure in enumerate(confidence, 1) if depth >= min_layers and sure > threshold),
        default=len(confidence))
            That is the last time it was sure. It leaves the first time, and never gets that far.
        exit_depth([-sure for sure in confidence], -threshold, min_layers)
            The wrong way round: a token leaves when it is sure, not when it is unsure.
        exit_depth(confidence, threshold - 1e-9, min_layers)
            Nearly: it leaves when it is surer than the threshold, not just as sure.
        max(range(min_layers, len(confidence) + 1), key=lambda depth: confidence[depth - 1])
            To find where it is most confident you would have to run all layers. It leaves at the first that is sure
            enough.
    """,
)
def exit_depth(confidence: list[float], threshold: float, min_layers: int) -> int:
    """Layers that a token goes through; ``confidence[i]`` is that after layer i + 1."""
    for depth, sure in enumerate(confidence, start=1):
        if depth >= min_layers and sure > threshold:
            return depth
    return len(confidence)


@exercise(
    "depth/batch",
    cases=named("depths", ([[4, 24, 6, 8], [5, 4, 20, 4], [4, 9, 7, 24]],), ([[4, 24, 6]],), ([[3, 3], [8, 3]],)),
    mistakes="""
        sum(sum(row) for row in depths)
            You added up all depths. In one step the sequences go through a layer together, so it runs once.
        sum(sum(step) / len(step) for step in zip(*depths, strict=True))
            That is the mean. But a layer runs as long as one sequence still needs it: each step lasts as long as its
            deepest.
        max(sum(row) for row in depths)
            That is the slowest sequence by itself. The deepest may be another one at every step.
        sum(min(step) for step in zip(*depths, strict=True))
            The shallowest may leave, but the others are not done: the step lasts until the deepest is.
    """,
)
def layers_run(depths: list[list[int]]) -> int:
    """Layers that a batch runs in all; ``depths[sequence][step]``. In a step, all wait for the deepest."""
    return sum(max(step) for step in zip(*depths, strict=True))
