"""One look for every figure, a text alternative for every figure, and explorers that need no live page.

A figure becomes a picture on a light card inside an HTML ``<img>`` with its ``alt`` text. Jupyter's own picture output
has no place for a text alternative: JupyterLab, Colab and the built book all drop it. The light card keeps full
contrast in dark mode; a transparent figure with mid-grey text would reach it on neither background.

An explorer stores the pictures of its states in its output; ``_static/explore.js`` steps through them in the built
book. Described in CONTRIBUTING, "Tables and figures".

Chapter: ``chapters/start/your_machine.ipynb``.
"""

from __future__ import annotations

import base64
import gzip
import html
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dslib.check import above
from measured.claims_html import prose

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dslib.roofline import Placement, Roof

# Okabe and Ito's colours (2008), told apart under every common colour blindness; the two palest are left out because
# thin lines in them are hard to see on white. Line styles and markers repeat the signal without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#A3497F", "#000000", "#8C6D00")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
# One colour, marker and line for each method, in the whole book: who learns "ours is blue" on one page can use it on
# the next. A page that needs another method adds it here.
METHODS = {
    "ours": ("#0072B2", "o", "-"),
    "ours, prepared": ("#000000", "s", "-"),
    "transformers": ("#D55E00", "^", "--"),
    "llama.cpp": ("#8C6D00", "v", "-."),
    "bound": ("#222222", "", ":"),
    "full attention": ("#0072B2", "o", "-"),
    "window": ("#D55E00", "s", "--"),
    "window with sinks": ("#009E73", "^", "-."),
    "dense": ("#000000", "D", ":"),
    "drawn again": ("#0072B2", "o", "-"),
    "control": ("#8C6D00", "v", "--"),
    "jump back": ("#A3497F", "D", "-."),
    "cache": ("#0072B2", "o", "-"),
    "no cache": ("#D55E00", "v", "--"),
    "transformers, eager": ("#A3497F", "D", "-."),
    "no cure": ("#000000", "D", ":"),
    "Switch loss": ("#D55E00", "s", "--"),
    "sequence-wise loss": ("#009E73", "^", "-."),
    "bias": ("#0072B2", "o", "-"),
    "all weights": ("#000000", "D", ":"),
    "gentle rate": ("#A3497F", "P", "-."),
    "replay": ("#8C6D00", "v", "--"),
    "LoRA": ("#0072B2", "o", "-"),
    "LoRA, gentle": ("#0072B2", "P", "--"),
    "the article's": ("#D55E00", "s", "--"),
    "zero start": ("#A3497F", "D", "--"),
    "frozen base": ("#8C6D00", "v", "-."),
    "zero start, frozen base": ("#009E73", "^", "-."),
    "all at once": ("#0072B2", "o", "-"),
    "router first": ("#D55E00", "s", "--"),
    "one by one": ("#A3497F", "D", "-."),
    "clusters first": ("#009E73", "^", "-"),
    "as sharp": ("#8C6D00", "v", "--"),
    "dense, continued": ("#000000", "D", ":"),
    "copies with noise": ("#0072B2", "o", "-"),
    "slices": ("#009E73", "^", "-."),
    "shared": ("#D55E00", "s", "--"),
    "from scratch": ("#A3497F", "P", "-."),
    "slots": ("#0072B2", "o", "-"),
    "Poisson": ("#0072B2", "o", "-"),
    "bursts": ("#D55E00", "s", "--"),
    "full batch": ("#D55E00", "s", "--"),
    "timed batch": ("#8C6D00", "v", "-."),
    "fine-grained, shared": ("#0072B2", "o", "-"),
    "dense, active size": ("#000000", "D", ":"),
    "dense, total size": ("#555555", "X", "--"),
    "16 experts, top 2": ("#D55E00", "s", "--"),
    "frozen router": ("#A3497F", "P", "-."),
    "auxiliary loss": ("#009E73", "^", "-."),
    "honest": ("#0072B2", "o", "-"),
    "exaggerates": ("#D55E00", "s", "--"),
    "the article's V1": ("#0072B2", "o", "-"),
    "the article's V3": ("#D55E00", "s", "--"),
    "by API": ("#0072B2", "o", "-"),
    "own card": ("#D55E00", "s", "--"),
    "top-k": ("#D55E00", "s", "--"),
    "top-p": ("#0072B2", "o", "-"),
    "min-p": ("#009E73", "^", "-."),
    "normalised": ("#0072B2", "o", "-"),
    "as they are": ("#D55E00", "s", "--"),
    "checker": ("#009E73", "^", "-."),
    "vote": ("#0072B2", "o", "-"),
    "own score": ("#A3497F", "D", "-."),
    "coin": ("#555555", "", ":"),
    "GRPO": ("#0072B2", "o", "-"),
    "knows nothing": ("#000000", "D", ":"),
    "form only": ("#009E73", "^", "-."),
    "coins": ("#8C6D00", "v", "--"),
    "KL": ("#009E73", "^", "-."),
    "stale": ("#D55E00", "s", "--"),
    "stale, KL": ("#A3497F", "D", (0, (3, 1, 1, 1))),
    "teacher's answers": ("#0072B2", "o", "-"),
    "teacher's probabilities": ("#009E73", "^", "-."),
    "rewards": ("#D55E00", "s", "--"),
    "fresh": ("#0072B2", "o", "-"),
}
PAPER, INK, GRID = "#ffffff", "#222222", "#d4d4d4"
WIDTH = 7.2  # inches: the text column of the book
LARGEST = 150_000  # bytes of one picture
LIGHT = 60_000  # bytes of a drawing (SVG); a heavier figure is stored as pixels
SMALLEST = 11 / (10 / 72 * 100)  # how far a figure may shrink: its text of 10 points is then 11 CSS pixels high
# What a built page carries of an explorer. More than 24 states: one control moves at a time.
STATES, STATES_BYTES, SLIDER_STEPS = 24, 100_000, 5


