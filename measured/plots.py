"""One look for every figure, a text alternative for every figure, and explorers that need no live page.

A figure becomes one PNG on a light card inside an HTML ``<img>`` with its ``alt`` text. Jupyter's own picture output
has no place for a text alternative: JupyterLab, Colab and the built book all drop it. The light card keeps full
contrast in dark mode; a transparent figure with mid-grey text would reach it on neither background.

Chapter: ``chapters/start/your_machine.ipynb``.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
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
    "no cure": ("#000000", "D", ":"),
    "Switch loss": ("#D55E00", "s", "--"),
    "sequence-wise loss": ("#009E73", "^", "-."),
    "bias": ("#0072B2", "o", "-"),
}
PAPER, INK, GRID = "#ffffff", "#222222", "#d4d4d4"
WIDTH = 7.2  # inches: the text column of the book
LARGEST = 150_000  # bytes of one picture


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
    mpl.rc("legend", frameon=False, fontsize=9)


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


@dataclass(frozen=True)
class Picture:
    """A drawn figure with its text alternative; the last line of a cell shows it."""

    png: bytes
    alt: str  # what the figure shows, in words
    width: int  # shown, in CSS pixels; the picture has more, for sharp screens
    caption: str = ""  # below the figure; the book's style sheet puts the number before it

    def to_html(self) -> str:
        source = base64.b64encode(self.png).decode("ascii")
        # "dark-light" tells the book's theme that the picture suits both modes, so that it is not dimmed.
        image = (
            f'<img class="dark-light" alt="{html.escape(self.alt)}" width="{self.width}" '
            f'style="max-width:100%;height:auto;background:{PAPER};border-radius:4px" '
            f'src="data:image/png;base64,{source}">'
        )
        if not self.caption:
            return image
        caption = f"<figcaption>{prose(self.caption)}</figcaption>"
        return f'<figure class="measured" style="margin:0">{image}{caption}</figure>'

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.to_html(), "text/plain": repr(self)}


def show(fig: Figure, alt: str, caption: str = "") -> Picture:
    """Turn a matplotlib figure into a :class:`Picture` and close the figure, so that Jupyter does not show it twice.

    Args:
        fig: the figure; drawn as it is.
        alt: what a reader who does not see it has to know: kind of figure, axes, and what it shows.
        caption: what to look at, one or two sentences; backticks mark code.

    Raises:
        ValueError: not a figure, or no text alternative.
    """
    if not hasattr(fig, "savefig") or not hasattr(fig, "get_size_inches"):
        raise ValueError(f"fig: got {type(fig).__name__}, wanted a matplotlib Figure")
    alt = _words(alt)
    inches = float(fig.get_size_inches()[0])
    for dots in (160, 120, 96):
        file = io.BytesIO()
        # No date and no program version inside: the same figure gives the same bytes.
        fig.savefig(file, format="png", dpi=dots, metadata={"Software": None})
        if file.tell() <= LARGEST:
            break
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(fig)
    return Picture(file.getvalue(), alt, round(inches * 100), " ".join(caption.split()))


class Explorer:
    """A figure of ``draw(**values)`` with a control for each keyword; pages call it :func:`explore`.

    Without a kernel, or without ``ipywidgets``, it is the figure of the default state. Its output carries both: the
    live view, which Jupyter prefers, and the static picture, which the built page keeps.

    Args:
        draw: draws and returns a matplotlib figure for one set of values.
        alt: the text alternative, or a function of the values that returns it.
        controls: a list of options (the first is the default), a mapping from label to value, ``True`` or ``False``,
            a pair ``(low, high)`` of whole numbers, or a ready widget with a ``value``.

    Raises:
        ValueError: no control, or one that is none of these.
    """

    def __init__(self, draw: Callable[..., Figure], alt: str | Callable[..., str], **controls: Any) -> None:
        if not callable(draw):
            raise ValueError(f"draw: got {draw!r}, wanted a function that returns a matplotlib Figure")
        if not controls:
            raise ValueError("widgets: got none, wanted at least one, e.g. batch=[1, 8, 64]")
        self._draw, self._alt, self._controls = draw, alt, controls
        self.defaults = {name: _default(name, control) for name, control in controls.items()}

    def draw(self, **values: Any) -> Picture:
        """The picture for these values; those not named keep their default."""
        unknown = sorted(set(values) - set(self.defaults))
        if unknown:
            raise ValueError(f"{unknown[0]}: not a control of this figure, wanted one of {', '.join(self.defaults)}")
        state = self.defaults | values
        return show(self._draw(**state), self._alt(**state) if callable(self._alt) else self._alt)

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
        state = ", ".join(f"{name}={value}" for name, value in self.defaults.items())
        return f"Explorer at {state}. {self.draw()!r}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/html": self.draw().to_html(), "text/plain": repr(self)}
        view = "application/vnd.jupyter.widget-view+json"
        try:
            return bundle | {view: self.live()._repr_mimebundle_()[view]}
        except ImportError:
            return bundle  # the static picture says the same


explore = Explorer


def _default(name: str, control: Any) -> Any:
    if isinstance(control, bool):
        return control
    if isinstance(control, dict) and control:
        return next(iter(control.values()))
    if isinstance(control, list) and control:
        return control[0]
    if isinstance(control, tuple) and [type(end) for end in control] == [int, int] and control[0] <= control[1]:
        return control[0]
    if hasattr(control, "value") and hasattr(control, "observe"):
        return control.value
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
