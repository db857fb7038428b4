"""hidden_cut in plain PyTorch: the definition every other backend is checked against.

    y = residual + D o x          dx = D o dy

element: D = keep * 65536/(65536 - t) per element of x (B, S, F). column: whole tokens, one decision per (b, s). span:
one contiguous run of tokens per b. The last two do not rescale.

HiddenCut: Chen et al., arXiv 2106.00149; the patterns as HiddenKey compares them: arXiv 2403.00812.
"""

import torch
from torch import Tensor

from lorasp import rng


def _cut(x: Tensor, seed: Tensor, p: float, pattern: str) -> Tensor:
    """D o x (B, S, F)."""
    if pattern == "element":
        keep = rng.keep_mask(seed, tuple(x.shape), p, rng.PURPOSE_HIDDEN_CUT)
        return torch.where(keep, x * rng.rescale(p), 0)
    draw = rng.keep_mask if pattern == "column" else rng.span_keep_mask
    return torch.where(draw(seed, tuple(x.shape[:2]), p, rng.PURPOSE_HIDDEN_CUT).unsqueeze(-1), x, 0)


def forward(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, pattern: str) -> Tensor:
    """y (B, S, F) in the dtype that x + residual has."""
    cut = _cut(x, seed, p, pattern)
    return (cut if residual is None else residual + cut).contiguous()


def backward(dy: Tensor, seed: Tensor, p: float, pattern: str, dtype: torch.dtype) -> Tensor:
    """dx (B, S, F) in dtype, x's."""
    return _cut(dy, seed, p, pattern).to(dtype).contiguous()