def use_style() -> None:
    """Set the book's look for every figure drawn after this call, whatever a matplotlibrc or style said before."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcdefaults()  # leaves the backend as it is
    mpl.rc("figure", figsize=(WIDTH, 3.9), facecolor=PAPER)
    mpl.rc("figure.constrained_layout", use=True)
    mpl.rc("savefig", facecolor=PAPER)
    mpl.rc("axes", facecolor=PAPER, edgecolor=INK, labelcolor=INK, grid=True, axisbelow=True)
    mpl.rc("axes", titlesize=11, titleweight="bold", titlelocation="left")
    mpl.rc("axes", prop_cycle=cycler(color=COLOURS) + cycler(linestyle=LINES))
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc("grid", color=GRID, linewidth=0.7)
    mpl.rc("lines", linewidth=2.0, markersize=6)
    mpl.rc(("text", "xtick", "ytick"), color=INK)
    mpl.rc("font", size=10, family="DejaVu Sans")  # matplotlib brings it along: a figure looks the same everywhere
    mpl.rc("legend", frameon=False, fontsize=10)


def look(method: str) -> dict[str, str]:
    """Colour, marker and line of a method, for ``ax.plot(…, **look("ours"))``."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, wanted one of {', '.join(METHODS)}; new ones are added to METHODS")
    colour, marker, line = METHODS[method]
    return {"color": colour, "marker": marker, "linestyle": line}


def draw_roofs(ax: Any, roofs: Sequence[Roof], dtype: str, low: float = 0.5, high: float = 4096) -> None:
    """Draw the roofs for one number format: a slope (the memory) up to the ridge, then level (the arithmetic).

    ``low`` and ``high`` are the ends of the axis of operations per byte, which is logarithmic.
    """
    above(0, low=low)
    above(low, high=high)
    for roof in roofs:
        corners = [low, roof.ridge(dtype), high]
        ax.plot(corners, [min(roof.bandwidth * x, roof.rate(dtype)) / 1e12 for x in corners], label=roof.name)
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations per byte", ylabel="TFLOP/s at best")
    plain_ticks(ax.xaxis, ax.yaxis)


def plain_ticks(*axes: Any) -> None:
    """Write the ticks of logarithmic axes as numbers (0.1, 100), not as powers."""
    for axis in axes:
        axis.set_major_formatter("{x:g}")


def draw_places(ax: Any, placements: Sequence[Placement]) -> None:
    """Mark workloads on their roofs, each with its name beside it."""
    for placed, marker in zip(placements, itertools.cycle(MARKERS), strict=False):
        height = placed.workload.flops / placed.seconds / 1e12
        ax.plot(placed.intensity, height, marker, color=INK, markersize=8, zorder=3)
        offset, align = ((9, -13), "left") if placed.intensity < placed.ridge else ((0, -19), "center")
        # The paper behind the words keeps a roof that passes under them from striking them through.
        paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
        place = {"xy": (placed.intensity, height), "xytext": offset, "textcoords": "offset points", "ha": align}
        ax.annotate(placed.workload.name, **place, bbox=paper)


