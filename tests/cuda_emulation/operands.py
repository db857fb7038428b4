"""What tests of the emulated kernels draw, how they lay it out in memory, and what they compare with."""

from collections.abc import Callable, Sequence

import torch
from cuda_emulation.lora_linear import Dropout
from torch import Tensor

from lorasp import rng
from lorasp.testing import assert_close


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def half_of(*shape: int, seed: int = 0) -> Tensor:
    """A boolean mask, True with probability 1/2."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def padded(x: Tensor) -> Tensor:
    """Rows that lie apart at multiples of 16 bytes; NaN between them."""
    wide = torch.full((*x.shape[:2], -(-x.shape[2] // 8) * 8 + 16), torch.nan, dtype=x.dtype)
    return wide[..., : x.shape[2]].copy_(x)


def shifted(x: Tensor) -> Tensor:
    """One element behind a multiple of 16 bytes."""
    return torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def exchanged(x: Tensor) -> Tensor:
    """Rows of one token next to each other."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = {"contiguous": lambda x: x, "padded": padded, "shifted": shifted, "exchanged": exchanged}


def dropped(p: Tensor, dropout: Dropout, columns: Tensor | None = None, width: int | None = None) -> Tensor:
    """keep o p, not rescaled; columns: those of a mask `width` wide that p holds."""
    if dropout.p == 0:
        return p
    shape = (p.shape[0], width or p.shape[1])
    keep = rng.keep_mask(dropout.seed, shape, dropout.p, rng.PURPOSE_LORA_DROPOUT, dropout.member)
    return torch.where(keep if columns is None else keep[:, columns], p, 0)


def check(actual: Tensor, formula: Callable, operands: Sequence[Tensor], dtype: torch.dtype, what: str = "") -> None:
    """actual against formula(*operands) in fp64; the rule's own error is that of fp32 rounded to actual's dtype."""
    reference = formula(*(t.float() for t in operands)).to(actual.dtype)
    assert_close(actual, reference, formula(*(t.double() for t in operands)), dtype, what)
