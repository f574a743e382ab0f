"""Draw ``chapters/performance/number_formats.svg``: which sizes of numbers fit into three formats, and a loss scale.

    python -m tools.draw_number_formats

The ends of the bars are read from ``torch.finfo``. Real text, one light card, so that it reads in dark mode too.
"""

import math
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parents[1] / "chapters" / "performance" / "number_formats.svg"
FORMATS = (("float32", "#0072B2"), ("bfloat16", "#009E73"), ("float16", "#D55E00"))
LEFT, RIGHT, LOW, HIGH = 110, 740, -152, 130  # pixels; powers of two
GRADIENTS = (-28, -12)  # where 95 of 100 gradients of a small training lie: the chapter measures them
SCALE = 16


def x(power: float) -> float:
    """Pixel of a power of two."""
    return round(LEFT + (power - LOW) / (HIGH - LOW) * (RIGHT - LEFT), 1)


def power(exponent: float) -> str:
    """2⁻²⁴ and the like."""
    return "2" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def ends(name: str) -> tuple[float, float, float]:
    """Powers of two: the smallest number, the smallest with all its digits, the largest."""
    info = torch.finfo(getattr(torch, name))
    return math.log2(info.smallest_normal * info.eps), math.log2(info.smallest_normal), math.log2(info.max)


def bars() -> list[str]:
    """A bar for each format, paler where digits are lost."""
    lines = []
    for row, (name, colour) in enumerate(FORMATS):
        tiny, normal, largest = ends(name)
        short = largest < 100  # room beside it instead of below
        top, digits = 62 + 46 * row, round(-math.log2(torch.finfo(getattr(torch, name)).eps)) + 1
        lines += [
            f'<rect x="{x(tiny)}" y="{top}" width="{x(normal) - x(tiny):.1f}" height="22" fill="{colour}" '
            'fill-opacity="0.3"/>',
            f'<rect x="{x(normal)}" y="{top}" width="{x(largest) - x(normal):.1f}" height="22" fill="{colour}"/>',
            f'<text x="{LEFT - 12}" y="{top + 16}" text-anchor="end">{name}</text>',
            f'<text x="{x(largest) + 8 if short else x(tiny)}" y="{top + (16 if short else 36)}" font-size="12">'
            f"down to {power(tiny)}, {digits} binary digits</text>",
        ]
    return lines


def hump(centre_from: int, centre_to: int, colour: str, dash: str) -> str:
    """A bell over a range of powers, standing for a histogram of gradients."""
    middle, width, base, height = (centre_from + centre_to) / 2, (centre_to - centre_from) / 4, 272, 52
    dots = [(x(middle + step * width / 4), base - height * math.exp(-0.5 * (step / 4) ** 2)) for step in range(-12, 13)]
    path = "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in dots)
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.5"{dash}/>'


def draw() -> str:
    """The whole picture."""
    tiny, _, largest = ends("float16")
    low, high = GRADIENTS
    middle = (low + high) / 2
    ticks = [
        f'<path d="M{x(p)} 272V278"/><text x="{x(p)}" y="292" stroke="none" fill="#222222" text-anchor="middle" '
        f'font-size="12">{power(p)}</text>'
        for p in range(-144, 129, 48)
    ]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 330" width="760" height="330" role="img" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="14">',
        "<title>Ranges of float32, bfloat16 and float16, and gradients before and after scaling the loss</title>",
        '<rect width="760" height="330" rx="6" fill="#ffffff"/>',
        '<defs><marker id="shift" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#222222"/></marker></defs>',
        '<g fill="#222222">',
        '<text x="20" y="28" font-weight="bold">Sizes of numbers that each format can hold</text>',
        '<text x="20" y="46" font-size="12">pale: with fewer and fewer digits; left of it, zero</text>',
        *bars(),
        "</g>",
        '<g stroke="#D55E00" stroke-dasharray="4 4" stroke-width="1.5" fill="none">',
        f'<path d="M{x(tiny)} 180V272"/><path d="M{x(largest)} 180V272"/>',
        "</g>",
        '<g stroke="#222222" fill="none">',
        f'<path d="M{LEFT} 272H{RIGHT}"/>',
        *ticks,
        "</g>",
        hump(low, high, "#222222", ' stroke-dasharray="6 4"'),
        hump(low + SCALE, high + SCALE, "#222222", ""),
        f'<path d="M{x(middle)} 212H{x(middle + SCALE) - 3}" stroke="#222222" stroke-width="1.5" '
        'marker-end="url(#shift)"/>',
        '<g fill="#222222" font-size="12">',
        f'<text x="{x(tiny) - 8}" y="244" text-anchor="end">gradients (dashed)</text>',
        f'<text x="{x(largest) + 8}" y="244">times {power(SCALE)} (solid)</text>',
        f'<text x="{x(largest) + 8}" y="204" fill="#B84B00">overflow: infinite</text>',
        f'<text x="{x(tiny) - 8}" y="204" text-anchor="end" fill="#B84B00">too small: zero</text>',
        '<text x="425" y="316" text-anchor="middle">size of a number, as a power of two</text>',
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PATH.write_text(draw(), encoding="utf-8")