def label_ends(ax: Any) -> None:
    """Write each labelled line's name at its right end, in its colour, instead of a legend. Names never overlap.

    Call it when the axes have their limits and scales: names that would meet are moved apart, as little as possible,
    and a thin line leads back to the end that a moved one belongs to.

    Raises:
        ValueError: no line with a label, or a labelled line of which no point is in view.
    """
    import matplotlib as mpl
    import numpy as np

    ends = []
    for line in ax.get_lines():
        if line.get_label().startswith("_"):
            continue
        points = np.column_stack([np.asarray(values, float) for values in line.get_data(orig=False)])
        (left, right), (low, high) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
        seen = [tuple(p) for p in points if left <= p[0] <= right and low <= p[1] <= high]  # false for nan
        if not seen:
            raise ValueError(f"ax: no point of the line {line.get_label()!r} is in view")
        ends.append((line, max(seen, key=lambda point: point[0])))
    if not ends:
        raise ValueError("ax: no line has a label, wanted ax.plot(…, label='its name')")
    ax.figure.draw_without_rendering()  # the layout decides how high the axes are
    points = 72 / ax.figure.dpi
    heights = [ax.transData.transform(end)[1] * points for _, end in ends]
    box = ax.get_window_extent()
    places = _apart(heights, 1.25 * mpl.rcParams["font.size"], box.y0 * points, box.y1 * points)
    for (line, end), height, place in zip(ends, heights, places, strict=True):
        colour = _ink(line.get_color())
        lead = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(
            line.get_label(),
            end,
            (10, place - height),
            textcoords="offset points",
            color=colour,
            va="center",
            arrowprops=lead if abs(place - height) > 3 else None,
        )


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to ``heights`` (least squares) that keep their order, ``gap`` apart, from low to high."""
    from scipy.optimize import isotonic_regression

    order = sorted(range(len(heights)), key=heights.__getitem__)
    level = isotonic_regression([heights[i] - rank * gap for rank, i in enumerate(order)]).x  # less the gaps below
    top = max(low, high - gap * (len(heights) - 1))
    places = {i: min(max(level[rank], low), top) + rank * gap for rank, i in enumerate(order)}
    return [places[i] for i in range(len(heights))]


def _ink(colour: Any) -> tuple[float, ...]:
    """The colour, darkened until small text in it reaches 4.5:1 on the paper (WCAG 2, 1.4.3)."""
    from matplotlib.colors import to_rgb

    parts = to_rgb(colour)
    while 1.05 / (_luminance(parts) + 0.05) < 4.5:
        parts = tuple(0.95 * part for part in parts)
    return parts


def _luminance(parts: tuple[float, ...]) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@dataclass(frozen=True)
class Picture:
    """A drawn figure with its text alternative; the last line of a cell shows it."""

    data: bytes
    alt: str  # what the figure shows, in words
    width: int  # shown, in CSS pixels; the picture has more, for sharp screens
    caption: str = ""  # below the figure; the book's style sheet puts the number before it
    kind: str = "png"  # or "svg+xml"

    @property
    def source(self) -> str:
        """The picture as an address."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode('ascii')}"

    def to_html(self) -> str:
        if not self.caption:
            return self._image()
        caption = f"<figcaption>{prose(self.caption)}</figcaption>"
        return f'<figure class="measured" style="margin:0">{self.scrolling()}{caption}</figure>'

    def scrolling(self, name: str = "") -> str:
        """The picture in a container that scrolls, by keyboard too, where its text would become too small to read."""
        label = html.escape((self.caption or name).replace("`", "").split(". ")[0].rstrip("."))
        return (
            f'<div class="figure-scroll" role="region" tabindex="0" aria-label="{label}" style="overflow-x:auto">'
            f"{self._image(f'min-width:{math.ceil(self.width * SMALLEST)}px;')}</div>"
        )

    def _image(self, narrowest: str = "") -> str:
        # "dark-light" tells the book's theme that the picture suits both modes, so that it is not dimmed.
        return (
            f'<img class="dark-light" alt="{html.escape(self.alt)}" width="{self.width}" '
            f'style="max-width:100%;{narrowest}height:auto;background:{PAPER};border-radius:4px" src="{self.source}">'
        )

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.to_html(), "text/plain": repr(self)}


