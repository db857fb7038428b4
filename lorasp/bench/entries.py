"""What a benchmark of an operator times: forward and backward of one call."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """Something that is timed: a line of the plot and the drop rate at which it stands."""

    name: str
    rate: float | None
    forward: Callable[[], Tensor]
    step: Callable[[], object]


def entry(name: str, rate: float | None, forward: Callable[[], Tensor], inputs, gradient: Tensor | None) -> Entry:
    return Entry(name, rate, forward, lambda: torch.autograd.grad(forward(), inputs, gradient))


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)
