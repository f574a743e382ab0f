"""Draw ``chapters/architecture/whole_curve.svg``, the front page's picture, and write the sentences beside it.

    python -m tools.draw_curve

The curve is the history of the shipped model (``data/tiny-deepseek/history.json``), the lines are the n-grams' on the
same windows, as recorded. Real text, one light card, so that it reads in dark mode too.
"""

import json
import textwrap
from pathlib import Path

from measured import recordings
from measured.experiments import ngram, whole

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "chapters" / "architecture" / "whole_curve.svg"
LEFT, RIGHT, TOP, BOTTOM = 70, 560, 70, 330  # of the axes, in pixels
NAMES = {2: "pairs", 3: "three tokens", 6: "six tokens"}


def figures() -> dict:
    """Minutes and bits a byte along the run, the n-grams' lines, and when each was passed."""
    history = json.loads((ROOT / "data" / "tiny-deepseek" / "history.json").read_text(encoding="utf-8"))
    curve = [(row["seconds"] / 60, row["validation"]) for row in history if "validation" in row]
    counted = recordings.recorded(whole.window_lines).result
    lines = {order: counted[str(order)] for order in NAMES}
    passed = {order: next(minute for minute, bits in curve if bits < line) for order, line in lines.items()}
    ours = recordings.recorded(whole.model_bits, split="test").result
    test = whole.beside_counting(ours, recordings.recorded(ngram.ngram_baselines).result["test"])[0]
    return {"curve": curve, "lines": lines, "passed": passed, "test": test, "minutes": history[-1]["seconds"] / 60}


def draw() -> str:
    """The whole drawing."""
    found = figures()
    curve, end = found["curve"], found["curve"][-1][0]
    low, high = 1.0, 2.2

    def place(minute: float, bits: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * minute / end, TOP + (BOTTOM - TOP) * (high - bits) / (high - low)

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 400" width="720" height="400" role="img" '
        'font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="15" fill="#222222">',
        "<title>A DeepSeek in miniature learns on two cores, and passes what counting reaches</title>",
        '<rect width="720" height="400" rx="6" fill="#ffffff"/>',
        '<text x="24" y="34" font-size="17" font-weight="bold">A DeepSeek in miniature learns on two cores</text>',
        '<text x="24" y="56" font-size="13">bits a byte on text held out: lower is better</text>',
        f'<path d="M{LEFT} {TOP} V{BOTTOM} H{RIGHT}" fill="none" stroke="#222222"/>',
    ]
    for tick in range(10, 22, 2):
        y = place(0, tick / 10)[1]
        lines.append(f'<text x="{LEFT - 10}" y="{y + 5:.1f}" text-anchor="end" font-size="13">{tick / 10:.1f}</text>')
    step = next(size for size in (5, 10, 20, 30, 60) if end / size <= 6)
    for minute in range(0, int(end) + 1, step):
        x = place(minute, low)[0]
        lines.append(f'<text x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="middle" font-size="13">{minute}</text>')
    lines.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 44}" text-anchor="middle" font-size="13">minutes</text>')
    for order, line in found["lines"].items():
        y = place(0, line)[1]
        lines += [
            f'<path d="M{LEFT} {y:.1f} H{RIGHT}" stroke="#555555" stroke-dasharray="3 4"/>',
            f'<text x="{RIGHT + 8}" y="{y + 5:.1f}" font-size="13">{NAMES[order]}, counted</text>',
        ]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*one) for one in curve))
    x, y = place(*curve[-1])
    lines += [
        f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="3"/>',
        f'<text x="{x + 8:.1f}" y="{y + 5:.1f}" font-weight="bold" fill="#0072B2">tiny-deepseek</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def said() -> str:
    """What the front page says of it, with the picture."""
    found = figures()
    curve, lines, passed = found["curve"], found["lines"], found["passed"]
    at = {order: f"{line:.2f}) after {passed[order]:.0f}" for order, line in lines.items()}
    alt = (
        "Line chart. Bits a byte on held-out text against minutes of training on two cores. The model falls from "
        f"{curve[0][1]:.2f} to {curve[-1][1]:.2f} in {found['minutes']:.0f} minutes. It passes counting of token pairs "
        f"({at[2]} minutes, of three tokens ({at[3]}, and of six ({at[6]}."
    )
    text = (
        "The blue line is a language model of DeepSeek-V3's architecture, in miniature. One command trained it in "
        f"{found['minutes']:.0f} minutes, from text that comes with the book. After {passed[6]:.0f} minutes it had "
        "passed a modified Kneser-Ney 6-gram. On documents that nobody had used it needs "
        f"{found['test']['ours']:.2f} bits a byte; that 6-gram, trained on the same text, "
        f"{found['test']['counted']:.2f}. [Put it together](chapters/architecture/whole.ipynb) shows all of it on one "
        "screen."
    )
    return f"![{alt}](chapters/architecture/whole_curve.svg)\n\n{textwrap.fill(text, 120, break_on_hyphens=False)}"


if __name__ == "__main__":
    PATH.write_text(draw(), encoding="utf-8")