def show(fig: Figure, alt: str, caption: str = "") -> Picture:
    """Turn a matplotlib figure into a :class:`Picture` and close the figure, so that Jupyter does not show it twice.

    With a caption it is a drawing (SVG) where that is light, and pixels where it is dense.

    Args:
        fig: the figure; drawn as it is.
        alt: what a reader who does not see it has to know: kind of figure, axes, and what it shows.
        caption: what to look at, one or two sentences; backticks mark code.

    Raises:
        ValueError: not a figure, or no text alternative.
    """
    _check_figure(fig)
    alt, caption = _words(alt), " ".join(caption.split())
    if caption and len(drawing := _svg(fig)) <= LIGHT:
        return Picture(drawing, alt, _close(fig), caption, "svg+xml")
    for dots in (160, 120, 96):
        data = _png(fig, dots)
        if len(data) <= LARGEST:
            break
    return Picture(data, alt, _close(fig), caption)


def _check_figure(fig: Any) -> None:
    if not hasattr(fig, "savefig") or not hasattr(fig, "get_size_inches"):
        raise ValueError(f"fig: got {type(fig).__name__}, wanted a matplotlib Figure")


def _close(fig: Figure) -> int:
    """Close the figure; returns its width in CSS pixels."""
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(fig)
    return round(float(fig.get_size_inches()[0]) * 100)


def _png(fig: Figure, dots: int, colours: int = 0) -> bytes:
    """The figure as pixels; with ``colours``, in no more than that many."""
    file = io.BytesIO()
    # No date and no program version inside: the same figure gives the same bytes.
    fig.savefig(file, format="png", dpi=dots, metadata={"Software": None})
    if not colours:
        return file.getvalue()
    from PIL import Image

    few = io.BytesIO()
    Image.open(file).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(few, format="png", optimize=True)
    return few.getvalue()


def _svg(fig: Figure) -> bytes:
    """The figure as a drawing, letters as outlines: it looks the same where DejaVu Sans is not installed.

    About half of what matplotlib writes goes: comments, names of groups that nothing points to, digits beyond a
    hundredth of a point, and styles, which become classes.
    """
    import matplotlib as mpl
    from matplotlib.image import AxesImage

    maps = [image for image in fig.findobj(AxesImage) if max(image.get_size()) <= 128]
    before = [image.get_interpolation() for image in maps]
    for image in maps:
        if image.get_interpolation() in ("auto", "antialiased", "nearest"):
            image.set_interpolation("none")  # the cells themselves, sharp at every size, not a picture of them
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "measured", "svg.fonttype": "path"}):
        fig.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    for image, interpolation in zip(maps, before, strict=True):
        image.set_interpolation(interpolation)
    text = file.getvalue().rstrip()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", re.sub(r"\s+", " ", text))
    text = re.sub(r"> <", "><", re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.5g}", text))
    classes: dict[str, str] = {}
    text = re.sub(
        r' style="([^"]*)"', lambda found: f' class="{classes.setdefault(found[1], f"c{len(classes)}")}"', text
    )
    rules = "".join(f".{name}{{{style.replace(': ', ':').replace('; ', ';')}}}" for style, name in classes.items())
    return text.replace("</style>", f"{rules}</style>", 1).encode()


