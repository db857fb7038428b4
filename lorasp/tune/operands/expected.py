"""What a job's results are held to."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorasp.testing.rule import bound


def expected(
    reference: Callable[[torch.dtype], dict[str, Tensor]], dtype: torch.dtype
) -> dict[str, tuple[Tensor, float]]:
    """Name -> (the fp64 reference, the tolerance rule's bound); without results that the reference leaves empty."""
    want, want64 = reference(dtype), reference(torch.float64)
    return {name: (want64[name], bound(want[name], want64[name], dtype)) for name in want if want[name].numel()}
