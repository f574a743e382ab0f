"""Exercises of ``chapters/performance/training.ipynb``. Plain Python numbers and lists; no tensors needed."""

import math

from measured.exercises import Exercise, Mistake


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


def prepare(gradient: list[float], scale: float, max_norm: float) -> list[float]:
    """What the optimiser may see of a gradient of the scaled loss: true size, and a norm of at most ``max_norm``."""
    true = [g / scale for g in gradient]
    norm = math.hypot(*true)
    return [g * min(1.0, max_norm / norm) for g in true]


def batch_gradient(parts: list[list[float]]) -> float:
    """Gradient of the mean over all terms of a batch, which comes in parts of different lengths."""
    terms = sum(len(part) for part in parts)
    return sum(len(part) / terms * (sum(part) / len(part)) for part in parts)


def learning_rate(step: int, steps: int, rise: int, peak: float) -> float:
    """Rate at ``step`` (0 to steps - 1): up a line to ``peak`` in ``rise`` steps, down a cosine to a tenth of it."""
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / (steps - 1 - rise)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _course(scale: float, interval: int, overflows: list[bool], *, least: int, reset: bool) -> list[float]:
    course, clean = [], 0
    for overflow in overflows:
        if overflow:
            scale, clean = scale / 2, (0 if reset else clean)
        else:
            clean += 1
            if clean >= least:
                scale, clean = scale * 2, (0 if reset else clean)
        course.append(scale)
    return course


def _doubled_at_every_step(scale: float, interval: int, overflows: list[bool]) -> list[float]:
    return _course(scale, interval, overflows, least=1, reset=True)


def _one_late(scale: float, interval: int, overflows: list[bool]) -> list[float]:
    return _course(scale, interval, overflows, least=interval + 1, reset=True)


def _never_grows(scale: float, interval: int, overflows: list[bool]) -> list[float]:
    return _course(scale, interval, overflows, least=10**9, reset=True)


def _count_runs_on(scale: float, interval: int, overflows: list[bool]) -> list[float]:
    """The counter survives an overflow."""
    course, clean = [], 0
    for overflow in overflows:
        if overflow:
            scale /= 2
        else:
            clean += 1
            if clean == interval:
                scale, clean = scale * 2, 0
        course.append(scale)
    return course


def _no_reset_after_growth(scale: float, interval: int, overflows: list[bool]) -> list[float]:
    course, clean = [], 0
    for overflow in overflows:
        clean = 0 if overflow else clean + 1
        scale = scale / 2 if overflow else scale * 2 if clean >= interval else scale
        course.append(scale)
    return course


def _clipped(gradient: list[float], max_norm: float) -> list[float]:
    return [g * min(1.0, max_norm / math.hypot(*gradient)) for g in gradient]


def _clip_first(gradient: list[float], scale: float, max_norm: float) -> list[float]:
    return [g / scale for g in _clipped(gradient, max_norm)]


def _each_number(gradient: list[float], scale: float, max_norm: float) -> list[float]:
    return [max(-max_norm, min(max_norm, g / scale)) for g in gradient]


def _always_that_long(gradient: list[float], scale: float, max_norm: float) -> list[float]:
    return [g * max_norm / math.hypot(*gradient) for g in gradient]


def _mean(part: list[float]) -> float:
    return sum(part) / len(part)


def _from_zero(step: int, steps: int, rise: int, peak: float) -> float:
    return peak * step / rise if step < rise else learning_rate(step, steps, rise, peak)


def _down_to_zero(step: int, steps: int, rise: int, peak: float) -> float:
    if step < rise:
        return learning_rate(step, steps, rise, peak)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - 1 - rise)))


def _past_the_end(step: int, steps: int, rise: int, peak: float) -> float:
    """The cosine is laid out over one step too many, so that the last step does not reach the tenth."""
    return learning_rate(step, steps + 1, rise, peak)


def _cosine_from_the_start(step: int, steps: int, rise: int, peak: float) -> float:
    if step < rise:
        return learning_rate(step, steps, rise, peak)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * step / (steps - 1))))


