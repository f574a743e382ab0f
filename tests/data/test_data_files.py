"""The data files keep their schema, cite sources that exist, and make physical sense."""

import re
from pathlib import Path

import pytest
import yaml

from dslib.data import files, published_figures
from dslib.data.files import data_path
from measured.claims import load_ledger

ROOT = Path(__file__).resolve().parents[2]
TIERS = set(published_figures.TIERS)
DATE = re.compile(r"20\d\d-\d\d(-\d\d)?")


def read(name):
    return yaml.safe_load(data_path(name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bib():
    pybtex = pytest.importorskip("pybtex.database")
    return pybtex.parse_file(str(ROOT / "references.bib")).entries


@pytest.fixture(scope="module")
def gpus():
    return read("hardware.yml")["gpus"]


# ---------------------------------------------------------------- bibliography


def test_bibliography_entries_are_complete(bib):
    for key, entry in bib.items():
        assert re.fullmatch(r"[a-z0-9_]+", key), key
        assert entry.fields.get("title"), key
        assert entry.persons.get("author"), f"{key}: an author or an organisation"
        if "eprint" in entry.fields:  # the style makes the link from it
            assert "url" not in entry.fields and entry.fields["archiveprefix"] == "arXiv", key
            assert entry.fields["eprint"][:2] == entry.fields["year"][2:], f"{key}: arXiv ids begin with the year"
        elif key == "article":  # what the course tests: title, author as given, day; its address is not known to us
            assert "September" in entry.fields["note"]
        else:
            assert entry.fields["url"].startswith("https://"), key
    arxiv = [entry.fields["eprint"] for entry in bib.values() if "eprint" in entry.fields]
    assert len(arxiv) == len(set(arxiv)), "one entry a paper"


def test_every_source_resolves(bib):
    used = {key for claim in load_ledger().values() for key in claim.sources}
    used |= {key for gpu in read("hardware.yml")["gpus"].values() for key in gpu["sources"]}
    used |= {row["source"] for row in read("hardware.yml")["measured_by_deepseek"]}
    used |= {row["source"] for rows in read("prices.yml").values() for row in rows}
    used |= {key for figures in published_figures.entries().values() for f in figures.values() for key in f.source}
    assert sorted(used - set(bib)) == []


# ---------------------------------------------------------------- hardware


def test_gpus_have_their_fields_and_sane_values(gpus):
    formats = {"float32", "tfloat32", "float16", "bfloat16", "float8", "int8", "int4"}
    for name, gpu in gpus.items():
        fields = {"name", "memory_gb", "memory_type", "bandwidth_gb_s", "tflops", "power_w", "sources", "tier"}
        assert fields <= set(gpu), name
        assert gpu["tier"] in TIERS and gpu["sources"], name
        assert 4 <= gpu["memory_gb"] <= 300 and 50 <= gpu["bandwidth_gb_s"] <= 10_000, name
        assert gpu["tflops"].keys() <= formats and "float32" in gpu["tflops"], name
        rates = gpu["tflops"]
        assert rates["float32"] < rates["float16"] <= rates.get("int8", 1e9) <= rates.get("int4", 1e9), name
        # One full read of the memory takes 10 to 100 ms on all of these: a slip of 1,000 in a unit would show.
        assert 0.01 < gpu["memory_gb"] / gpu["bandwidth_gb_s"] < 0.1, name


def test_what_a_card_lacks_is_left_out(gpus):
    assert all("float8" not in gpus[name]["tflops"] for name in gpus if name.startswith(("T4", "A1")))
    assert "bfloat16" not in gpus["T4"]["tflops"]
    assert gpus["A10"]["memory_gb"] == 24, "claim s2.3-02: there is no A10 with 40 GB"


def test_figures_of_the_speed_claims(gpus):
    """s2.1-02: both floors stand in the sentence, and 82 ms needs about twice the larger card's bandwidth."""
    because = load_ledger()["s2.1-02"].because
    assert "214.0 ms" in because and "163.2 ms" in because
    implied = 128 * 2.6e9 / 0.082
    assert implied / (gpus["A100_80GB"]["bandwidth_gb_s"] * 1e9) == pytest.approx(1.99, abs=0.005)
    assert 671 / gpus["A100_80GB"]["memory_gb"] > 8 and 335.5 / gpus["A100_80GB"]["memory_gb"] > 4  # s2.1-05, s2.3-04
    assert gpus["A100_40GB"]["bandwidth_gb_s"] == 1555  # s2.1-03, s3.1-03


# ---------------------------------------------------------------- prices


def test_prices_are_dated_and_known(gpus):
    prices = read("prices.yml")
    for row in prices["gpu_hours"]:
        assert {"gpu", "usd", "provider", "kind", "date", "source", "tier"} <= set(row), row
        assert row["gpu"] in gpus or row["gpu"] in {"H100_PCIE", "H800"}, row
        assert row["kind"] in {"list", "community", "instance", "assumed"} and row["tier"] in TIERS, row
        assert 0.1 < row["usd"] < 20 and (row["date"] is None or DATE.fullmatch(row["date"])), row
    for row in prices["api_tokens"]:
        assert row["cached"] < row["input"] < row["output"] < 10 and DATE.fullmatch(row["date"]), row
        assert row["tier"] in TIERS, row


@pytest.mark.parametrize(
    ("version", "per_request", "gpu", "rent", "times"),
    [
        ("V1", 0.003, "A10", 0.00018, 17),
        ("V2", 0.007, "A100_80GB", 0.00043, 16),
        ("V3", 0.005, "A100_80GB", 0.00043, 12),
    ],
)
def test_figures_of_the_cost_claims(version, per_request, gpu, rent, times):
    assert f"${per_request * 100_000 * 365:,.0f}" in load_ledger()[f"s2.3-year-{version}"].because
    rows = read("prices.yml")["gpu_hours"]
    usd = next(row["usd"] for row in rows if row["gpu"] == gpu and row["source"] == "lambda_catalog")
    assert usd * 24 / 100_000 == pytest.approx(rent, abs=5e-6)
    assert round(per_request / (usd * 24 / 100_000)) == times
    assert f"${rent:.5f}" in load_ledger()[f"s2.3-cost-{version}"].because


# ---------------------------------------------------------------- published figures


def test_published_figures_keep_their_schema():
    document = read("published.yml")
    for name, model in document["models"].items():
        assert {"name", "modality", "hub_ids", "figures"} <= set(model), name
        assert all(hub_id.startswith("deepseek-ai/") for hub_id in model["hub_ids"]), name
        variants = len(model.get("variants", [None]))
        for key, row in model["figures"].items():
            assert row["tier"] in TIERS and "value" in row, f"{name}.{key}"
            if isinstance(row["value"], list) and key in {"params_total", "params_active", "layers", "hidden_size"}:
                assert len(row["value"]) == variants, f"{name}.{key}: one value a variant"
        assert DATE.match(model["figures"].get("released", {"value": "2024-01"})["value"]), name


def test_published_figures_make_sense():
    for name, figures in published_figures.entries().items():
        total, active = figures.get("params_total"), figures.get("params_active")
        if total and active:
            pairs = zip(_each(total.value), _each(active.value), strict=True)
            assert all(a <= t for t, a in pairs), name
        if "experts_active" in figures:
            pairs = zip(_each(figures["experts_active"].value), _each(figures["experts_routed"].value), strict=True)
            assert all(k < n for k, n in pairs), name
        for key, row in figures.items():
            if key.startswith("mmlu"):
                assert all(25 < value < 100 for value in _each(row.value)), f"{name}.{key}"


def test_recomputed_from_the_file():
    f = published_figures.figure
    coder = {name: row.value for name, row in published_figures.entries()["deepseek_coder_1_3b"].items()}
    d, layers = coder["hidden_size"], coder["layers"]
    per_layer = 4 * d * d + 3 * d * coder["ffn_size"] + 2 * d
    total = 2 * coder["vocab_size"] * d + layers * per_layer + d  # embedding and head are two matrices here
    assert total == coder["params_total"] == load_ledger()["s1.1-04"].found["parameters"]
    assert 2 * total == coder["weights_bytes"]
    assert 2 * layers * d * 2 == coder["kv_bytes_per_token"]
    assert 1 - coder["int4_file_bytes"] / coder["weights_bytes"] == pytest.approx(0.668, abs=5e-4)  # s1.1-08
    latent = (f("deepseek_v2", "kv_rank").value + f("deepseek_v2", "rope_dim").value) * f("deepseek_v2", "layers").value
    assert latent == f("deepseek_v2", "kv_elements_per_token").value == 34560
    llm = published_figures.entries()["deepseek_llm"]
    cached = [n * 2 * kv * 128 for n, kv in zip(llm["layers"].value, llm["kv_heads"].value, strict=True)]
    assert tuple(cached) == llm["kv_elements_per_token"].value
    serving = published_figures.entries()["serving"]
    assert serving["nodes"].value * 8 * 24 * 2 == serving["cost_usd_per_day"].value
    hours = f("deepseek_v3", "gpu_hours").value
    assert hours * 2 == f("deepseek_v3", "training_cost_usd").value and hours == 2_664_000 + 119_000 + 5_000


def test_figures_of_the_4_gb_claim():
    """s1.1-11: weights and cache against 4 GiB less 0.5 GiB for the CUDA context, the assumption the row states."""
    coder = {name: row.value for name, row in published_figures.entries()["deepseek_coder_1_3b"].items()}
    budget, per_token = 3.5 * 2**30, coder["kv_bytes_per_token"]
    lengths = {"512": 512, "4k": 4096, "16k": 16384}
    fits = {f"fits_fp16_{k}": coder["weights_bytes"] + n * per_token <= budget for k, n in lengths.items()}
    fits["fits_fp32_512"] = 2 * (coder["weights_bytes"] + 512 * per_token) <= budget
    claim = load_ledger()["s1.1-11"]
    assert fits == claim.found
    assert "0.5 GiB" in claim.because and coder["weights_bytes"] / 2**30 == pytest.approx(2.51, abs=0.005)
    assert (budget - coder["weights_bytes"]) / per_token == pytest.approx(5400, abs=50)


def test_figure_shows_its_source():
    figure = published_figures.figure
    assert repr(figure("deepseek_v3", "params_total")) == "671B parameters [deepseek_v3, p. 1, primary]"
    assert str(figure("deepseek_v4", "routing")) == "not stated / √softplus, scaled by 1.5"
    assert "`deepseek_v2`" in figure("deepseek_v2", "mmlu")._repr_markdown_()
    with pytest.raises(ValueError, match=r"entry: got 'deepseek_v5'.*deepseek_v"):
        figure("deepseek_v5", "layers")
    with pytest.raises(ValueError, match=r"figure of deepseek_v3: got 'param_total'.*params_total"):
        figure("deepseek_v3", "param_total")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", r"published\.yml line \d: not valid YAML"),
        ("models: \x07", r"published\.yml: not valid YAML: .*not allowed"),
        ("", r"published\.yml: expected 'models'"),
        ("models: {m: {}}", r"published\.yml: expected 'models' and entries with 'figures'"),
        ("models: {m: {figures: {layers: 3}}}", r"published\.yml, m, figure 'layers': got 3, expected value, source"),
        (
            "models: {m: {figures: {layers: {value: 3, source: a, tier: good}}}}",
            r"published\.yml, m, figure 'layers', field 'tier': got 'good', expected one of 'primary'",
        ),
    ],
)
def test_a_faulty_file_says_where(tmp_path, monkeypatch, text, message):
    path = tmp_path / "published.yml"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(files, "data_path", lambda name: path)
    published_figures.entries.cache_clear()
    with pytest.raises(ValueError, match=message):
        published_figures.entries()


