"""tools/book.py refuses a book that is not whole: each fault is put into a small book and has to be named.

The real book's HTML is verified by `make book`, which fails on the same checks. Here it is verified again if it has
been built, so that a fault that came in since shows.
"""

import json
import os
import re

import pytest
import yaml
from pybtex.database import parse_file

from tools import book, notebooks

WORDS = "This sentence stands here so that the page has enough words to count as written. " * 12


@pytest.fixture
def sources(tmp_path):
    """A folder with a table of contents, a Markdown page and a notebook that ran."""
    (tmp_path / "chapters" / "a").mkdir(parents=True)
    (tmp_path / "index.md").write_text(f"# Front\n\n{WORDS}")
    (tmp_path / "chapters" / "a" / "one.md").write_text(f"# One\n\n{WORDS}")
    write_notebook(tmp_path)
    toc = {"format": "jb-book", "root": "index"}
    toc["parts"] = [{"caption": "A", "chapters": [{"file": "chapters/a/one"}, {"file": "chapters/a/two"}]}]
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    return tmp_path


def write_notebook(root, text=WORDS, count=1, outputs=("3\n",)):
    cells = [
        {"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# Two\n\n{text}"},
        {
            "cell_type": "code",
            "id": "three",
            "metadata": {},
            "source": "print(3)",
            "execution_count": count,
            "outputs": [{"output_type": "stream", "name": "stdout", "text": line} for line in outputs],
        },
    ]
    page = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (root / "chapters" / "a" / "two.ipynb").write_text(json.dumps(page))


def only_problem(problems):
    problems = list(problems)
    assert len(problems) == 1, problems
    return problems[0]


# ---------------------------------------------------------------- sources


def page(text, name="one"):
    """A fault: the Markdown page says `text`."""
    return lambda root: (root / "chapters" / "a" / f"{name}.md").write_text(text)


def name_twice(root):
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    toc["parts"][0]["chapters"].append({"file": "chapters/a/one"})
    (root / "_toc.yml").write_text(yaml.safe_dump(toc))


SOURCE_FAULTS = [
    (lambda root: (root / "chapters" / "a" / "one.md").unlink(), "chapters/a/one"),
    (page(f"# Forgotten\n\n{WORDS}", "forgotten"), "forgotten.md is not in _toc.yml"),
    (name_twice, "more than once"),
    *((page(text), "is not written") for text in ("# One\n", "# One\n\nSoon.", f"<!--{WORDS}-->")),
    (page(f"# One\n\n```python\n{WORDS}\n```\n"), "is not written"),
    *(
        (page(f"# One\n\n{WORDS}\n\n{word}: the rest."), "is not finished")
        for word in ("TODO", "placeholder", "To be written", "coming soon")
    ),
    (lambda root: write_notebook(root, text="Short."), "chapters/a/two is not written"),
    (lambda root: write_notebook(root, count=None), "top to bottom"),
    (lambda root: write_notebook(root, count=4), "top to bottom"),
]


@pytest.mark.parametrize(("spoil", "wanted"), SOURCE_FAULTS)
def test_a_fault_in_the_sources_is_named(sources, spoil, wanted):
    assert list(book.check_sources(sources)) == []
    spoil(sources)
    assert wanted in only_problem(book.check_sources(sources))


def test_toc_order_and_nesting():
    toc = {"root": "r", "parts": [{"chapters": [{"file": "a", "sections": [{"file": "b"}]}, {"file": "c"}]}]}
    assert book.toc_pages(toc) == ["r", "a", "b", "c"]


def test_notebook_without_outputs(sources):
    write_notebook(sources, outputs=())
    assert any("no output" in problem for problem in book.check_sources(sources))


# ---------------------------------------------------------------- log


def test_warnings_are_found_in_a_coloured_log():
    log = "reading\n\x1b[91mpath.md:3: WARNING: undefined label: x\x1b[39;49;00m\nok\nWARNING: unknown config value\n"
    assert len(book.warnings_in(log)) == 2
    assert book.warnings_in("build finished with problems, 0 warnings.\nan ERROR in prose") == []


@pytest.mark.parametrize(
    ("log", "said"),
    [("x.md:1: WARNING: citation not found: a", "citation not found"), ("done", "index.html was not built")],
)
def test_build_fails_although_jupyter_book_says_it_is_fine(sources, monkeypatch, capsys, log, said):
    monkeypatch.setattr(book, "run_jupyter_book", lambda root: (0, log))
    assert book.build(sources) == 1
    assert said in capsys.readouterr().err


def test_build_does_not_start_on_bad_sources(sources, monkeypatch):
    write_notebook(sources, count=None)
    monkeypatch.setattr(book, "run_jupyter_book", lambda root: pytest.fail("was started"))
    assert book.build(sources) == 1


# ---------------------------------------------------------------- html

