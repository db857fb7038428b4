"""dropkey_attention in plain PyTorch: the definition every other backend is checked against.

    z = scale q k^T + attn_mask;  z[masked or dropped] = -inf;  p = softmax(z);  o = p v;  lse = log sum exp z
    dv = p^T do;  dp = do v^T;  dz = p o (dp - rowsum(do o o));  dq = scale dz k;  dk = scale dz^T q;  dmask = dz

Logits are dropped before the softmax and not rescaled. A query that sees no key has o = 0, lse = -inf, no gradient.
DropKey: arXiv 2208.02646, algorithm 1; the column pattern is HiddenKey's: arXiv 2403.00812, section 3.1.
"""

import torch
from torch import Tensor

from lorasp import rng


def keep_mask(seed: Tensor | None, shape: tuple[int, int, int, int], p: float, pattern: str) -> Tensor | None:
    """Which logits of shape (B, H, Sq, Sk) are not dropped, broadcastable to it; None where none is."""
    b, h, _, sk = shape
    if pattern == "span":
        if rng.span_length(p, sk) == 0:
            return None
        return rng.span_keep_mask(seed, (b, h, sk), p, rng.PURPOSE_DROPKEY).unsqueeze(2)
    if rng.threshold(p) == 0:
        return None
    if pattern == "column":
        return rng.keep_mask(seed, (b, h, sk), p, rng.PURPOSE_DROPKEY).unsqueeze(2)
    return rng.keep_mask(seed, shape, p, rng.PURPOSE_DROPKEY)


def visible(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, seed: Tensor | None, p: float, pattern: str, is_causal: bool
) -> Tensor:
    """Boolean (B, H, Sq, Sk): the logits that are neither dropped nor masked nor in the future (aligned top-left)."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    seen = torch.ones(shape, dtype=torch.bool, device=q.device)
    keep = keep_mask(seed, shape, p, pattern)
    seen = seen if keep is None else seen & keep
    if attn_mask is not None:
        open_to = attn_mask if attn_mask.dtype == torch.bool else ~(attn_mask <= torch.finfo(attn_mask.dtype).min / 2)
        seen = seen & open_to
    return seen.tril() if is_causal else seen


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def per_query_head(tensor: Tensor, heads: int) -> Tensor:
    """(B, Hkv, Sk, D) as (B, H, Sk, D): query head h reads key head h // (H / Hkv)."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def logits(q: Tensor, k: Tensor, attn_mask: Tensor | None, seen: Tensor, scale: float) -> Tensor:
    z = _wide(q) @ per_query_head(_wide(k), q.shape[1]).transpose(2, 3) * scale
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        z = z + _wide(attn_mask)
    return z.masked_fill(~seen, float("-inf"))


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """o (B, H, Sq, Dv) with the strides of a contiguous (B, Sq, H, Dv): models transpose it back."""
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    pattern: str,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o (B, H, Sq, Dv), lse (B, H, Sq)) of q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv).

    attn_mask: bool (True = visible) or additive, 4-d, each dimension 1 or full. lse in fp32 (fp64 for fp64).
    """
    seen = visible(q, k, attn_mask, seed, dropout_p, pattern, is_causal)
    lse = logits(q, k, attn_mask, seen, scale).logsumexp(-1)
    p = _probabilities(q, k, attn_mask, seen, lse, scale)
    return empty_output(q, v).copy_(p @ per_query_head(_wide(v), q.shape[1])), lse


def _probabilities(q, k, attn_mask, seen, lse, scale):
    z = logits(q, k, attn_mask, seen, scale)
    return torch.exp(z - lse.unsqueeze(-1).masked_fill(lse.unsqueeze(-1) == float("-inf"), 0.0))


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    pattern: str,
    is_causal: bool,
    scale: float,
    need_dq: bool,
    need_dk: bool,
    need_dv: bool,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dmask) in the shapes, dtypes and strides (torch.empty_like) of q, k, v, attn_mask.

    What is not needed is an empty tensor of shape (0,). dmask is summed over the dimensions attn_mask broadcasts.
    """
    heads, key_heads = q.shape[1], k.shape[1]
    seen = visible(q, k, attn_mask, seed, dropout_p, pattern, is_causal)
    p = _probabilities(q, k, attn_mask, seen, lse, scale)
    wide_do = _wide(do)
    dq, dk, dv, dmask = (do.new_empty(0) for _ in range(4))

    def per_key_head(gradient: Tensor) -> Tensor:
        return gradient if heads == key_heads else gradient.unflatten(1, (key_heads, heads // key_heads)).sum(2)

    if need_dv:
        dv = torch.empty_like(v).copy_(per_key_head(p.transpose(2, 3) @ wide_do))
    if need_dq or need_dk or need_dmask:
        dp = wide_do @ per_query_head(_wide(v), heads).transpose(2, 3)
        dz = p * (dp - (wide_do * _wide(o)).sum(-1, keepdim=True))
        if need_dq:
            dq = torch.empty_like(q).copy_(dz @ per_query_head(_wide(k), heads) * scale)
        if need_dk:
            dk = torch.empty_like(k).copy_(per_key_head(dz.transpose(2, 3) @ _wide(q)) * scale)
        if need_dmask:
            dmask = dz.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    return dq, dk, dv, dmask
