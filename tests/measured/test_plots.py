import base64
import configparser
import gzip
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import ipywidgets
import matplotlib
import numpy
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.text import Text

from dslib.roofline import Roof, Workload, place
from measured import plots

ROOF = Roof("r", bandwidth=1e12, flops={"float16": 100e12}, memory_bytes=1e9, source="test")


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context():
        matplotlib.use("agg")
        plots.use_style()
        yield


def draw(power=1, **_):
    fig, ax = pyplot.subplots()
    ax.plot([0, 1, 2], [x**power for x in range(3)])
    ax.set_xlabel("x (m)")
    return fig


def test_the_alternative_text_reaches_the_html():
    picture = plots.show(draw(), alt='A line from 0 to 2, "straight" & rising')
    bundle = picture._repr_mimebundle_()
    assert 'alt="A line from 0 to 2, &quot;straight&quot; &amp; rising"' in bundle["text/html"]
    assert bundle["text/plain"].startswith("Figure: A line")
    png = base64.b64decode(re.search(r"base64,([^\"]+)", bundle["text/html"]).group(1))
    assert png.startswith(b"\x89PNG") and len(png) <= plots.LARGEST


def test_figures_are_closed_and_drawn_alike_whatever_the_reader_has_set():
    first = plots.show(draw(), alt="a")
    assert not pyplot.get_fignums()
    theirs = {"text.usetex": True, "lines.linewidth": 9, "savefig.bbox": "tight", "axes.facecolor": "red"}
    matplotlib.rcParams.update(theirs | {"font.size": 20, "xtick.direction": "in"})
    plots.use_style()
    assert plots.show(draw(), alt="a").data == first.data
    assert matplotlib.get_backend() == "agg"


def test_a_busy_picture_is_made_smaller():
    fig, ax = pyplot.subplots()
    ax.imshow(numpy.random.default_rng(0).random((600, 600)), interpolation="nearest")
    busy = plots.show(fig, alt="noise")
    plain = plots.show(draw(), alt="line")
    # Width in the PNG header: fewer dots for the busy one.
    assert busy.data[16:20] < plain.data[16:20]


def test_a_roof_bends_at_its_ridge_and_work_lies_on_it():
    fig, ax = pyplot.subplots()
    plots.draw_roofs(ax, [ROOF], "float16", low=1, high=1000)
    plots.draw_places(ax, [place(Workload("w", 1e9, work, "float16"), ROOF) for work in (10e9, 500e9)])
    line, below, above = ax.get_lines()
    assert list(line.get_xdata()) == [1, 100, 1000]
    assert list(line.get_ydata()) == [1, 100, 100]
    assert (below.get_xdata()[0], below.get_ydata()[0]) == (10, 10)
    assert (above.get_xdata()[0], above.get_ydata()[0]) == (500, 100)
    pyplot.close(fig)


def labelled(ylim=None, **lines):
    ax = pyplot.figure(figsize=(3, 2)).add_subplot()
    for name, heights in lines.items():
        ax.plot(heights, label=name)
    ax.set(ylim=ylim)
    return ax


def test_names_at_the_ends_of_lines_do_not_overlap():
    ax = labelled(a=[0, 1.0], b=[0, 1.01], c=[5, 0.99, float("nan")], d=[3, 4])
    ax.plot([0, 1], [1, 1])  # without a name
    plots.label_ends(ax)
    ax.figure.draw_without_rendering()
    boxes = [(Text.get_window_extent(text), text.get_text()) for text in ax.texts]  # an Annotation's has its line too
    places = sorted((box.y0, box.y1, name) for box, name in boxes)
    assert [name for *_, name in places] == ["c", "a", "b", "d"], "in the order of the lines' ends"
    assert all(below[1] <= above[0] for below, above in itertools.pairwise(places))
    assert ax.get_window_extent().y0 - 9 < places[0][0] and places[-1][1] < ax.get_window_extent().y1 + 9
    for text, colour in zip(ax.texts, plots.COLOURS, strict=False):
        assert _contrast(to_hex(text.get_color()), plots.PAPER) >= 4.49, colour
    pyplot.close("all")