PAGE = """<html><head><link rel="stylesheet" href="_static/a.css"><link rel="canonical" href="https://example.org/"></head>
<body><h1 id="top">Page</h1><a href="#top">up</a> <a href="two%20b.html#there">two</a> <a href="https://example.org">out</a>
<img src="x.png" alt="a line that rises"><svg aria-hidden="true"></svg><script>const x = "https://example.org/a";</script>
{extra}</body></html>"""


@pytest.fixture
def html(tmp_path):
    def write(extra="", css=""):
        (tmp_path / "_static").mkdir(exist_ok=True)
        (tmp_path / "_static" / "a.css").write_text(f"/* see https://example.org */ a {{ color: red }} {css}")
        (tmp_path / "one.html").write_text(PAGE.format(extra=extra))
        (tmp_path / "two b.html").write_text('<h1 id="there">Two</h1>')
        return tmp_path

    return write


def test_page_not_built(html):
    assert "three.html was not built" in only_problem(book.check_html(html(), ["one", "three"]))


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ('<img src="y.png">', "no text alternative"),
        ('<img src="y.png" alt=" ">', "no text alternative"),
        ('<img src="../_images/1f.png" alt="../_images/1f.png">', "no text alternative"),
        ("<svg><path d='M0 0'/></svg>", "no text alternative"),
        ('<a href="three.html">x</a>', "broken link: three.html"),
        ('<a href="#nowhere">x</a>', "no such anchor: #nowhere"),
        ('<a href="two%20b.html#nowhere">x</a>', "no such anchor: two%20b.html#nowhere"),
        ('<a href="../../etc/passwd">x</a>', "broken link"),
        ('<script src="https://cdn.example.org/x.js"></script>', "fetches https://cdn.example.org/x.js"),
        ('<script src="//cdn.example.org/x.js"></script>', "fetches //cdn.example.org/x.js"),
        ('<link rel="stylesheet" href="https://fonts.example.org/x.css">', "fetches https://fonts"),
        ('<link rel="preconnect" href="https://fonts.example.org">', "fetches https://fonts"),
        ('<img alt="far away" src="https://example.org/x.png">', "fetches https://example.org/x.png"),
        ('<iframe src="https://example.org"></iframe>', "fetches https://example.org"),
        ('<script>load("https://cdn.example.org/x.js")</script>', "a script names"),
        ('<script type="application/vnd.jupyter.widget-state+json">{}</script>', "widget state"),
    ],
)
def test_html_fault(html, extra, wanted):
    assert list(book.check_html(html(), ["one", "two b"])) == []
    assert wanted in only_problem(book.check_html(html(extra), ["one"]))


@pytest.mark.parametrize("css", ["@import 'https://example.org/f.css';", "a { background: url(//example.org/f.woff) }"])
def test_style_sheet_that_fetches(html, css):
    assert "fetches" in only_problem(book.check_html(html(css=css), ["one"]))


def test_a_page_that_exists_but_is_empty_has_no_anchor(html):
    folder = html()
    (folder / "two b.html").write_text("")
    assert "no such anchor" in only_problem(book.check_html(folder, ["one"]))


# ---------------------------------------------------------------- the book itself


def test_the_sources_of_the_book():
    assert list(book.check_sources()) == []


def cited():
    """(page, key) of every citation in the chapters."""
    for page in book.toc_pages(yaml.safe_load((book.ROOT / "_toc.yml").read_text(encoding="utf-8"))):
        prose = book.prose_of(book.source_of(book.ROOT, page))
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose):
            yield from ((page, key.strip()) for key in keys.split(","))


def test_citations_resolve():
    known = parse_file(str(book.ROOT / "references.bib"), "bibtex").entries.keys()
    assert [f"{page} cites {key}" for page, key in cited() if key not in known] == []


def test_the_address_of_the_repository_is_the_same_everywhere():
    url = yaml.safe_load((book.ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    repository = url.removeprefix("https://github.com/")
    for name in ("README.md", "index.md"):
        text = (book.ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"github\.com/([\w-]+/[\w-]+)", text)) == {repository}, name
    assert url in notebooks.setup_source()


def built_after_sources():
    index = book.HTML / "index.html"
    if not index.exists():
        return False
    files = [path for path in (book.ROOT / "chapters").rglob("*") if path.suffix in (".md", ".ipynb")]
    newest = max(os.path.getmtime(path) for path in [*files, book.ROOT / "index.md", book.ROOT / "_config.yml"])
    return os.path.getmtime(index) > newest


@pytest.mark.skipif(not built_after_sources(), reason="no fresh build; make book verifies the HTML it builds")
def test_the_html_of_the_book():
    pages = book.toc_pages(yaml.safe_load((book.ROOT / "_toc.yml").read_text(encoding="utf-8")))
    assert list(book.check_html(book.HTML, pages)) == []
