"""Exercises of ``chapters/performance/training.ipynb``. Plain Python numbers and lists; no tensors needed."""

import math

from measured.exercises import exercise


@exercise(
    "training/scale",
    cases=[
        {"scale": 1024.0, "interval": 3, "overflows": [False, False, True, False, False, False, False, False]},
        {"scale": 65536.0, "interval": 2, "overflows": [True, True, False, True, False, False, False, False, True]},
        {"scale": 8.0, "interval": 4, "overflows": [False] * 9},
    ],
    mistakes="""
        scale_course(scale, 1, overflows)
            The scale is doubled at every clean step. It would overflow again at once, and every other step would be
            lost: wait for a run of clean steps.
        _course(scale, interval, overflows, resets="growth")
            An overflow halves the scale but does not begin the count of clean steps anew. They have to be in a row.
        scale_course(scale, interval + 1, overflows)
            Off by one: the scale is doubled by the step that completes the run, not by the next.
        scale_course(scale, 10**9, overflows)
            The scale only falls. After a run of clean steps it may grow again.
        _course(scale, interval, overflows, resets="overflow")
            After a doubling the count has to begin anew; as it is, every further clean step doubles.
    """,
    hint="Keep a count of clean steps. An overflow halves and sets it to 0; reaching the interval doubles and sets "
    "it to 0.",
)
def scale_course(scale: float, interval: int, overflows: list[bool]) -> list[float]:
    """The loss scale after each step: halved by an overflow, doubled after ``interval`` clean steps in a row."""
    course, clean = [], 0
    for overflow in overflows:
        if overflow:
            scale, clean = scale / 2, 0
        else:
            clean += 1
            if clean == interval:
                scale, clean = scale * 2, 0
        course.append(scale)
    return course


@exercise(
    "training/clip",
    cases=[
        {"gradient": [3072.0, -4096.0], "scale": 1024.0, "max_norm": 1.0},
        {"gradient": [300.0, 400.0, 0.0], "scale": 1024.0, "max_norm": 1.0},
        {"gradient": [6.0, 8.0], "scale": 2.0, "max_norm": 4.0},
        {"gradient": [0.3, 0.4], "scale": 2.0, "max_norm": 1.0},
    ],
    mistakes="""
        [g / scale for g in prepare(gradient, 1.0, max_norm)]
            Clipped before unscaling: the norm is then that of the scaled gradient, so nearly every step is cut, and by
            an amount that moves with the scale. Divide first.
        prepare(gradient, 1.0, max_norm)
            The gradient is never divided by the scale; clipping only hides it.
        [g / scale for g in gradient]
            The true gradient, but not clipped: its norm may be above max_norm.
        [max(-max_norm, min(max_norm, g / scale)) for g in gradient]
            Each number is cut by itself, which turns the gradient into another direction. Shorten the whole.
        [g * max_norm / math.hypot(*gradient) for g in gradient]
            Every gradient is given the norm max_norm, also those that were shorter. Clipping only shortens.
    """,
    hint="Divide by the scale, take the norm of that, and multiply by max_norm / norm if the norm is larger.",
)
def prepare(gradient: list[float], scale: float, max_norm: float) -> list[float]:
    """What the optimiser may see of a gradient of the scaled loss: true size, and a norm of at most ``max_norm``."""
    true = [g / scale for g in gradient]
    norm = math.hypot(*true)
    return [g * min(1.0, max_norm / norm) for g in true]


@exercise(
    "training/accumulate",
    cases=[
        {"parts": [[1.0, 2.0, 3.0, 6.0], [10.0]]},
        {"parts": [[2.0, 4.0], [1.0, 3.0, 5.0], [7.0]]},
        {"parts": [[0.5] * 6, [2.0, 4.0]]},
    ],
    mistakes="""
        sum(sum(part) / len(part) for part in parts)
            Never divided: the means of the parts are added up, so the step grows with the number of parts.
        sum(sum(part) / len(part) for part in parts) / len(parts) ** 2
            Divided by the number of parts twice, as happens when both the loss and the gradient are.
        sum(sum(part) / len(part) for part in parts) / len(parts)
            The mean of the parts' means: a term in a short part then counts for more than one in a long part. Weigh
            each part by its terms.
        sum(sum(part) for part in parts)
            That is the sum over all terms. The mean is asked for.
    """,
    hint="Every term of the batch counts the same, in whichever part it comes.",
)
def batch_gradient(parts: list[list[float]]) -> float:
    """Gradient of the mean over all terms of a batch, which comes in parts of different lengths."""
    terms = sum(len(part) for part in parts)
    return sum(len(part) / terms * (sum(part) / len(part)) for part in parts)


@exercise(
    "training/warm-up",
    cases=[
        *({"step": step, "steps": 14, "rise": 4, "peak": 0.003} for step in (0, 3, 4, 13)),
        *({"step": step, "steps": 60, "rise": 10, "peak": 0.02} for step in (5, 30)),
    ],
    mistakes="""
        peak * step / rise if step < rise else learning_rate(step, steps, rise, peak)
            Off by one: the first step has a rate of zero, so a batch is computed and thrown away, and the step before
            the cosine is not yet at the peak. Step 0 is the first of the rise.
        learning_rate(step, steps, rise, peak) if step < rise
        else peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - 1 - rise)))
            The cosine ends at zero. It should end at a tenth of the peak.
        learning_rate(step, steps + 1, rise, peak)
            The last step, number steps - 1, does not reach a tenth: the cosine is laid out over one step more than
            there is.
        learning_rate(step, steps, rise, peak) if step < rise
        else peak * (0.1 + 0.45 * (1 + math.cos(math.pi * step / (steps - 1))))
            The cosine begins at step 0 and not where the rise ends, so the rate jumps down there.
    """,
    hint="Rise: (step + 1) / rise. Then progress runs from 0 at step = rise to 1 at step = steps - 1.",
)
def learning_rate(step: int, steps: int, rise: int, peak: float) -> float:
    """Rate at ``step`` (0 to steps - 1): up a line to ``peak`` in ``rise`` steps, down a cosine to a tenth of it."""
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / (steps - 1 - rise)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _course(scale: float, interval: int, overflows: list[bool], resets: str) -> list[float]:
    """As :func:`scale_course`, but only one event, ``overflow`` or ``growth``, begins the count of clean steps anew."""
    course, clean = [], 0
    for overflow in overflows:
        clean += not overflow
        event = "overflow" if overflow else "growth" if clean >= interval else "none"
        scale *= {"overflow": 0.5, "growth": 2, "none": 1}[event]
        clean = 0 if event == resets else clean
        course.append(scale)
    return course