def test_a_captioned_figure_is_a_drawing_where_light_and_pixels_where_dense():
    light, dense = (plots.show(small(dots), "dots", "Dots. Read `y`.") for dots in (3, 5_000))
    assert (light.kind, dense.kind) == ("svg+xml", "png")
    assert light == plots.show(small(3), "dots", "Dots. Read `y`.")
    root = ElementTree.fromstring(light.data)
    assert not root.findall(".//{*}text") and b"<metadata" not in light.data, "letters are outlines, and no date"
    markup = light.to_html()
    assert 'role="region" tabindex="0" aria-label="Dots"' in markup and "Read <code>y</code>.</figcaption>" in markup
    assert 'width="200"' in markup and "min-width:159px" in markup, "10 points are 11 pixels at least"


def test_a_figure_without_caption_is_a_picture_and_nothing_else():
    picture = plots.show(draw(), "A line")
    assert picture.to_html() == (
        '<img class="dark-light" alt="A line" width="720" style="max-width:100%;height:auto;background:#ffffff;'
        f'border-radius:4px" src="{picture.source}">'
    )
    assert picture.kind == "png"


def _contrast(a, b):
    """Contrast ratio as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_is_legible_on_the_paper():
    assert _contrast(plots.INK, plots.PAPER) >= 7
    for colour in plots.COLOURS:
        assert _contrast(colour, plots.PAPER) >= 3, colour
    assert len(plots.COLOURS) == len(plots.LINES) == len(plots.MARKERS)


def test_explorer_shows_its_default_without_a_kernel_and_without_ipywidgets(monkeypatch):
    explorer = plots.explore(draw, lambda power, grid: f"Power {power}", power=[2, 3], grid=True)
    assert explorer.defaults == {"power": 2, "grid": True}
    bundle = explorer._repr_mimebundle_()
    assert 'alt="Power 2"' in bundle["text/html"]
    assert bundle["text/plain"].splitlines() == [
        "Explorer of 4 states.",
        "power=2, grid=yes: Power 2",
        "power=3, grid=yes: Power 3",
        "power=3, grid=no: Power 3",
    ]
    assert repr(explorer.draw(power=3)) == "Figure: Power 3"
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(explorer._repr_mimebundle_()) == {"text/html", "text/plain"}


def stored(explorer):
    """What the script in an explorer's output says, its pictures unpacked."""
    said = json.loads(re.search(r"<script[^>]*>(.*)</script>", explorer._repr_mimebundle_()["text/html"])[1])
    pieces, pictures = json.loads(gzip.decompress(base64.b64decode(said["pictures"].split(",")[1])))
    return said | {"pictures": ["".join(pieces[number] for number in picture) for picture in pictures]}


def test_an_explorer_stores_every_state_and_equal_pictures_once():
    explorer = plots.explore(draw, lambda power, grid, **_: f"{power} {grid}", power={"<one>": 1, "two": 2}, grid=True)
    said = stored(explorer)
    assert said["controls"] == [
        {"name": "power", "kind": "select", "steps": ["<one>", "two"]},
        {"name": "grid", "kind": "checkbox", "steps": ["yes", "no"]},
    ]
    assert said["states"] == [
        [[0, 0], "1 True", 0],
        [[0, 1], "1 False", 0],
        [[1, 0], "2 True", 1],
        [[1, 1], "2 False", 1],
    ]
    assert (
        len(said["pictures"]) == 1 and said["pictures"][0].startswith("<svg") and said["pictures"][0].endswith("</svg>")
    )
    assert not pyplot.get_fignums()
    again = plots.explore(draw, lambda power, grid, **_: f"{power} {grid}", power={"<one>": 1, "two": 2}, grid=True)
    assert again._repr_mimebundle_()["text/html"] == explorer._repr_mimebundle_()["text/html"]


def test_nbval_compares_the_words_of_an_explorer_and_not_its_pictures():
    rules = configparser.RawConfigParser()
    rules.read(Path(__file__).parents[1] / "notebooks" / "sanitize.cfg", encoding="utf-8")
    rule = rules["embedded pictures"]

    def compared(power, words="Power {power}"):
        explorer = plots.explore(lambda **_: draw(power), words.format, "Powers.", power=[1, 2], log_scale=False)
        return re.sub(rule["regex"], rule["replace"], explorer._repr_mimebundle_()["text/html"])

    assert compared(1) == compared(3) != compared(1, "Exponent {power}")
    assert "base64" not in compared(1) and 'aria-label="Powers"' in compared(1)


def test_of_many_states_those_are_stored_in_which_one_control_is_moved():
    explorer = plots.explore(small, "x", a=[1, 2, 3], b=(0, 100), c=list("abcdef"))
    assert repr(explorer).startswith("Explorer of 12 of 90 states, one control at a time.\na=1, b=0, c=a: x\n")
    said = stored(explorer)
    assert said["controls"][1] == {"name": "b", "kind": "range", "steps": ["0", "25", "50", "75", "100"]}
    assert sorted(sum(step > 0 for step in steps) for steps, _, _ in said["states"]) == [0] + [1] * 11


