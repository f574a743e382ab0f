"""What it costs to choose a token from its logits, by rule.

Book: ``chapters/architecture/sampling.ipynb``.
"""

import torch

from dslib.architecture.generation import Sampling
from measured.machine import as_device
from measured.timing import Timing, compare

RULES = {
    "argmax": Sampling(),
    "temperature": Sampling(temperature=1.0),
    "top-k 40": Sampling(temperature=1.0, top_k=40),
    "top-p 0.95": Sampling(temperature=1.0, top_p=0.95),
    "min-p 0.1": Sampling(temperature=1.0, min_p=0.1),
}


def sampling_times(vocab_size: int = 49_152, batch: int = 1, rounds: int = 5, seed: int = 0) -> dict[str, Timing]:
    """Seconds in which each rule chooses a token for each of ``batch`` rows of float32 logits, and those of a sort.

    Runs on the GPU if there is one. Logits are normal with a standard deviation of 3, about as peaked as those of a
    small language model; the times of these rules do not depend on it, but for the order of the sort.
    """
    device = as_device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, vocab_size, generator=generator)).to(device)
    ways = {name: (lambda rule=rule: rule.choose(logits)) for name, rule in RULES.items()}
    ways["one sort"] = lambda: logits.sort(dim=-1)  # what top-p cannot do without
    with torch.inference_mode():
        return compare(ways, rounds=rounds, device=device)
