"""Exercises of ``chapters/performance/does_it_help.ipynb``."""

import numpy as np
from scipy import stats

from measured.exercises import exercise, named


def _needed(
    differences, effect: float, sure: float, ddof: int = 1, level: float = 0.975, power: float = 0.8, free: int = -1,
    quantile=stats.t.ppf,
) -> int:  # fmt: skip
    """``sure``: None plans with the spread that was found."""
    found, n = float(np.std(differences, ddof=ddof)), 2
    free += len(differences)
    sd = found * (free / stats.chi2.ppf(1 - sure, free)) ** 0.5 if sure else found
    while n < ((quantile(level, n - 1) + quantile(power, n - 1)) * sd / effect) ** 2:
        n += 1
    return n


@exercise(
    "does_it_help/pairs",
    cases=named(
        "differences effect sure",
        ([-0.006, -0.002, -0.009, -0.004], 0.004, 0.8),
        ([0.011, 0.002, -0.003, 0.007, 0.001], 0.003, 0.9),
        ([0.005, 0.004, 0.007], 0.009, 0.8),
    ),
    mistakes="""
        _needed(differences, effect, None)
            That plans with the spread that the pilot found. The true one is larger about every other time: multiply by
            the factor of the page, for `sure`.
        _needed(differences, effect, 1 - sure)
            You took the other end: the true spread is *below* yours with probability `sure`, so the factor is above 1.
            It divides by the chi-squared quantile of 1 - sure.
        _needed(differences, effect, (1 + sure) / 2)
            That is the upper end of an interval with two ends. Here one end is asked for: below it with `sure`.
        _needed(differences, effect, sure, free=0)
            n values leave n - 1 degrees of freedom for their spread.
        _needed(differences, effect, sure, ddof=0)
            Your standard deviation divides by n. With few values that is too small: divide by n - 1 (`ddof=1`).
        _needed(differences, effect, sure, level=0.95)
            An interval of 95 % leaves 2.5 % at either end: the quantile is that of 0.975.
        _needed(differences, effect, sure, quantile=lambda share, _: stats.norm.ppf(share))
            Those are the quantiles of a normal distribution (1.96). The spread is itself estimated, from n values: take
            Student's t with n - 1 degrees of freedom.
    """,
    hint="`number_needed` of the page, with the pilot's spread times `spread_factor(len(differences), sure)`.",
)
def pairs(differences: list[float], effect: float, sure: float) -> int:
    """Pairs, from 2 on, that see ``effect`` with a power of 0.8 at the spread's upper end for ``sure``."""
    return _needed(differences, effect, sure)


def _reached(run, level: float) -> float:
    tokens, bits = np.array(run, dtype=float).T
    return float(np.interp(-level, -bits, tokens))


def _pace(arm, base, level: float) -> float:
    return _reached(base, level) / _reached(arm, level)


def _worse(arm, base) -> float:
    return max(arm[-1][1], base[-1][1])


@exercise(
    "does_it_help/pace",
    cases=named(
        "arm base",
        ([(1, 2.0), (2, 1.8), (4, 1.6)], [(1, 2.1), (2, 1.9), (4, 1.75)]),
        ([(10, 3.1), (20, 2.4), (40, 2.2)], [(10, 3.0), (30, 2.0)]),
        ([(1, 1.5), (3, 1.2), (5, 1.1)], [(2, 1.45), (6, 1.0)]),
    ),
    mistakes="""
        _pace(base, arm, _worse(arm, base))
            Upside down: asked for is the arm's time over the base's.
        _pace(arm, base, min(arm[-1][1], base[-1][1]))
            One of the two never reaches those bits, so that both seem to need all of their tokens. Take the last bits
            that *both* have reached.
        (arm[-1][1] / base[-1][1])
            Bits over bits say nothing of time: read off how many tokens each needs for the same bits.
        _pace(arm, base, arm[-1][1])
            Those are the arm's last bits. Where the arm ends lower than the base, the base never reaches them.
        _pace(arm, base, base[-1][1])
            Those are the base's last bits. Where the base ends lower than the arm, the arm never reaches them.
    """,
    hint="Level means the same bits, those of the worse of the two ends. How many tokens does each need for them?",
)
def break_even(arm: list, base: list) -> float:
    """Seconds a token of ``arm`` over those of ``base``, lists of (tokens, bits), at which equal seconds are level."""
    return _pace(arm, base, _worse(arm, base))


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
