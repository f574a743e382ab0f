"""Draw ``chapters/start/eighty_two_ms.svg``, the picture of the front page: a claim beside what memory allows.

    python -m tools.draw_front

The bars are computed by ``dslib.roofline`` from the published bandwidths of ``data/hardware.yml``, and the claim is
read from the ledger. Real text, one light card, so that it reads in dark mode too.
"""

from pathlib import Path

from dslib.roofline import decode_floor, published_roof
from measured.claims import load_ledger

PATH = Path(__file__).resolve().parents[1] / "chapters" / "start" / "eighty_two_ms.svg"
TOKENS, WEIGHTS = 128, 1.3e9 * 2  # bytes of 1.3 billion parameters at two bytes
CARDS = {"A100_40GB": "A100, 40 GB", "A100_80GB": "A100, 80 GB", "H100_SXM": "H100", "H200": "H200"}
LEFT, SCALE, TOP, STEP = 190, 2.1, 84, 44  # pixels; pixels a millisecond


def rows() -> list[tuple[str, float, str]]:
    """(name, milliseconds, colour): the claim, then the floor of each card."""
    said = float(load_ledger()["s2.1-02"].value.removesuffix(" ms"))
    floors = {name: TOKENS * decode_floor(WEIGHTS, published_roof(card)) * 1e3 for card, name in CARDS.items()}
    return [("the article, A100", said, "#D55E00"), *((name, ms, "#0072B2") for name, ms in floors.items())]


def draw() -> str:
    """The whole drawing."""
    bars, claim = rows(), rows()[0][1]
    height = TOP + STEP * len(bars) + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" width="720" height="{height}" role="img" '
        'font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="15" fill="#222222">',
        "<title>128 tokens in 82 ms, beside the time in which each card can read the weights that often</title>",
        f'<rect width="720" height="{height}" rx="6" fill="#ffffff"/>',
        '<text x="24" y="34" font-size="17" font-weight="bold">128 tokens in turn, 1.3 billion parameters</text>',
        '<text x="24" y="58">Orange: what is claimed. Blue: the time just to read the weights 128 times.</text>',
    ]
    for row, (name, ms, colour) in enumerate(bars):
        y, end = TOP + STEP * row, LEFT + ms * SCALE + 8
        end = LEFT + claim * SCALE + 8 if 0 < claim - ms < 30 else end  # not under the line
        lines += [
            f'<text x="{LEFT - 12}" y="{y + 21}" text-anchor="end">{name}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{ms * SCALE:.1f}" height="30" fill="{colour}"/>',
            f'<text x="{end:.1f}" y="{y + 21}" font-weight="bold">{ms:.0f} ms</text>',
        ]
    x, bottom = LEFT + claim * SCALE, TOP + STEP * len(bars)
    lines += [
        f'<path d="M{x:.1f} {TOP - 4} V{bottom}" stroke="#D55E00" stroke-width="2" stroke-dasharray="6 5"/>',
        f'<text x="24" y="{bottom + 26}" font-size="13">One text at a time, two bytes a parameter, published '
        "bandwidths.</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(draw(), encoding="utf-8")
