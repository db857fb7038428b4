"""rng's masks where they are too large to be made whole."""

import torch
from torch import Tensor

from lorasp import rng

_LO32 = 0xFFFFFFFF


def keep_at(
    index: Tensor, seed: int | Tensor, p: float, purpose: int = rng.PURPOSE_LORA_DROPOUT, member: int = 0
) -> Tensor:
    """rng.keep_mask at row-major indices of its elements, however far; shaped like index."""
    block, half = index // 8, index % 8
    counter = block & _LO32, block >> 32, torch.full_like(block, purpose), torch.full_like(block, member)
    words = torch.stack(rng.philox(counter, (seed & _LO32, seed >> 32 & _LO32)))
    return (words.gather(0, (half // 2)[None])[0] >> 16 * (half % 2) & 0xFFFF) >= rng.threshold(p)