class Explorer:
    """A figure of ``draw(**values)`` with a control for each keyword; pages call it :func:`explore`.

    With a kernel and ``ipywidgets`` each change draws anew. The stored output carries the pictures of the states too,
    and the built page steps through them: every combination of values where these are at most 24, else those in
    which one control is moved and the others keep their default. Of a pair of whole numbers five are stored; a ready
    widget keeps its value. Without scripts the default state stands.

    Args:
        draw: draws and returns a matplotlib figure for one set of values.
        alt: the text alternative, or, better, a function of the values that returns it.
        caption: below the figure, as in :func:`show`.
        controls: a list of options (the first is the default), a mapping from label to value, ``True`` or ``False``,
            a pair ``(low, high)`` of whole numbers, or a ready widget with a ``value``.

    Raises:
        ValueError: no control, or one that is none of these; too many states, or pictures of more than 100 kB
            together; ``draw`` or ``alt`` failed, and for which state.
    """

    def __init__(
        self, draw: Callable[..., Figure], alt: str | Callable[..., str], caption: str = "", **controls: Any
    ) -> None:
        if not callable(draw):
            raise ValueError(f"draw: got {draw!r}, wanted a function that returns a matplotlib Figure")
        if not controls:
            raise ValueError("widgets: got none, wanted at least one, e.g. batch=[1, 8, 64]")
        self._draw, self._alt, self._controls = draw, alt, controls
        self._caption = " ".join(caption.split())
        self._steps = {name: _steps(name, control) for name, control in controls.items()}
        self.defaults = {name: next(iter(steps.values())) for name, steps in self._steps.items()}
        self._all, self._states = self._choose_states()
        self._html, self._alts = self._store()

    def draw(self, **values: Any) -> Picture:
        """The picture for these values; those not named keep their default."""
        unknown = sorted(set(values) - set(self.defaults))
        if unknown:
            raise ValueError(f"{unknown[0]}: not a control of this figure, wanted one of {', '.join(self.defaults)}")
        state = self.defaults | values
        return show(self._draw(**state), self._alt(**state) if callable(self._alt) else self._alt, self._caption)

    def live(self) -> Any:
        """The controls above the picture, as an ``ipywidgets`` box. Each change draws anew."""
        import ipywidgets as widgets

        boxes = {name: _widget(widgets, name, control) for name, control in self._controls.items()}
        view = widgets.HTML(self.draw().to_html())

        def redraw(_: Any) -> None:
            view.value = self.draw(**{name: box.value for name, box in boxes.items()}).to_html()

        for box in boxes.values():
            box.observe(redraw, names="value")
        return widgets.VBox([*boxes.values(), view])

    def __repr__(self) -> str:
        count, last = len(self._states), len(self._states) - 1
        shown = sorted({0, count // 2, last})
        kept = (
            f"{count} of {self._all:,} states, one control at a time"
            if count < self._all
            else f"{count} state{'s' * (count > 1)}"
        )
        return "\n".join([f"Explorer of {kept}.", *(f"{self._name(i)}: {self._alts[i]}" for i in shown)])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/html": self._html, "text/plain": repr(self)}
        view = "application/vnd.jupyter.widget-view+json"
        try:
            return bundle | {view: self.live()._repr_mimebundle_()[view]}
        except ImportError:
            return bundle  # the static picture says the same

    def _choose_states(self) -> tuple[int, list[tuple[int, ...]]]:
        """How many combinations there are, and those to store: for each control the number of its step."""
        sizes = [len(steps) for steps in self._steps.values()]
        if math.prod(sizes) <= STATES:
            return math.prod(sizes), list(itertools.product(*map(range, sizes)))
        states = [(0,) * len(sizes)]
        for i, size in enumerate(sizes):
            states += [(0,) * i + (step,) + (0,) * (len(sizes) - i - 1) for step in range(1, size)]
        if len(states) > STATES:
            name = max(self._steps, key=lambda name: len(self._steps[name]))
            raise ValueError(
                f"{name}: got {len(self._steps[name])} values; together the controls have {len(states)} states though "
                f"only one moves at a time, wanted at most {STATES}: leave out some of the values"
            )
        return math.prod(sizes), states

    def _values(self, state: int) -> dict[str, tuple[str, Any]]:
        """Control -> (label, value) in one of the stored states."""
        chosen = zip(self._steps.items(), self._states[state], strict=True)
        return {name: list(steps.items())[i] for (name, steps), i in chosen}

    def _name(self, state: int) -> str:
        return ", ".join(f"{name}={label}" for name, (label, _) in self._values(state).items())

    def _picture(self, state: int, dots: int, colours: int, drawn: dict[int, tuple[Figure, str]]) -> Picture:
        """A state's picture: a drawing for 0 dots, or pixels. The page's function draws once; ``drawn`` keeps it."""
        values = {name: value for name, (_, value) in self._values(state).items()}
        try:
            if state not in drawn:
                alt = _words(self._alt(**values) if callable(self._alt) else self._alt)
                drawn[state] = self._draw(**values), alt
            fig, alt = drawn[state]
            _check_figure(fig)
            if len(self._states) == 1:
                return show(fig, alt)
            data = _png(fig, dots, colours) if dots else _svg(fig)
        except Exception as error:  # whatever the page's function does wrong
            raise ValueError(f"no picture for {self._name(state)}: {type(error).__name__}: {error}") from error
        return Picture(data, alt, _close(fig), self._caption, "png" if dots else "svg+xml")

    def _store(self) -> tuple[str, list[str]]:
        """The output for a page without a kernel, and the text alternative of each state."""
        drawn: dict[int, tuple[Figure, str]] = {}
        for dots, colours in ((0, 0), (100, 64), (80, 16)):  # drawings, then what is dense in fewer and fewer colours
            pictures = [self._picture(0, dots, colours, drawn)]
            if not dots and len(pictures[0].data) > LIGHT:
                continue
            pictures += [self._picture(state, dots, colours, drawn) for state in range(1, len(self._states))]
            markup = self._markup(pictures)
            if len(markup.encode()) <= STATES_BYTES or len(pictures) == 1:
                return markup, [picture.alt for picture in pictures]
        raise ValueError(
            f"draw: the pictures of {len(pictures)} states take {len(markup.encode()) / 1e3:,.0f} kB, wanted at most "
            f"{STATES_BYTES / 1e3:.0f} kB: give fewer values, a smaller figure, or draw fewer marks"
        )

    def _markup(self, pictures: list[Picture]) -> str:
        first = pictures[0]
        numbers = {first.source: 0}  # equal pictures are stored once; the first is the one that stands in the page
        states = [
            [list(steps), picture.alt, numbers.setdefault(picture.source, len(numbers))]
            for steps, picture in zip(self._states, pictures, strict=True)
        ]
        distinct = list({picture.source: picture for picture in pictures}.values())[1:]
        kinds = {bool: "checkbox", tuple: "range"}
        controls = [
            {"name": name, "kind": kinds.get(type(self._controls[name]), "select"), "steps": list(steps)}
            for name, steps in self._steps.items()
        ]
        stored = {"controls": controls, "states": states, "pictures": _pack(distinct)}
        text = json.dumps(stored, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
        state = ", ".join(f"{name.replace('_', ' ')} {label}" for name, (label, _) in self._values(0).items())
        names = ", ".join(name.replace("_", " ") for name in self._steps)
        caption = f"<figcaption>{prose(self._caption)}</figcaption>" if self._caption else ""
        return (
            f'<figure class="measured explorer" style="margin:0"><p class="explorer-state">{html.escape(state)}</p>'
            f'{first.scrolling(f"Figure by {names}")}{caption}<script type="application/json">{text}</script></figure>'
        )


explore = Explorer


def _pack(pictures: Sequence[Picture]) -> str:
    """The pictures of an explorer, compressed: drawings of one figure share most of their elements.

    Inside are two lists: pieces of text, and for each picture the numbers of its pieces.
    """
    numbers: dict[str, int] = {}
    lists = []
    for picture in pictures:
        text = picture.data.decode() if picture.kind == "svg+xml" else picture.source
        lists.append([numbers.setdefault(piece, len(numbers)) for piece in re.split(r"(?<=>)(?=<)", text)])
    data = json.dumps([list(numbers), lists], ensure_ascii=False, separators=(",", ":")).encode()
    return "data:application/gzip;base64," + base64.b64encode(gzip.compress(data, 9, mtime=0)).decode("ascii")


def _steps(name: str, control: Any) -> dict[str, Any]:
    """Label -> value of the states that a page without a kernel steps through; the default comes first."""
    if isinstance(control, bool):
        return {("no", "yes")[value]: value for value in (control, not control)}
    if isinstance(control, dict) and control:
        return {str(label): value for label, value in control.items()}
    if isinstance(control, list) and control:
        return {str(value): value for value in control}
    if isinstance(control, tuple) and [type(end) for end in control] == [int, int] and control[0] <= control[1]:
        low, high = control
        values = sorted({round(low + (high - low) * i / (SLIDER_STEPS - 1)) for i in range(SLIDER_STEPS)})
        return {str(value): value for value in values}
    if hasattr(control, "value") and hasattr(control, "observe"):
        return {str(control.value): control.value}
    raise ValueError(
        f"{name}: got {control!r}, wanted a list, a mapping, True/False, a pair of whole numbers or a widget"
    )


def _widget(widgets: Any, name: str, control: Any) -> Any:
    look = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(control, bool):
        return widgets.Checkbox(value=control, indent=False, **look)
    if isinstance(control, dict):
        return widgets.Dropdown(options=list(control.items()), **look)
    if isinstance(control, list):
        return widgets.Dropdown(options=control, **look)
    if isinstance(control, tuple):
        low, high = control
        return widgets.IntSlider(value=low, min=low, max=high, continuous_update=False, **look)
    return control


def _words(alt: Any) -> str:
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"alt: got {alt!r}, wanted a sentence that says what the figure shows")
    return " ".join(alt.split())
