"""Exercises of ``chapters/performance/does_it_help.ipynb``."""

import numpy as np
from scipy import stats

from measured.exercises import exercise, named


def _needed(differences, effect: float, power: float, ddof: int = 1, level: float = 0.975, quantile=stats.t.ppf) -> int:
    sd, n = float(np.std(differences, ddof=ddof)), 2
    while n < ((quantile(level, n - 1) + quantile(power, n - 1)) * sd / effect) ** 2:
        n += 1
    return n


@exercise(
    "does_it_help/pairs",
    cases=named(
        "differences effect power",
        ([-0.006, -0.002, -0.009, -0.004], 0.004, 0.8),
        ([0.011, 0.002, -0.003, 0.007, 0.001], 0.003, 0.9),
        ([0.5, 0.4, 0.7], 0.9, 0.8),
    ),
    mistakes="""
        _needed(differences, effect, power, ddof=0)
            Your standard deviation divides by n. With few values that is too small: divide by n - 1 (`ddof=1`).
        _needed(differences, effect, power, level=0.95)
            An interval of 95 % leaves 2.5 % at either end: the quantile is that of 0.975.
        _needed(differences, effect, power, quantile=lambda share, _: stats.norm.ppf(share))
            Those are the quantiles of a normal distribution (1.96). The spread is itself estimated, from n values: take
            Student's t with n - 1 degrees of freedom.
        _needed(differences, effect, 0.5)
            The power is missing: with this n a true difference of that size is seen only every other time.
        _needed(np.asarray(differences) - np.mean(differences) + 1, np.mean(differences), power)
            You divide by the mean of the pilot. `effect` is the difference that would matter, whatever was found.
    """,
    hint="Try n = 2, 3, 4, … until n is at least ((t(0.975) + t(power)) sd / effect)², with n - 1 degrees of freedom.",
)
def pairs(differences: list[float], effect: float, power: float) -> int:
    """The smallest number of pairs, from 2 on, that sees a true difference ``effect`` with this power."""
    return _needed(differences, effect, power)


def _bits(run, speed: float, end: float) -> float:
    tokens, bits = zip(*run, strict=True)
    return float(np.interp(end, np.array(tokens) * speed, bits))


def _at(arm, base, arm_speed: float, base_speed: float, end: float) -> float:
    return _bits(arm, arm_speed, end) - _bits(base, base_speed, end)


@exercise(
    "does_it_help/seconds",
    cases=named(
        "arm base arm_speed base_speed",
        ([(1, 2.0), (2, 1.8), (4, 1.6)], [(1, 2.1), (2, 1.9), (4, 1.75)], 2.0, 1.0),
        ([(10, 3.0), (30, 2.0)], [(10, 3.1), (20, 2.4), (40, 1.9)], 0.5, 0.75),
        ([(1, 1.5), (3, 1.2), (5, 1.1)], [(2, 1.45), (6, 1.0)], 1.5, 1.1),
    ),
    mistakes="""
        arm[-1][1] - base[-1][1]
            Those are the ends of both runs, which one reached long before the other. Compare where the shorter ends.
        _at(arm, base, 1, 1, min(arm[-1][0], base[-1][0]))
            That is at equal tokens. Multiply the tokens of each run by its own seconds a token.
        _at(base, arm, base_speed, arm_speed, min(arm[-1][0] * arm_speed, base[-1][0] * base_speed))
            The sign: the arm less the base, so that above 0 means that the arm is worse.
        _at(arm, base, 1 / arm_speed, 1 / base_speed, min(arm[-1][0] / arm_speed, base[-1][0] / base_speed))
            The speeds are seconds a token: multiply by them.
    """,
    hint="Seconds of a look: its tokens times the seconds a token. Interpolate both runs at the smaller of the ends.",
)
def at_equal_seconds(arm: list, base: list, arm_speed: float, base_speed: float) -> float:
    """Bits of ``arm`` less those of ``base``, lists of (tokens, bits), after as many seconds."""
    return _at(arm, base, arm_speed, base_speed, min(arm[-1][0] * arm_speed, base[-1][0] * base_speed))


def _run(rates=3, seeds=(0, 1, 2), schedule=0, steps=400, text="validation") -> dict:
    return {"rates": rates, "seeds": list(seeds), "schedule": schedule, "steps": steps, "text": text}


def _fair(reports, keys=("rates", "seeds", "text"), level=True, ended=True, mixed=False, steps=False) -> list[int]:
    def whole(run) -> bool:
        return run["schedule"] == run["steps"] or not ended

    def alike(a, b) -> bool:
        planned = (level and a["schedule"] == b["schedule"] == 0) or (
            all(run["schedule"] > 0 or mixed for run in (a, b)) and all(whole(run) or mixed for run in (a, b))
        )
        return all(a[key] == b[key] for key in keys) and planned and (not steps or a["steps"] == b["steps"])

    return [number for number, pair in enumerate(reports) if alike(*pair)]


_PLANNED = {"schedule": 400, "steps": 400}


@exercise(
    "does_it_help/fair",
    cases=named(
        "reports",
        (
            [
                (_run(), _run()),
                (_run(rates=5), _run(rates=1)),
                (_run(steps=300), _run(steps=500)),
                (_run(**_PLANNED), _run(schedule=800, steps=400)),
                (_run(text="test"), _run(text="validation")),
            ],
        ),
        (
            [
                (_run(seeds=(0, 1, 2)), _run(seeds=(3, 4, 5))),
                (_run(**_PLANNED), _run(schedule=300, steps=300)),
                (_run(**_PLANNED), _run()),
                (_run(rates=1), _run(rates=1)),
                (_run(seeds=(1, 0)), _run(seeds=(0, 1))),
                (_run(schedule=800, steps=400), _run(schedule=800, steps=400)),
            ],
        ),
    ),
    mistakes="""
        _fair(reports, keys=("seeds", "text"))
            One side was tuned with more rates than the other, and you let it pass.
        _fair(reports, keys=("rates", "text"))
            Other seeds, or the same in another order, are no pairs.
        _fair(reports, keys=("rates", "seeds"))
            The two sides were judged by different texts.
        _fair(reports, mixed=True)
            One side has a schedule and the other a level rate, or a schedule was cut off before its end.
        _fair(reports, ended=False)
            A run that stops before the end of its schedule is worse than one planned to be so short. On
            both sides it is still no run of that length.
        _fair(reports, steps=True)
            Steps may differ: at equal seconds, or equal operations, one side gets more of them.
        _fair(reports, level=False)
            With a level rate on both sides (schedule 0) a run may be cut anywhere: that is fair.
        [n for n in range(len(reports)) if n not in _fair(reports)]
            Those are the unfair ones.
    """,
    hint="Same rates tried, same seeds in order, same text; and both schedules 0, or each equal to its steps.",
)
def fair(reports: list) -> list[int]:
    """The numbers of the fair comparisons, pairs of dicts."""
    return _fair(reports)