# ---------------------------------------------------------------- the folder for weights


@pytest.mark.parametrize(
    ("chosen", "shared", "root"),
    [
        (None, None, "~/.cache/dslib"),
        ("", "", "~/.cache/dslib"),
        (" ", "relative", "~/.cache/dslib"),
        (None, "/b", "/b/dslib"),
        ("/a", "/b", "/a"),
        ("~", None, "~"),
        ("~/a b", None, "~/a b"),
        ("a/b", None, "./a/b"),
        ("file/../a", None, None),
        ("file", "/b", None),
        ("file/a", "/b", None),
        ("~nobody-of-this-name/a", None, None),
    ],
)
def test_what_the_variables_may_hold(tmp_path, monkeypatch, chosen, shared, root):
    for name, value in (("DSLIB_CACHE", chosen), ("XDG_CACHE_HOME", shared), ("HOME", str(tmp_path / "home"))):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if root is None:
        with pytest.raises(ValueError, match=f"DSLIB_CACHE: got '{chosen}', expected a folder"):
            files.cache_root()
    else:
        wanted = root.replace("~", str(tmp_path / "home")).replace("./", f"{tmp_path}/")
        assert str(files.cache_root()) == wanted


def _each(value):
    return [v for v in (value if isinstance(value, tuple) else (value,)) if v is not None]