EXERCISES = [
    Exercise(
        name="training/scale",
        cases=[
            {"scale": 1024.0, "interval": 3, "overflows": [False, False, True, False, False, False, False, False]},
            {"scale": 65536.0, "interval": 2, "overflows": [True, True, False, True, False, False, False, False, True]},
            {"scale": 8.0, "interval": 4, "overflows": [False] * 9},
        ],
        reference=scale_course,
        mistakes=[
            Mistake(
                _doubled_at_every_step,
                "The scale is doubled at every clean step. It would overflow again at once, and every other step would "
                "be lost: wait for a run of clean steps.",
            ),
            Mistake(
                _count_runs_on,
                "An overflow halves the scale but does not begin the count of clean steps anew. They have to be in a "
                "row.",
            ),
            Mistake(_one_late, "Off by one: the scale is doubled by the step that completes the run, not by the next."),
            Mistake(_never_grows, "The scale only falls. After a run of clean steps it may grow again."),
            Mistake(
                _no_reset_after_growth,
                "After a doubling the count has to begin anew; as it is, every further clean step doubles.",
            ),
        ],
        hint="Keep a count of clean steps. An overflow halves and sets it to 0; reaching the interval doubles and sets "
        "it to 0.",
    ),
    Exercise(
        name="training/clip",
        cases=[
            {"gradient": [3072.0, -4096.0], "scale": 1024.0, "max_norm": 1.0},
            {"gradient": [300.0, 400.0, 0.0], "scale": 1024.0, "max_norm": 1.0},
            {"gradient": [6.0, 8.0], "scale": 2.0, "max_norm": 4.0},
            {"gradient": [0.3, 0.4], "scale": 2.0, "max_norm": 1.0},
        ],
        reference=prepare,
        mistakes=[
            Mistake(
                _clip_first,
                "Clipped before unscaling: the norm is then that of the scaled gradient, so nearly every step is cut, "
                "and by an amount that moves with the scale. Divide first.",
            ),
            Mistake(
                lambda gradient, scale, max_norm: _clipped(gradient, max_norm),
                "The gradient is never divided by the scale; clipping only hides it.",
            ),
            Mistake(
                lambda gradient, scale, max_norm: [g / scale for g in gradient],
                "The true gradient, but not clipped: its norm may be above max_norm.",
            ),
            Mistake(
                _each_number,
                "Each number is cut by itself, which turns the gradient into another direction. Shorten the whole.",
            ),
            Mistake(
                _always_that_long,
                "Every gradient is given the norm max_norm, also those that were shorter. Clipping only shortens.",
            ),
        ],
        hint="Divide by the scale, take the norm of that, and multiply by max_norm / norm if the norm is larger.",
    ),
    Exercise(
        name="training/accumulate",
        cases=[
            {"parts": [[1.0, 2.0, 3.0, 6.0], [10.0]]},
            {"parts": [[2.0, 4.0], [1.0, 3.0, 5.0], [7.0]]},
            {"parts": [[0.5] * 6, [2.0, 4.0]]},
        ],
        reference=batch_gradient,
        mistakes=[
            Mistake(
                lambda parts: sum(_mean(part) for part in parts),
                "Never divided: the means of the parts are added up, so the step grows with the number of parts.",
            ),
            Mistake(
                lambda parts: sum(_mean(part) for part in parts) / len(parts) ** 2,
                "Divided by the number of parts twice, as happens when both the loss and the gradient are.",
            ),
            Mistake(
                lambda parts: sum(_mean(part) for part in parts) / len(parts),
                "The mean of the parts' means: a term in a short part then counts for more than one in a long part. "
                "Weigh each part by its terms.",
            ),
            Mistake(
                lambda parts: sum(sum(part) for part in parts),
                "That is the sum over all terms. The mean is asked for.",
            ),
        ],
        hint="Every term of the batch counts the same, in whichever part it comes.",
    ),
    Exercise(
        name="training/warm-up",
        cases=[{"step": step, "steps": 14, "rise": 4, "peak": 0.003} for step in (0, 1, 3, 4, 9, 13)],
        reference=learning_rate,
        mistakes=[
            Mistake(
                _from_zero,
                "Off by one: the first step has a rate of zero, so a batch is computed and thrown away, and the step "
                "before the cosine is not yet at the peak. Step 0 is the first of the rise.",
            ),
            Mistake(_down_to_zero, "The cosine ends at zero. It should end at a tenth of the peak."),
            Mistake(
                _past_the_end,
                "The last step, number steps - 1, does not reach a tenth: the cosine is laid out over one step more "
                "than there is.",
            ),
            Mistake(
                _cosine_from_the_start,
                "The cosine begins at step 0 and not where the rise ends, so the rate jumps down there.",
            ),
        ],
        hint="Rise: (step + 1) / rise. Then progress runs from 0 at step = rise to 1 at step = steps - 1.",
    ),
]
