"""Dynamic loss scaling: how float16 gradients are kept from vanishing, and what happens when one grows too large.

float16 has no number but zero below 2**-24 = 6e-8, and many gradients are smaller. So the loss is multiplied by a large
number, and the gradients are divided by it in float32. How large? An overflow costs one step and halves the scale, a
long run of clean steps doubles it. The rule is that of ``torch.amp.GradScaler``; the tests hold the two together.

Book: ``chapters/performance/training.ipynb``. Source: Mixed Precision Training (arXiv 1710.03740, section 3.2).
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from dslib import check

LARGEST = 2.0**127  # of a scale: times two would be infinite in float32


@dataclass
class LossScaler:
    """The scale of the loss, and the rule by which it moves.

    One step is: multiply the loss by :attr:`scale`, run the backward pass, :meth:`unscale` the gradients, then clip and
    move the weights unless a gradient had overflowed, and tell :meth:`update` which of the two it was. Raises
    ValueError for a number out of range.
    """

    scale: float = 2.0**16  # best a power of two, which changes no digit
    growth_factor: float = 2.0  # 1 or more; multiplies the scale after ``growth_interval`` clean steps in a row
    backoff_factor: float = 0.5  # above 0, at most 1; multiplies it at an overflow
    growth_interval: int = 2000
    smallest: float = 2.0**-24  # a scale below it is given up on: then the gradients are not finite for another reason
    clean_steps: int = 0  # since the last overflow or growth

    def __post_init__(self):
        check.above(0, scale=self.scale, backoff_factor=self.backoff_factor, smallest=self.smallest)
        check.between(0, LARGEST, scale=self.scale)
        check.at_least(1, growth_factor=self.growth_factor)
        check.between(0, 1, backoff_factor=self.backoff_factor)
        check.whole(1, growth_interval=self.growth_interval)
        check.between(0, self.scale, smallest=self.smallest)
        check.below(0, self.growth_interval, clean_steps=self.clean_steps)

    @classmethod
    def fixed(cls, scale: float = 1.0) -> "LossScaler":
        """A scale that never moves; 1 is no scaling. A step that overflows is skipped all the same."""
        return cls(scale, growth_factor=1.0, backoff_factor=1.0, smallest=scale)

    def unscale(self, parameters: Iterable[Tensor]) -> bool:
        """Divide every gradient by the scale, in place.

        Returns whether any of them is NaN or infinite; then the step must be skipped. Raises ValueError for a gradient
        that is not float32: dividing in 16 bits would flush small ones to zero.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for gradient in gradients:
            if gradient.dtype != torch.float32:
                raise ValueError(f"parameters: got a gradient in {gradient.dtype}, expected torch.float32")
        if not gradients:
            return False
        # Before dividing: a large scale could bring a gradient that overflowed in float32 back, but not its digits.
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        for gradient in gradients:
            gradient.mul_(1.0 / self.scale)
        return not finite.item()

    def update(self, overflowed: bool) -> None:
        """Move the scale after a step; FloatingPointError if it falls below ``smallest``."""
        if overflowed:
            self.scale *= self.backoff_factor
            self.clean_steps = 0
            if self.scale < self.smallest:
                raise FloatingPointError(
                    f"gradients: NaN or infinite at every loss scale down to {self.smallest:g}, expected finite ones "
                    "at some scale"
                )
            return
        self.clean_steps += 1
        if self.clean_steps == self.growth_interval:
            if self.scale * self.growth_factor <= LARGEST:
                self.scale *= self.growth_factor
            self.clean_steps = 0

    def settings(self) -> dict[str, float]:
        """What a resumed run must share with the run before: the rule without its state."""
        return {name: value for name, value in asdict(self).items() if name not in ("scale", "clean_steps")}

    def state_dict(self) -> dict[str, float]:
        """All numbers, by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for field in fields(self):
            setattr(self, field.name, state[field.name])
