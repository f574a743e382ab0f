"""``python -m dslib.choose``: which models fit, which do not and why, as a table or as JSON.

    python -m dslib.choose --vram 24GB --modality image --licence commercial
    python -m dslib.choose --gpu A100_80GB --context 16000 --wish mmlu=0.7 --wish memory=0.3
    echo '{"memory": "24 GB", "wishes": {"memory": 1}}' | python -m dslib.choose --json -

Exit status: 0 something fits, 1 nothing is sure to fit (the nearest miss is named), 2 bad arguments. Amounts carry a
unit; a bare number after --vram is in GB. ``--json`` reads the fields of ``dslib.scenarios.needs.Needs`` and "wishes".

Book: ``chapters/scenarios/choose.ipynb``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import date
from pathlib import Path
from typing import Any

from dslib.scenarios.choose import Answer, Constraint, Judged, changes, choose
from dslib.scenarios.needs import Needs

TEXTS = ("gpu", "where", "model", "licence", "engine", "day", "token-time", "first-token", "budget")
NUMBERS = ("context", "prompt", "answer", "requests", "reserve", "rent")


def number(test: Constraint, value: float) -> str:
    """A figure of a test in its usual unit."""
    if not math.isfinite(value):
        return "nothing" if (value > 0) == test.at_least else "not known"
    if test.name == "released":
        return date.fromordinal(round(value)).isoformat()
    factor, unit = {"memory": (1e-9, " GB"), "token time": (1e3, " ms"), "first token": (1e3, " ms")}.get(
        test.name, (1, "")
    )
    text = f"{value * factor:,.4g}" if abs(value * factor) < 1e4 else f"{value * factor:,.0f}"
    return f"${text} a month" if test.name == "budget" else text + unit


def explain(test: Constraint) -> str:
    """One line: the figure, the limit, how it came about, and what would do."""
    low, high = (number(test, end) for end in (test.span.low, test.span.high))
    figure = low if low == high else f"from {low}" if high == "not known" else f"{low} to {high}"
    text = test.span.formula
    if test.name not in ("to be had", "modality", "data stays", "licence", "engine"):
        text = f"{figure}, asked {'at least' if test.at_least else 'at most'} {number(test, test.limit)} ({text})"
    if test.verdict == "out" and test.miss < math.inf and math.isfinite(test.would_pass):
        text += f"; would pass if {number(test, test.would_pass)} were the limit"
    source = f" [{', '.join(test.span.source)}; {test.span.basis}]" if test.span.source else f" [{test.span.basis}]"
    return f"{test.name}: {test.verdict}, {text}{source}"


def as_data(row: Judged) -> dict[str, Any]:
    """A judged option as plain data."""
    return {
        "option": row.option.name,
        "status": row.status,
        "points": None if row.points is None else [row.points.low, row.points.high],
        "cannot rank for": list(row.missing),
        "tests": [{"name": t.name, "verdict": t.verdict, "text": explain(t)} for t in row.tests],
    }


def report(answer: Answer, most: int = 10) -> dict[str, Any]:
    """The answer as plain data: what fits, what cannot be said, the front, the nearest miss, what would change it."""
    nearest = answer.nearest()
    return {
        **{status: [as_data(row) for row in answer.having(status)][:most] for status in ("in", "cannot be said")},
        "counts": {status: len(answer.having(status)) for status in ("in", "cannot be said", "out")},
        "front": [row.option.name for row in answer.front()] if answer.weights else [],
        "nearest miss": nearest and as_data(nearest),
        "changes": changes(answer) if answer.best else {},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    ask = argparse.ArgumentParser("python -m dslib.choose", description="Which models fit, and why the others do not.")
    ask.add_argument("--json", help="a file with the needs, or - for standard input; prints JSON")
    ask.add_argument("--vram", help="memory of the place, such as 24GB")
    for name in TEXTS:
        ask.add_argument(f"--{name}", help="such as '100 ms'" if "to" in name else None)
    for name in NUMBERS:
        ask.add_argument(f"--{name}", type=float)
    for name in ("gpus", "users"):
        ask.add_argument(f"--{name}", type=int)
    ask.add_argument("--modality", action="append", help="text, image or picture; may be repeated")
    ask.add_argument("--stay", action="store_true", help="prompts may not leave the house")
    for name in ("score", "wish"):
        ask.add_argument(f"--{name}", action="append", default=[], metavar="NAME=NUMBER")
    given = {name: value for name, value in vars(ask.parse_args(arguments)).items() if value not in (None, False, [])}
    source = given.pop("json", None)
    try:
        if source:
            needs = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8"))
            wishes = needs.pop("wishes", {})
        else:
            wishes, score = (dict(_pair(text) for text in given.pop(name, [])) for name in ("wish", "score"))
            memory = str(given.pop("vram", ""))
            memory = {"memory": memory if memory.strip("0123456789. ") else f"{memory} GB"} if memory else {}
            needs = given | memory | ({"score": score} if score else {})
        answer = choose(Needs.of(needs), wishes)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        print(f"{ask.prog}: error: {error}", file=sys.stderr)
        return 2
    found = report(answer)
    if source:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)
    return 0 if found["in"] else 1


def _pair(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"wish, score: got {text!r}, expected a name and a number, such as mmlu=70") from None


def _print(found: dict[str, Any]) -> None:
    print(", ".join(f"{count} {status}" for status, count in found["counts"].items()))
    for status in ("in", "cannot be said"):
        for row in found[status]:
            print(f"\n{status}: {row['option']}", *(test["text"] for test in row["tests"]), sep="\n    ")
    if not found["in"] and found["nearest miss"]:
        row = found["nearest miss"]
        print(
            f"\nnearest miss: {row['option']}", *(t["text"] for t in row["tests"] if t["verdict"] != "in"), sep="\n    "
        )
    for name, new in found["changes"].items():
        print(f"\n{name}: then {new}")


if __name__ == "__main__":
    sys.exit(main())
