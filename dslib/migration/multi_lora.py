"""Several LoRAs on one model at once, another for each row of a batch: how one server serves many fine-tunings.

    y[b] = W x[b] + B[row b] A[row b] x[b]            # two batched products; the large W is read once for all rows

Shapes: B rows, T tokens, in and out of a layer, r the rank.

Book: ``chapters/migration/adapters.ipynb``. Source: Punica (arXiv 2310.18547).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dslib.migration.adapters import Adapter


class PerRow:
    """Several LoRAs on one model, chosen for each row of a batch: ``bank.rows = [0, None, 1]`` before the call.

    The adapters are detached and take part here instead. All their products for one layer are one batched product, so
    that rows with different adapters go through the model together.

    Raises ValueError for adapters that are not LoRA, are merged, or lie beside different layers.
    """

    def __init__(self, adapters: Sequence[Adapter]):
        first = adapters[0]
        for adapter in adapters:
            if (
                adapter.kind != "lora"
                or adapter._merged
                or adapter.names != first.names
                or adapter.model is not first.model
            ):
                raise ValueError("adapters: expected LoRAs beside the same layers of one model, none of them merged")
        self.rows: Sequence[int | None] | None = None
        self.model, self.count = first.model, len(adapters)
        modules = dict(self.model.named_modules())
        rank = max(part.lora_A.shape[0] for adapter in adapters for part in adapter.parts)
        self._hooks = []
        for place, name in enumerate(first.names):
            parts = [adapter.parts[place] for adapter in adapters]
            # One more of zeros: for rows without an adapter. A smaller rank is filled up with zeros.
            A = torch.stack([F.pad(part.lora_A.detach(), (0, 0, 0, rank - len(part.lora_A))) for part in parts])
            B = torch.stack(
                [part.scale * F.pad(part.lora_B.detach(), (0, rank - part.lora_B.shape[1])) for part in parts]
            )
            A, B = (torch.cat([one, torch.zeros_like(one[:1])]) for one in (A, B))
            self._hooks.append(modules[name].register_forward_hook(self._listener(A, B)))
        for adapter in adapters:
            adapter.remove()

    def _listener(self, A: Tensor, B: Tensor) -> Callable:
        """A: (adapters + 1, r, in), B: (adapters + 1, out, r), the scale in it."""

        def listen(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if self.rows is None:
                return None
            x = inputs[0]
            if len(self.rows) != len(x):
                raise ValueError(f"rows: got {len(self.rows)}, expected one for each of the batch's {len(x)}")
            chosen = torch.tensor([self.count if row is None else row for row in self.rows], device=x.device)
            shift = x.flatten(1, -2) @ A[chosen].mT @ B[chosen].mT  # (B, T, in) (B, in, r) (B, r, out)
            return output + shift.view_as(output)

        return listen

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
