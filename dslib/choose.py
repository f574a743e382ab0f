"""``python -m dslib.choose``: which models fit, which do not and why, as readable text (YAML) or as JSON.

    python -m dslib.choose --vram 24GB --modality image --licence commercial
    python -m dslib.choose --gpu A100_80GB --context 16000 --wish mmlu=0.7 --wish memory=0.3
    echo '{"memory": "24 GB", "wishes": {"memory": 1}}' | python -m dslib.choose --json -

Exit status: 0 something fits, 1 nothing is sure to (the nearest miss is named), 2 bad arguments. Amounts have units,
GB is meant after --vram. ``--json``: fields of ``Needs``, and "wishes". Book: ``chapters/scenarios/choose.ipynb``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from dslib.scenarios.choose import STATES, Answer, Constraint, Judged, changes, choose, front, nearest
from dslib.scenarios.needs import Needs

UNITS = {"memory": (1e-9, " GB"), "token_time": (1e3, " ms"), "first_token": (1e3, " ms"), "dollars": (1, " $ a month")}
YES_OR_NO = ("to be had", "modality", "data stays", "licence", "engine")


def number(test: Constraint, value: float) -> str:
    """A figure of a test in its usual unit."""
    if not math.isfinite(value):
        return "nothing" if (value > 0) == test.at_least else "not known"
    if test.name == "released":
        return date.fromordinal(round(value)).isoformat()
    factor, unit = UNITS.get(test.name, (1, ""))
    return f"{value * factor:,.4g}{unit}" if value * factor < 1e4 else f"{value * factor:,.0f}{unit}"


def explain(test: Constraint) -> str:
    """One line: the verdict, the figure and its limit, how it came about, what would do, the sources and the basis."""
    low, high = (number(test, end) for end in (test.span.low, test.span.high))
    figure = low if low == high else f"from {low}" if high == "not known" else f"{low} to {high}"
    text = test.span.formula
    if test.name not in YES_OR_NO:
        text = f"{figure}, asked {'at least' if test.at_least else 'at most'} {number(test, test.limit)} ({text})"
        if test.verdict == "out" and math.isfinite(test.would_pass):
            text += f"; would pass if {number(test, test.would_pass)} were the limit"
    return f"{test.verdict}, {text} [{', '.join((*test.span.source, test.span.basis))}]"


def report(answer: Answer, most: int = 10) -> dict[str, Any]:
    """The answer as plain data: what fits, what cannot be said, the front, the nearest miss, what would change it."""

    def told(row: Judged) -> dict[str, Any]:
        points = [row.points.low, row.points.high] if row.points else f"none, not known: {', '.join(row.missing)}"
        ranked = {"points": points} if answer.weights else {}
        return {"option": row.option.name, **ranked, "tests": {test.name: explain(test) for test in row.tests}}

    known = {status: answer.having(status) for status in STATES}
    miss = nearest(known["out"])
    return {
        "first": answer.first,
        "counts": {status: len(rows) for status, rows in known.items()},
        "in": [told(row) for row in known["in"][:most]],
        "cannot be said": [told(row) for row in known["cannot be said"][:most]],
        "front": [row.option.name for row in front(known["in"])] if answer.weights else [],
        "nearest miss": miss and told(miss),
        "changes": changes(answer) if answer.best else {},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = vars(_parser().parse_args(arguments))
    source, memory, wishes = given.pop("json"), given.pop("vram"), dict(given.pop("wish"))
    try:
        if source:
            needs = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8"))
            wishes = needs.pop("wishes", {})
        else:
            memory = f"{memory} GB" if memory and not memory.strip("0123456789. ") else memory
            given |= {"score": dict(given["score"]), "memory": memory}
            needs = {name: value for name, value in given.items() if value not in (None, {})}
        found = report(choose(Needs.of(needs), wishes))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        print(f"dslib.choose: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if source else yaml.safe_dump(found, sort_keys=False, width=1000))
    return 0 if found["in"] else 1


def _parser() -> argparse.ArgumentParser:
    ask = argparse.ArgumentParser("python -m dslib.choose", description="Which models fit, and why the others do not.")
    ask.add_argument("--json", help="a file with the needs, or - for standard input; prints JSON")
    ask.add_argument("--vram", help="memory of the place, such as 24GB")
    for name in ("gpu", "where", "model", "licence", "engine", "day", "token-time", "first-token", "budget"):
        ask.add_argument(f"--{name}")
    for name in ("context", "prompt", "answer", "requests", "reserve", "rent", "gpus", "users"):
        ask.add_argument(f"--{name}", type=json.loads, metavar="NUMBER")
    ask.add_argument("--modality", action="append", help="text, image or picture; may be repeated")
    ask.add_argument("--stay", action="store_const", const=True, help="prompts may not leave the house")
    for name in ("score", "wish"):
        ask.add_argument(f"--{name}", action="append", default=[], type=pair, metavar="NAME=NUMBER")
    return ask


def pair(text: str) -> tuple[str, float]:
    """``"mmlu=70"`` as a name and a number."""
    name, value = text.split("=")
    return name, float(value)


if __name__ == "__main__":
    sys.exit(main())
