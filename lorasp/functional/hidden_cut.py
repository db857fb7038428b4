"""hidden_cut: validate, choose a backend, call the operator."""

import torch
from torch import Tensor

from lorasp import rng
from lorasp.functional.arguments import check_like, not_same, seed_tensor, three_dimensional
from lorasp.ops import registry
from lorasp.ops.hidden_cut import PATTERNS, HiddenCutFunction

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def hidden_cut(
    x: Tensor,
    p: float,
    *,
    pattern: str = "element",
    residual: Tensor | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = residual + D o x: dropout of a sublayer's output, fused with the residual add.

    x (..., S, F) -> y (..., S, F), any strides. pattern: "element" keeps an element with probability 1 - t/65536,
    t = round(65536 p), and rescales it by 65536/(65536 - t); "column" keeps or drops whole tokens, not rescaled;
    "span" drops one contiguous run of tokens per sequence, of length min(S - 1, max(1, int(p S))), not rescaled.
    p in [0, 1); 0 drops nothing. residual: x's shape; y has the dtype of x + residual (under autocast a half-precision
    x meets a float32 residual), summed in float32 and rounded once.

    D is regenerated in backward from `seed` (int or 0-d int64 tensor; None draws one from torch's generator): backward
    keeps 8 bytes. Call it in training only: it does not know of `module.eval()`. float64 runs on the reference backend.

    Raises TypeError and ValueError for arguments that do not fit, RuntimeError for second derivatives.
    Source: HiddenCut arXiv 2106.00149; HiddenKey arXiv 2403.00812 (element-wise on the FFN's output).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"hidden_cut: x must be a Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"hidden_cut: x must be {', '.join(map(str, _DTYPES))}, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"hidden_cut: x must be (..., S, F), got {tuple(x.shape)}")
    if residual is not None:
        check_like("hidden_cut", "residual", residual, "x", x.shape, _DTYPES, x.device)
    if not isinstance(p, int | float) or isinstance(p, bool) or not 0.0 <= p < 1.0:
        raise ValueError(f"hidden_cut: p must be in [0, 1), got {p!r}")
    if pattern not in PATTERNS:
        raise ValueError(f"hidden_cut: pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    if pattern != "span" and rng.threshold(p) == 65536:
        raise ValueError(f"hidden_cut: p must be below 1 - 2^-17 (16-bit masks), got {p!r}")
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    backend = registry.choose("hidden_cut", x.device.type, dtype)
    if p == 0.0 or (pattern != "span" and rng.threshold(p) == 0):
        return x if residual is None else x + residual
    seed = seed_tensor("hidden_cut", seed, x.device)
    shape = x.shape
    if x.ndim != 3:
        x = three_dimensional(x)
        residual = None if residual is None else three_dimensional(residual)
    residual = None if residual is None else not_same(residual, x)
    return HiddenCutFunction.apply(x, residual, seed, float(p), pattern, backend).reshape(shape)
