"""The file that llama.cpp reads holds the same weights, and a missing package is said."""

import numpy as np
import pytest

from dslib.architecture.weights import pretrained
from measured.experiments import speed_llama_cpp

gguf = pytest.importorskip("gguf")


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A small file of four bits in the place of SmolLM2's."""
    path, rng = tmp_path / "packed.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_token_list(["a", "b"])
    weight = gguf.quantize(rng.normal(size=(4, 64)).astype("float32"), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("w.weight", weight, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("norm.weight", rng.normal(size=8).astype("float32"))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    monkeypatch.setattr(pretrained, "packaged_gguf", lambda: path)
    return gguf.GGUFReader(path)


@pytest.mark.parametrize("kind, dtype", [("F32", np.float32), ("F16", np.float16)])
def test_other_formats_hold_the_same_weights(packed, tmp_path, kind, dtype):
    made = gguf.GGUFReader(speed_llama_cpp.gguf_file(kind, tmp_path))
    names = {name for name in packed.fields if not name.startswith("GGUF.")}
    assert {name: made.fields[name].contents() for name in names} == {n: packed.fields[n].contents() for n in names}
    for old, new in zip(packed.tensors, made.tensors, strict=True):
        wanted = gguf.dequantize(old.data, old.tensor_type)
        kept = dtype if wanted.ndim > 1 else np.float32
        assert (new.name, new.data.dtype) == (old.name, kept)
        assert np.array_equal(new.data, wanted.astype(kept))


def test_four_bits_are_the_packaged_file_itself(packed, tmp_path):
    assert speed_llama_cpp.gguf_file("Q4_1", tmp_path) == pretrained.packaged_gguf()


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install xllamacpp"):
        speed_llama_cpp.beside_llama_cpp()
