"""What the operands of every operator have in common: results that are held to the tolerance rule."""

import torch
from torch import Tensor

from lorasp.testing.rule import bound


class CheckedOperands:
    """The tensors of one job. Subclasses have base(), which the times are divided by, call(choice), the results by name
    of what is tuned, and _reference(dtype), what they should be."""

    def __init__(self, job):
        self.job = job
        self._expected: dict[str, tuple[Tensor, float]] | None = None

    def base(self) -> object:
        raise NotImplementedError

    def call(self, choice) -> dict[str, Tensor]:
        raise NotImplementedError

    def _reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        raise NotImplementedError

    def checked(self, choice) -> dict[str, Tensor]:
        """The results that are compared."""
        return self.call(choice)

    def compared(self, actual: Tensor) -> Tensor:
        """The part of a result that expected() speaks of."""
        return actual

    def expected(self) -> dict[str, tuple[Tensor, float]]:
        """Name -> (the fp64 reference, the rule's bound), computed once; without results the reference leaves empty."""
        if self._expected is None:
            want, want64 = self._reference(self.job.dtype), self._reference(torch.float64)
            self._expected = {
                name: (want64[name], bound(want[name], want64[name], self.job.dtype))
                for name in want
                if want[name].numel()
            }
        return self._expected