def test_a_dense_explorer_is_stored_in_pixels_of_few_colours():
    said = stored(plots.explore(lambda seed: small(dots=6_000, seed=seed), "dots", seed=[1, 2, 3]))
    assert [picture[:22] for picture in said["pictures"]] == ["data:image/png;base64,"] * 2


def test_a_ready_widget_alone_is_one_picture():
    explorer = plots.explore(small, "dots", n=ipywidgets.Text(value="animals"))
    assert repr(explorer) == "Explorer of 1 state.\nn=animals: dots" and stored(explorer)["pictures"] == []


def small(dots=1, seed=0, **_):
    fig, ax = pyplot.subplots(figsize=(2, 1))
    ax.plot(numpy.random.default_rng(seed).random(dots), ".")
    return fig


def noise(seed):
    """A figure that no encoding makes small."""
    fig = pyplot.figure(figsize=(6, 6))
    fig.figimage(numpy.random.default_rng(seed).random((600, 600)))
    return fig


def broken(power):
    return draw(power) if power < 3 else 1 / 0


def test_explorer_redraws_when_a_control_moves():
    ready = ipywidgets.IntText(value=5, description="n")
    explorer = plots.explore(
        lambda **values: draw(values["power"]),
        lambda **values: f"{values}",
        power=(1, 4),
        kind={"one": 1, "two": 2},
        flag=False,
        n=ready,
    )
    box = explorer.live()
    *controls, view = box.children
    before = view.value
    controls[0].value = 3
    assert view.value != before and "power" in view.value
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.show(draw(), ""), "alt: got ''"),
        (lambda: plots.show(draw(), "  \n"), "alt: got '  "),
        (lambda: plots.show(draw(), None), "alt: got None"),
        (lambda: plots.show([1], "x"), "fig: got list"),
        (lambda: plots.explore(draw, "x"), "widgets: got none"),
        (lambda: plots.explore(draw, "x", x="abc"), "x: got 'abc'"),
        (lambda: plots.explore(draw, "x", x=[]), r"x: got \[\]"),
        (lambda: plots.explore(draw, "x", x=(1, 2, 3)), r"x: got \(1, 2, 3\)"),
        (lambda: plots.explore(draw, "x", x=(3, 1)), r"x: got \(3, 1\)"),
        (lambda: plots.explore(draw, "x", x=(0.5, float("nan"))), r"x: got \(0.5, nan\)"),
        (lambda: plots.draw_roofs(None, [ROOF], "float16", low=0), "low: got 0, expected a number above 0"),
        (lambda: plots.draw_roofs(None, [ROOF], "float16", low=float("nan")), "low: got nan"),
        (lambda: plots.draw_roofs(None, [ROOF], "float16", low=8, high=8), "high: got 8, expected a number above 8"),
        (lambda: plots.draw_roofs(None, [ROOF], "float16", high=float("inf")), "high: got inf"),
        (lambda: plots.explore(draw, "x", power=[1]).draw(speed=2), "speed: not a control"),
        (lambda: plots.explore(3, "x", power=[1]), "draw: got 3"),
        (
            lambda: plots.explore(draw, "x", power=[*range(20)], grid=(0, 9), n=[1, 2]),
            "power: got 20 values; .*at most",
        ),
        (lambda: plots.explore(noise, "x", seed=[1, 2, 3]), "draw: the pictures of 3 states take .* at most 100 kB"),
        (lambda: plots.explore(broken, "x", power=[1, 2, 3]), "no picture for power=3: ZeroDivisionError"),
        (lambda: plots.explore(lambda n: [n], "x", n=[5]), "no picture for n=5: ValueError: fig: got list"),
        (lambda: plots.explore(draw, lambda power: " ", power=[1]), "no picture for power=1: ValueError: alt: got ' '"),
        (lambda: plots.explore(draw, str.format, power=[1]), "no picture for power=1: TypeError"),
        (lambda: plots.label_ends(pyplot.figure().add_subplot()), "ax: no line has a label"),
        (lambda: plots.label_ends(labelled(a=[1, float("nan"), 9], ylim=(2, 5))), "ax: no point of the line 'a'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_it_loads_no_matplotlib():
    code = "import sys, measured.plots; assert not {'matplotlib', 'torch', 'ipywidgets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
