"""The model card of the shipped model, ``data/tiny-deepseek/README.md``, from its history and its recordings.

    python -m tools.model_card

Every number in it is read from what ``make model`` and ``make record PART=whole`` wrote.
"""

import json
import re
from pathlib import Path

from dslib.architecture.whole import HASHES
from dslib.data import corpus
from measured import recordings
from measured.experiments import ngram, whole

SPACE = re.compile(r"\s+")
FOLDER = Path(__file__).resolve().parents[1] / "data" / "tiny-deepseek"
TEXT = """---
language: en
license: mit
pipeline_tag: text-generation
library_name: transformers
---

# tiny-deepseek

DeepSeek-V3's architecture with 4.8 million parameters, of which a token uses 3.0, and a module of 0.9 million that
predicts one token more. It belongs to the course *DeepSeek, Measured*, which builds, trains and examines it
(`chapters/architecture/whole.ipynb`). It is no model of DeepSeek's, and none of their weights are in it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "data/tiny-deepseek"
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```

`prediction.safetensors` holds the prediction module, as layer 5; transformers' class leaves it unread.
`dslib.architecture.whole.load()` reads both files and checks their hashes. A text begins with token 0, which also ends
it. vLLM 0.32.0 for CPUs reads the files and then stops with `RuntimeError: invalid weight input features 48`, in its
kernel for experts, whose inner size here is 48.

## Training

{steps} steps of {each} tokens, {millions} million in all, by `make model` on two processor cores in {minutes} minutes,
with one seed, chosen beforehand. The course of the run is in `history.json`. Text: `data/corpus`, split by document,
near-duplicates removed before the split.

| source | licence |
|---|---|
{sources}

The weights are under the MIT License, as the code is.

## Evaluation

Bits a byte on whole documents, beside the best n-gram (Kneser-Ney, order 6) trained on the same tokens. Differences are
paired; 95 % intervals over documents. The test text was used for nothing before this.

| split | documents | tiny-deepseek | 6-gram | better by |
|---|---:|---:|---:|---|
{evaluation}

## Three texts

Prompts fixed beforehand, temperature 0.8, seed 0, the first draw of each:

{texts}

## What it cannot do

It writes sentences in the manner of its sources, and they mean nothing. It knows no facts, follows no instruction and
answers no question; it invents words. Its sources are speeches of presidents, old novels, a Bible, reports on countries
and manuals: what stands in them, prejudices included, it repeats. English only. It was trained on contexts of 256
tokens and at the end of 512; beyond 512 it was never tried. Do not use it for anything but learning how such models
work.

## Files

{hashes}
"""


def evaluation(split: str) -> str:
    ours = recordings.recorded(whole.model_bits, split=split).result
    found = whole.beside_counting(ours, recordings.recorded(ngram.ngram_baselines).result[split])[0]
    gain, low, high = found["better"]
    rates = f"{found['ours']:.3f} | {found['counted']:.3f}"
    return f"| {split} | {found['documents']} | {rates} | {gain:.3f} ({low:.3f} to {high:.3f}) |"


def card() -> str:
    history = json.loads((FOLDER / "history.json").read_text(encoding="utf-8"))
    hashes = json.loads((FOLDER / HASHES).read_text(encoding="utf-8"))
    last, texts = history[-1], recordings.recorded(whole.texts).result
    sources = corpus.manifest()["sources"].items()
    return TEXT.format(
        steps=f"{last['step']:,}",
        each=f"{last['tokens'] // last['step']:,}",
        millions=f"{last['tokens'] / 1e6:.1f}",
        minutes=f"{last['seconds'] / 60:.0f}",
        sources="\n".join(f"| {one['package']} {one['version']} | {one['licence']} |" for _, one in sources),
        evaluation="\n".join(map(evaluation, ("validation", "test"))),
        texts="\n\n".join(f"> **{prompt}**{re.sub(SPACE, ' ', text)}" for prompt, text in texts.items()),
        hashes="\n".join(f"- `{name}`: sha256 `{value}`" for name, value in hashes.items()),
    )


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(card(), encoding="utf-8")
