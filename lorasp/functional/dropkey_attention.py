"""dropkey_attention: validate, choose a backend, call the operator."""

import math

import torch
from torch import Tensor

from lorasp import rng
from lorasp.functional.arguments import autocast_dtype, not_same, seed_tensor
from lorasp.ops import registry
from lorasp.ops.dropkey_attention import PATTERNS, DropKeyAttentionFunction

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def dropkey_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    pattern: str = "column",
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + attn_mask, dropped logits at -inf) v: scaled_dot_product_attention with DropKey.

    q (B, H, Sq, D), k (B, H, Sk, D), v (B, H, Sk, Dv) -> o (B, H, Sq, Dv), or all without B; D, Dv in 1..256, any
    strides. enable_gqa: k and v may have Hkv heads, H divisible by Hkv; query head h reads key head h // (H / Hkv).
    attn_mask: bool (True = visible) or additive, in q's dtype or float32, broadcastable to (B, H, Sq, Sk); additive
    entries <= finfo.min / 2 count as masked, a NaN makes its query NaN. is_causal: query i sees keys 0..i, together
    with attn_mask.
    scale: default 1 / sqrt(D).

    pattern says what is dropped with probability dropout_p, before the softmax and without rescaling: "column" a key
    for all queries of a (batch, head), "element" single logits, "span" one run of max(1, int(p Sk)), at most Sk - 1,
    keys per (batch, head). Decisions are regenerated in backward from `seed` (int or 0-d int64 tensor; None draws one
    from torch's generator), never stored. A query that sees no key gives zeros and passes no gradient.

    q, k, v in one of float64 (reference backend), float32, bfloat16, float16; autocast casts them as it does for
    scaled_dot_product_attention (a float32 mask stays float32). Gradients flow to q, k, v and a float attn_mask.
    Raises TypeError and ValueError for arguments that do not fit, RuntimeError for second derivatives.
    Source: DropKey arXiv 2208.02646, algorithm 1; HiddenKey arXiv 2403.00812, section 3.1.
    """
    _check_inputs(q, k, v, enable_gqa)
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = (t if t.dtype == dtype else t.to(dtype) for t in (q, k, v))
        if isinstance(attn_mask, Tensor) and attn_mask.dtype in _HALVES:
            attn_mask = attn_mask.to(dtype)
    batched = q.ndim == 4
    if not batched:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if attn_mask is not None:
        attn_mask = _mask_4d(attn_mask, q, k, batched)
    if pattern not in PATTERNS:
        raise ValueError(f"dropkey_attention: pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    dropping = dropout_p != 0.0 and _drops(dropout_p, pattern)
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif not isinstance(scale, int | float) or not -math.inf < scale < math.inf:
        raise ValueError(f"dropkey_attention: scale must be a finite number, got {scale!r}")
    seed = seed_tensor("dropkey_attention", seed, q.device) if dropping else None
    o = DropKeyAttentionFunction.apply(
        q, not_same(k, q), not_same(v, q, k), attn_mask, seed,
        float(dropout_p) if dropping else 0.0, pattern, bool(is_causal), float(scale),
        registry.choose("dropkey_attention", q.device.type, q.dtype),
    )  # fmt: skip
    return o if batched else o.squeeze(0)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"dropkey_attention: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.dtype != q.dtype or tensor.dtype not in _DTYPES:
            wanted = ", ".join(map(str, _DTYPES)) if name == "q" else f"{q.dtype} like q"
            if name == "q" or autocast_dtype(q) is None or tensor.dtype not in _DTYPES[1:]:
                raise TypeError(f"dropkey_attention: {name} must be {wanted}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"dropkey_attention: {name} must be on {q.device} like q, got {tensor.device}")
    if q.ndim not in (3, 4) or not 1 <= q.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(
            f"dropkey_attention: q must be (B, H, Sq, D) or (H, Sq, D) with D in 1..{_MAX_HEAD_DIM}, "
            f"got {tuple(q.shape)}"
        )
    *batch, h, _, d = q.shape
    heads = f"a divisor of {h}" if enable_gqa else f"{h}"
    if k.ndim != q.ndim or (*k.shape[:-3], k.shape[-1]) != (*batch, d) or not _heads_fit(h, k.shape[-3], enable_gqa):
        raise ValueError(
            f"dropkey_attention: k must be ({', '.join(map(str, (*batch, 'Hkv')))}, Sk, {d}) with Hkv = {heads}, "
            f"got {tuple(k.shape)}"
        )
    if v.ndim != q.ndim or v.shape[:-1] != k.shape[:-1] or not 1 <= v.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(
            f"dropkey_attention: v must be ({', '.join(map(str, k.shape[:-1]))}, Dv) with Dv in 1..{_MAX_HEAD_DIM}, "
            f"got {tuple(v.shape)}"
        )


def _heads_fit(heads: int, key_heads: int, enable_gqa: bool) -> bool:
    return key_heads == heads or (enable_gqa and key_heads > 0 and heads % key_heads == 0)


def _mask_4d(attn_mask: Tensor, q: Tensor, k: Tensor, batched: bool) -> Tensor:
    """attn_mask with leading dimensions of size 1, checked, never expanded."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"dropkey_attention: attn_mask must be a Tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype not in (torch.bool, q.dtype, torch.float32):
        wanted = " or ".join(dict.fromkeys(map(str, (torch.bool, q.dtype, torch.float32))))
        raise TypeError(f"dropkey_attention: attn_mask must be {wanted}, got {attn_mask.dtype}")
    if attn_mask.device != q.device:
        raise ValueError(f"dropkey_attention: attn_mask must be on {q.device} like q, got {attn_mask.device}")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    allowed = full if batched else full[1:]
    missing = len(allowed) - attn_mask.ndim
    if missing < 0 or any(have not in (1, want) for have, want in zip(attn_mask.shape, allowed[missing:], strict=True)):
        padding = "; a padding mask (B, Sk) goes in as mask[:, None, None, :]"
        raise ValueError(
            f"dropkey_attention: attn_mask must be broadcastable to {tuple(allowed)}, got {tuple(attn_mask.shape)}"
            + (padding if attn_mask.shape == (q.shape[0], k.shape[2]) else "")
        )
    return attn_mask[(None,) * (4 - attn_mask.ndim)]


def _drops(dropout_p: float, pattern: str) -> bool:
    """Whether a dropout_p that is not 0 drops anything; raises where it is out of range."""
    if not isinstance(dropout_p, int | float) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropkey_attention: dropout_p must be in [0, 1), got {dropout_p!r}")
    if rng.threshold(dropout_p) == 65536:
        raise ValueError(f"dropkey_attention: dropout_p must be below 1 - 2^-17 (16-bit masks), got {dropout_p!r}")
    return pattern == "span" or rng.threshold(dropout_p) > 0
